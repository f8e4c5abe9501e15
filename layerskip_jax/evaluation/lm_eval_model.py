"""A model class for lm-evaluation-harness, at any exit; importing it needs the extra ``lm-eval``."""

import dataclasses
from typing import Any, NamedTuple

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from layerskip_jax.config import DecodeConfig
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.decoding.text import TextGenerator
from layerskip_jax.errors import UserError, nearest, warn
from layerskip_jax.evaluation.likelihood import log_likelihoods
from layerskip_jax.model import Transformer

GENERATION_KEYS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")
"""The ``generation_kwargs`` that are used, by the names that `normalize_gen_kwargs` gives them."""


class BosPolicy(NamedTuple):
    """Whether every text gets a BOS (None: the tokenizer decides), and whether rolling likelihoods score it."""

    add: bool | None = None
    score: bool = True


class LayerSkipLM(TemplateLM):
    """The first ``exit_layer`` blocks (0: all) of an unstacked model, for lm-evaluation-harness.

    ``bos.add`` is ``add_bos_token`` of lm-eval's ``hf`` class (None: as the tokenizer does). Encoding adds no BOS to a
    text that begins with BOS. Rolling likelihoods put one more BOS in front as context. With ``bos.score``, as in the
    ``hf`` class, they then also score the BOS of the encoded text, whether encoding added it or the text has it;
    without, they score only the tokens after it.

    An inner exit generates in mode early_exit, the last exit with ``settings`` (and plain decoding instead of mode
    early_exit). ``max_length`` is the context [tokens].
    """

    max_gen_toks = 256
    """New tokens for a task that sets no number."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        settings: DecodeConfig,
        *,
        max_length: int,
        exit_layer: int = 0,
        batch_size: int = 8,
        bos: BosPolicy = BosPolicy(),  # noqa: B008  (immutable)
    ):
        super().__init__()
        layers = model.config.num_layers
        if not 0 <= exit_layer <= layers:
            raise UserError(
                f"exit_layer must be in 1..{layers}, the model's layers, or 0 for the last, not {exit_layer}"
            )
        self.add_bos_token, self.score_bos = bos
        self._named: set[str] = set()  # the unknown generation_kwargs that a warning has named
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.exit_layer, self.max_length, self.batch_size = exit_layer or layers, max_length, batch_size
        if self.exit_layer < layers:
            self.settings = dataclasses.replace(
                settings, mode="early_exit", exit_layer=exit_layer, exit_threshold=0.0, choices=1
            )
        elif settings.mode == "early_exit":  # lossy, and the scores are those of the last exit
            self.settings = dataclasses.replace(settings, mode="autoregressive")

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return "layerskip_jax"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the token ids of a text; ``add_special_tokens`` overrules ``add_bos_token``."""
        ids = self.tokenizer.encode(string)
        if add_special_tokens is None and ids[:1] == [self.prefix_token_id]:
            return ids
        add = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add is False:
            return ids
        return [self.prefix_token_id, *ids] if self.add_bos_token else self.tokenizer.encode_prompt(string)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return ``log p(continuation | context)`` of each pair, and whether greedy decoding would generate it.

        Raises `UserError` for a continuation without tokens, which would have the likelihood 1.
        """
        for context, continuation in (request.args for request in requests):
            if not continuation or not (context or self.tok_encode(continuation, add_special_tokens=False)):
                raise _no_tokens(context, continuation)
        return super().loglikelihood(requests, disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        if not continuation_ids:  # it merged with the last tokens of the context: score the tokens that changed
            whole = self.tok_encode(context + continuation)
            same = len(whole)
            while whole[:same] != context_ids[:same]:
                same -= 1
            context_ids, continuation_ids = whole[:same], whole[same:]
        return context_ids or [self.prefix_token_id], continuation_ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        for texts, _, continuation in requests:
            if not continuation:
                raise _no_tokens(*texts)
        pairs = [(context, continuation) for _, context, continuation in requests]
        return log_likelihoods(self.model, pairs, self.exit_layer, self.max_length, self.batch_size)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return ``log p(text)`` of each text, summed over disjoint windows."""
        windows: list[tuple[int, tuple[list[int], list[int]]]] = []
        with_bos = 0
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            starts = tokens[:1] == [self.prefix_token_id]
            with_bos += starts
            tokens = tokens if self.score_bos else tokens[starts:]
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(number, make_disjoint_window(window)) for window in rolling]
        if with_bos and self.score_bos:
            warn(
                f"the likelihoods of {with_bos} texts include that of BOS after BOS, as in lm-eval's hf class: "
                "--score_bos false leaves it out"
            )
        pairs = [pair for _, pair in windows]
        scores = log_likelihoods(self.model, pairs, self.exit_layer, self.max_length, self.batch_size)
        totals = [0.0] * len(requests)
        for (number, _), (score, _) in zip(windows, scores, strict=True):
            totals[number] += score
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until one of its stop strings, EOS or its ``max_gen_toks``."""
        texts: dict[int, str] = {}
        groups: dict[DecodeConfig, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(self._request_settings(request.args[1]), []).append(number)
        for settings, group in groups.items():
            generator = _LeftTruncating(self, settings)
            group.sort(key=lambda number: -len(requests[number].args[0]))
            size = min(self.batch_size, len(group))
            for start in tqdm(range(0, len(group), size), disable=disable_tqdm, leave=False):
                batch = group[start : start + size]
                filled = [*batch, *[batch[-1]] * (size - len(batch))]  # keep the shape, to avoid a recompile
                answer = generator.generate([requests[number].args[0] for number in filled], first=start)
                texts |= {n: completion.text for n, completion in zip(batch, answer.completions, strict=False)}
        return [texts[number] for number in range(len(requests))]

    def _request_settings(self, request: dict[str, Any]) -> DecodeConfig:
        """Return the settings that a task's ``generation_kwargs`` ask for; a null value counts as not given."""
        given = {name: value for name, value in request.items() if value is not None}
        try:
            wanted: dict[str, Any] = normalize_gen_kwargs(given, self.max_gen_toks)
            samples = wanted["do_sample"]
            settings = dataclasses.replace(
                self.settings,
                stop=tuple(text for text in wanted["until"] if text),
                max_new_tokens=wanted["max_gen_toks"],
                temperature=float(wanted.get("temperature", 1.0)) if samples else 0.0,
                top_k=int(wanted.get("top_k", 0)) if samples else 0,
                top_p=float(wanted.get("top_p", 1.0)) if samples else 1.0,
            )
        except (UserError, TypeError, ValueError) as error:
            raise UserError(f"a task has the generation_kwargs {request}, which cannot be used: {error}") from error
        for name in wanted.keys() - {*GENERATION_KEYS, *self._named}:
            warn(f"the setting {name!r} of a task's generation_kwargs is not used{nearest(name, GENERATION_KEYS)}")
            self._named.add(name)
        return settings


class _LeftTruncating(TextGenerator):
    """Keeps the last tokens of a prompt that is too long, like lm-eval's own classes."""

    def __init__(self, lm: LayerSkipLM, settings: DecodeConfig):
        super().__init__(lm.model, lm.tokenizer, settings)
        self._lm, self._room, self._warned = lm, lm.max_length - settings.max_new_tokens, False
        if self._room < 1:
            raise UserError(
                f"a task asks for {settings.max_new_tokens} new tokens, but the model's max_length is "
                f"{lm.max_length}: raise --max_length or lower max_gen_toks"
            )

    def encode(self, prompt: str) -> list[int]:
        ids = self._lm.tok_encode(prompt) or [self._lm.prefix_token_id]
        if len(ids) > self._room and not self._warned:
            self._warned = True
            warn(
                f"a prompt of {len(ids)} tokens and {self.config.max_new_tokens} new ones are longer than max_length "
                f"{self._lm.max_length}: the beginnings of such prompts are left out"
            )
        return ids[-self._room :]


def _no_tokens(context: str, continuation: str) -> UserError:
    return UserError(f"the continuation {continuation!r:.60} has no tokens of its own after {context!r:.60}")
