"""A model class for lm-evaluation-harness, at any exit; importing it needs the extra ``lm_eval``."""

import dataclasses
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from layerskip_jax.config import DecodeConfig
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.decoding.text import TextGenerator
from layerskip_jax.errors import UserError
from layerskip_jax.evaluation.likelihood import log_likelihoods
from layerskip_jax.model import Transformer


class _LeftTruncating(TextGenerator):
    """Keeps the last tokens of a prompt that is too long, like lm-eval's own classes."""

    room: int

    def encode(self, prompt: str) -> list[int]:
        return super().encode(prompt)[-self.room :]


class LayerSkipLM(TemplateLM):
    """The first ``exit_layer`` blocks (0: all) of an unstacked model, for lm-evaluation-harness.

    Texts begin with BOS, as in lm-eval's ``hf`` class with a tokenizer that adds one; so its rolling likelihoods, and
    these, include the likelihood of a BOS after the BOS. An exit before the last scores and generates alone; the last
    exit generates with ``settings``, by default with self-speculation. ``max_length`` is the context [tokens].
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
    ):
        super().__init__()
        layers = model.config.num_layers
        if not 0 <= exit_layer <= layers:
            raise UserError(f"exit layer {exit_layer} must be in 1..{layers}, the model's layers, or 0 for the last")
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.exit_layer, self.max_length, self.batch_size = exit_layer or layers, max_length, batch_size
        if self.exit_layer < layers:
            self.settings = dataclasses.replace(settings, mode="early_exit", exit_layer=exit_layer, exit_threshold=0.0)

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
        """Return the token ids of a text, after a BOS unless ``add_special_tokens`` is False."""
        encode = self.tokenizer.encode if add_special_tokens is False else self.tokenizer.encode_prompt
        return encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return log_likelihoods(self.model, pairs, self.exit_layer, self.max_length, self.batch_size)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return ``log p(text)`` of each text, summed over disjoint windows."""
        windows: list[tuple[int, tuple[list[int], list[int]]]] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(number, make_disjoint_window(window)) for window in rolling]
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
            generator = _LeftTruncating(self.model, self.tokenizer, settings)
            generator.room = self.max_length - settings.max_new_tokens
            if generator.room < 1:
                raise UserError(
                    f"a task asks for {settings.max_new_tokens} new tokens, but the model's max_length is "
                    f"{self.max_length}: raise --max_length or lower max_gen_toks"
                )
            group.sort(key=lambda number: -len(requests[number].args[0]))
            for start in tqdm(range(0, len(group), self.batch_size), disable=disable_tqdm, leave=False):
                batch = group[start : start + self.batch_size]
                filled = [*batch, *[batch[-1]] * (self.batch_size - len(batch))]  # keep the shape, to avoid a recompile
                answer = generator.generate([requests[number].args[0] for number in filled])
                texts |= {n: completion.text for n, completion in zip(batch, answer.completions, strict=False)}
        return [texts[number] for number in range(len(requests))]

    def _request_settings(self, request: dict[str, Any]) -> DecodeConfig:
        until = request.get("until") or []
        samples = request.get("do_sample", request.get("temperature", 0) > 0)
        return dataclasses.replace(
            self.settings,
            stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
            max_new_tokens=int(request.get("max_gen_toks", self.max_gen_toks)),
            temperature=float(request.get("temperature", 1.0)) if samples else 0.0,
            top_k=int(request.get("top_k", 0)) if samples else 0,
            top_p=float(request.get("top_p", 1.0)) if samples else 1.0,
        )
