"""Bad input to the Python functions: a one-line error, or else the right answer; never a hang.

The long run, 10,000 cases and more in this module and test_bad_input_command.py, is one command:

    BAD_INPUT_CASES=10000 python -m pytest tests/test_bad_input.py tests/test_bad_input_command.py
"""

import os
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from corpora import VOCABULARY
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_model

from layerskip_jax.config import DecodeConfig
from layerskip_jax.config_dict import from_dict
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.decoding.adaptive import AdaptiveSpeculative
from layerskip_jax.decoding.adaptive_policy import Adaptive
from layerskip_jax.decoding.branching import Branching, GreedyBranches
from layerskip_jax.decoding.confident_exit import ConfidentExit
from layerskip_jax.decoding.engine import generate
from layerskip_jax.decoding.hybrid import Hybrid
from layerskip_jax.decoding.policies import ConfidenceStop, Fixed
from layerskip_jax.decoding.prompt_lookup import PromptLookup
from layerskip_jax.decoding.rounds import Autoregressive, SelfSpeculative
from layerskip_jax.decoding.sampling import NO_TOKEN, Greedy, Stochastic
from layerskip_jax.decoding.text import TextGenerator
from layerskip_jax.errors import UserError

CASES = int(os.environ.get("BAD_INPUT_CASES", 1500))
SHAPE = {"num_layers": 2, "dim": 16, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 24, "vocab_size": 17}
V, L = SHAPE["vocab_size"], SHAPE["num_layers"]
DRAFTS = 2
FULL = 64 - DRAFTS - 1
"""The longest text in a cache of 64 slots; all good requests stay below it, so that they share programs."""
NAN, INF = float("nan"), float("inf")

GREEDY_STRATEGIES = [
    Autoregressive(Greedy()),
    SelfSpeculative(Greedy(), Fixed(1, DRAFTS)),
    AdaptiveSpeculative(Greedy(), Adaptive((1, 2), DRAFTS, probe_share=0.5)),
    PromptLookup(Greedy(), DRAFTS),
    Hybrid(PromptLookup(Greedy(), DRAFTS), SelfSpeculative(Greedy(), Fixed(1, DRAFTS)), L),
]


def hybrid(lookup=PromptLookup(Greedy(), 2), **settings):  # noqa: B008
    return Hybrid(lookup, SelfSpeculative(Greedy(), Fixed(1, 2)), L, **settings)


# Strategies that cannot be constructed, or cannot run on a model of two layers, each with a word of its error.
BAD_STRATEGIES = [
    (lambda: SelfSpeculative(Greedy(), Fixed(L + 1, 2)), "exit layer 3"),
    (lambda: SelfSpeculative(Greedy(), Fixed(0, 2)), "exit_layer"),
    (lambda: SelfSpeculative(Greedy(), Fixed(1.5, 2)), "exit_layer"),
    (lambda: SelfSpeculative(Greedy(), Fixed("1", 2)), "exit_layer"),
    (lambda: SelfSpeculative(Greedy(), Fixed(1, 0)), "draft_length"),
    (lambda: SelfSpeculative(Greedy(), Fixed(1, 64)), "draft length 64"),
    (lambda: SelfSpeculative(Greedy(), Fixed(1, 1 << 40)), "draft length"),
    (lambda: SelfSpeculative(Greedy(), ConfidenceStop(1, 2, NAN)), "threshold"),
    (lambda: SelfSpeculative(Greedy(), ConfidenceStop(1, 2, -0.1)), "threshold"),
    (lambda: AdaptiveSpeculative(Greedy(), Adaptive((2, 1), 2)), "exits must be strictly increasing"),
    (lambda: AdaptiveSpeculative(Greedy(), Adaptive((1, 9), 2)), "exit layer 9"),
    (lambda: AdaptiveSpeculative(Greedy(), Adaptive((0, 1), 2)), "exits must be strictly increasing"),
    (lambda: AdaptiveSpeculative(Greedy(), Adaptive((1, 2), 2, probe_share=0.0)), "probe_share"),
    (lambda: AdaptiveSpeculative(Greedy(), Adaptive((1, 2), 2, horizon=NAN)), "horizon"),
    (lambda: AdaptiveSpeculative(Greedy(), Adaptive((1, 2), 2, overhead=(0.1, INF))), "overhead"),
    (lambda: AdaptiveSpeculative(Greedy(), Adaptive((), 2)), "exits must name at least one exit"),
    (lambda: PromptLookup(Greedy(), 2.0), "draft_length must be a whole number"),
    (lambda: Branching(GreedyBranches(), 1.5, 2, 2), "exit_layer must be a whole number"),
    (lambda: Hybrid(PromptLookup(Greedy(), 2), SelfSpeculative(Greedy(), Fixed(1, 2)), 1), "num_layers 1 must be"),
    (lambda: PromptLookup(Greedy(), 0), "draft_length"),
    (lambda: PromptLookup(Greedy(), 64), "draft length 64"),
    (lambda: PromptLookup(Greedy(), 2, max_ngram=0), "max_ngram"),
    (lambda: hybrid(horizon=1.0), "horizon must be above 1"),
    (lambda: hybrid(overhead=(NAN,)), "overhead"),
    (lambda: hybrid(lookup=PromptLookup(Stochastic(), 2)), "same sampler"),
    (lambda: hybrid(lookup=PromptLookup(Greedy(), 64)), "draft length 64"),
    (lambda: ConfidentExit(Greedy(), (1,), 0.5), "last exit must be 2"),
    (lambda: ConfidentExit(Greedy(), (2, 1), 0.5), "exit layers must be strictly increasing"),
    (lambda: ConfidentExit(Greedy(), [1, 2], 0.5), "unhashable type: 'list'"),
    (lambda: ConfidentExit(Greedy(), (1, 2), NAN), "threshold"),
    (lambda: Autoregressive(Stochastic(0.0)), "temperature"),
    (lambda: Autoregressive(Stochastic(NAN)), "temperature"),
    (lambda: Autoregressive(Stochastic(1e-30)), "temperature"),
    (lambda: Autoregressive(Stochastic(1.0, top_k=-1)), "top_k"),
    (lambda: Autoregressive(Stochastic(1.0, top_p=0.0)), "top_p"),
    (lambda: Autoregressive(Stochastic(1.0, top_p=1.5)), "top_p"),
]
BAD_PROMPTS = [
    ([], "no prompt"),
    ([[1, 2], []], "prompt 1 has no token"),
    ([[], [1, 2]], "prompt 0 has no token"),
    ([[1, 2], [-1]], "prompt 1 has a token outside"),
    ([[1, V], [2]], "prompt 0 has a token outside"),
    ([[1, 1 << 40], [2]], "prompt 0 has a token outside"),
    ([[1, 2.5], [2]], "whole numbers"),
    ([[1, NAN], [2]], "whole numbers"),
    ([[1, None], [2]], "whole numbers"),
    ([[1, True], [2]], "whole numbers"),
    ([[1, [2]], [2]], "whole numbers"),
    (["ab", "cd"], "list of token ids"),
    ([b"ab", [1]], "list of token ids"),
    ([1, 2], "list of token ids"),
    ([None, [1]], "list of token ids"),
    ("ab", "list of token ids"),
    (np.zeros((2, 3)), "whole numbers"),
    (np.zeros((2, 0), int), "no token"),
    (np.zeros((), int), "list of lists"),
    (None, "list of lists"),
    (7, "list of lists"),
    ({1: [2]}, "list of lists"),
    (({1: 2}, [1]), "list of token ids"),
    ([{1, 2}, [1]], "list of token ids"),
]
BAD_NEW = [(value, "max_new_tokens") for value in (0, -1, -(1 << 70), 1 << 36, 1 << 70, 2.0, NAN, "3", None, True)]
BAD_LENGTHS = [(value, "max_length") for value in (0, 1, -5, -(1 << 70), 2.5, "60", True)]
TOO_LARGE = [(1 << 31, "GiB"), ((1 << 32) - 1, "GiB")]  # exceeds any memory
BAD_EOS = [(value, "eos") for value in (-2, V, 1 << 40, 1.5, None, "</s>", NAN, [2, V], (2, None))]
BAD_SEEDS = [(value, "seed") for value in (1 << 32, -(1 << 40), 1 << 70, 0.5, None, "x")]


def test_rounds_per_call_may_exceed_32_bits():
    one = generate(
        model_with("")[1], [[1]], 2, Autoregressive(Greedy()), on_rounds=lambda text: [False], rounds_per_call=1 << 40
    )
    assert len(one.tokens[0]) == 2


def test_rounds_per_call_must_be_positive():
    with pytest.raises(UserError, match="rounds_per_call must be at least 1, not 0"):
        generate(
            model_with("")[1], [[1]], 2, Autoregressive(Greedy()), on_rounds=lambda text: [False], rounds_per_call=0
        )


def poison(model, kind):
    """Put a non-finite or huge number into one weight."""
    place = {
        "nan head": (model.head_DV, (0, 7), NAN),
        "inf head": (model.head_DV, (3, 2), INF),
        "-inf head": (model.head_DV, (3, 2), -INF),
        "nan block": (model.blocks.down_FD, (1, 0, 0), NAN),
        "inf block": (model.blocks.gate_DF, (0, 1, 1), INF),
        "nan embedding": (model.embedding_VD, (5, 0), NAN),
        "nan norm": (model.final_norm_D, (0,), NAN),
        "large": (model.blocks.output_NHD, (0, 0, 0, 0), 3e38),
    }
    param, index, value = place[kind]
    param[...] = param[...].at[index].set(value)
    return model


KINDS = ["nan head", "inf head", "-inf head", "nan block", "inf block", "nan embedding", "nan norm", "large"]


@cache
def model_with(kind):
    """Return a model, stacked and unstacked, with one weight poisoned as ``kind`` says, or with none."""
    model = tiny_model(3, **SHAPE)
    if kind:
        poison(model, kind)
    return model, model.unstacked()


@jax.jit
def uncached_logits(model, tokens_BS):
    """The oracle: the whole text through the stacked model, without a cache."""
    return model(tokens_BS)


def check_answer(model, prompts, tokens, *, new, max_length, eos, what):
    """Every token is the argmax after its prefix, and each row ends at its limit or at EOS."""
    padded = np.zeros((len(prompts), 64), np.int32)
    for row, (prompt, made) in enumerate(zip(prompts, tokens, strict=True)):
        padded[row, : len(prompt) + len(made)] = [*prompt, *made]
    logits_BSV = np.asarray(uncached_logits(model, jnp.asarray(padded)))
    for row, (prompt, made) in enumerate(zip(prompts, tokens, strict=True)):
        limit = min(len(prompt) + new, FULL if max_length is None else max_length) - len(prompt)
        assert len(made) == limit or made[-1] == eos, what
        assert eos not in made[:-1], what
        assert len(made) <= limit, what
        for slot, token in enumerate(made, start=len(prompt) - 1):
            logits_V = logits_BSV[row, slot]
            # Cached and uncached sums round differently, so a tie may go either way.
            assert logits_V[token] >= logits_V.max() - 1e-4, what


@st.composite
def requests(draw):
    """Draw a request of two rows, and the words of which one must be in the error; a good request has none."""
    words, bad = (
        [],
        set(draw(st.lists(st.sampled_from(["prompts", "new", "length", "eos", "seed", "strategy"]), max_size=2))),
    )

    def pick(name, good, wrong):
        if name not in bad:
            return draw(good)
        value, word = draw(st.sampled_from(wrong))
        words.append(word)
        return value

    token = st.integers(0, V - 1)
    rows = st.tuples(st.lists(token, min_size=2, max_size=FULL - 1), st.lists(token, min_size=1, max_size=FULL - 1))
    prompts = pick("prompts", rows.map(list), BAD_PROMPTS)
    longest = max((len(row) for row in prompts), default=0) if "prompts" not in bad else 2
    # Edge cases: exactly full, one less, one new token, or the default, which just fits.
    lengths = st.sampled_from([None, FULL, FULL - 1, longest + 1]).filter(lambda n: n is None or n > longest)
    if draw(st.booleans()) and "prompts" not in bad:
        BAD_HERE = [*BAD_LENGTHS, (longest, f"at least {longest + 1}")]
    else:
        BAD_HERE = BAD_LENGTHS
    length = pick("length", lengths, BAD_HERE)
    room = FULL - longest if length is None else FULL
    new = pick("new", st.integers(1, room), [*BAD_NEW, *(TOO_LARGE if length is None else [])])
    return {
        "prompts": draw(st.sampled_from([list, lambda rows: [np.array(row) for row in rows]]))(prompts)
        if "prompts" not in bad
        else prompts,
        "new": new,
        "length": length,
        "eos": pick("eos", st.integers(-1, V - 1), BAD_EOS),
        "seed": pick("seed", st.sampled_from([0, 7, -1, 2**32 - 1]), BAD_SEEDS),
        "strategy": pick("strategy", st.sampled_from(GREEDY_STRATEGIES), BAD_STRATEGIES),
        "weights": draw(st.sampled_from([None] * 6 + KINDS)),
        "words": words,
    }


def assert_one_sentence(error, words):
    line = " ".join(str(error.value if hasattr(error, "value") else error).split())
    assert any(word in line for word in words), (line, words)
    assert 10 < len(line) < 600, line


@given(request=requests())
@settings(max_examples=CASES // 2)
def test_generate_is_right_or_names_the_error(request):
    stacked, model = model_with(request["weights"])
    prompts, words = request["prompts"], request["words"]
    try:
        strategy = request["strategy"] if hasattr(request["strategy"], "sampler") else request["strategy"]()
        result = generate(
            model,
            prompts,
            request["new"],
            strategy,
            eos=request["eos"],
            seed=request["seed"],
            max_length=request["length"],
        )
    except UserError as error:
        if request["weights"]:
            words = [*words, "not finite"]
        assert_one_sentence(error, words)
        return
    assert not words, f"{request} was accepted"
    check_answer(
        stacked,
        prompts,
        result.tokens,
        new=request["new"],
        max_length=request["length"],
        eos=request["eos"],
        what=request,
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("-inf head", "nan embedding", "large")])
@pytest.mark.parametrize("strategy", [*GREEDY_STRATEGIES[:2], Autoregressive(Stochastic(0.8, 3, 0.9))], ids=repr)
def test_non_finite_weights_never_become_tokens(kind, strategy):
    with pytest.raises(UserError, match=r"the logits after \d tokens of prompt 0 are not finite: the weights hold NaN"):
        generate(model_with(kind)[1], [[1, 2, 3], [4]], 5, strategy)


def test_a_stacked_model_is_refused():
    with pytest.raises(UserError, match=r"pass model\.unstacked\(\)"):
        generate(model_with(None)[0], [[1]], 1, GREEDY_STRATEGIES[0])


logits = st.one_of(
    st.floats(-50, 50, width=32, allow_subnormal=False), st.sampled_from([NAN, INF, -INF, 3e38, -3e38, 0.0])
)


@given(rows=st.lists(st.lists(logits, min_size=5, max_size=5), min_size=2, max_size=2), seed=st.integers(0, 99))
@settings(max_examples=CASES // 10)
def test_samplers_draw_a_token_or_none(rows, seed):
    """A token with positive probability, or `NO_TOKEN` exactly where the largest logit is not finite."""
    array = jnp.asarray(np.array(rows, np.float32))
    for sampler in (Greedy(), Stochastic(1e-6), Stochastic(1e6), Stochastic(0.7, 2, 0.5), Stochastic(1.0, 9, 1e-9)):
        tokens = np.asarray(_draw(sampler, array, jax.random.key(seed)))
        for row, token in zip(np.asarray(array), tokens, strict=True):
            if not np.isfinite(row.max()):  # numpy returns NaN as the maximum, too
                assert token == NO_TOKEN
            else:
                assert 0 <= token < 5
                assert row[token] > -INF
                if sampler in (Greedy(), Stochastic(1.0, 9, 1e-9)):
                    assert row[token] == row.max()


_draw = jax.jit(lambda sampler, logits_BV, key: sampler.draw(logits_BV, key), static_argnums=0)


@given(where=st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), max_size=20), cut=st.integers(0, 6000))
@settings(max_examples=CASES // 5)
def test_a_damaged_tokenizer_is_refused_or_works(corpus, tmp_path_factory, where, cut):
    data = bytearray(Path(corpus.tokenizer).read_bytes())
    for place, byte in where:
        data[place % len(data)] = byte
    file = tmp_path_factory.getbasetemp() / "damaged.model"
    file.write_bytes(data[:cut] if cut % 3 == 0 else data)
    try:
        tokenizer = load_tokenizer(str(file))
        tokenizer.check_vocabulary(VOCABULARY)
    except UserError as error:
        assert_one_sentence(error, ["SentencePiece", "pieces"])
        return
    ids = tokenizer.encode("def x: naïve 漢字 \u2581 \ud800")
    assert all(0 <= token < VOCABULARY for token in ids)
    assert isinstance(tokenizer.decode(list(range(VOCABULARY))), str)


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([1 << 80, NAN, INF, -0.5, 0.5, 2.0, "", "fixed", "x"]),
) | st.lists(st.integers(-1, 9) | st.text(max_size=1), max_size=3)


@given(changes=st.dictionaries(st.sampled_from([*DecodeConfig.__dataclass_fields__, "exit_layr"]), values, max_size=3))
@settings(max_examples=CASES // 5)
def test_decode_settings_are_checked_when_made(changes):
    """Via JSON, as in a checkpoint, and in Python: accepted settings are hashable and in range."""
    in_python = {name: value for name, value in changes.items() if name != "exit_layr"}  # a TypeError of Python itself
    for make in (lambda: DecodeConfig(**in_python), lambda: from_dict(changes, DecodeConfig)):
        try:
            config = make()
        except UserError as error:
            assert_one_sentence(error, [*changes, "stop string"])
        else:
            assert hash(config) is not None
            assert 0 < config.draft_length < 64
            assert 0 <= config.temperature < INF


def test_a_tokenizer_of_another_vocabulary_is_refused(corpus):
    with pytest.raises(UserError, match=f"the tokenizer has {VOCABULARY} pieces and the model's vocabulary {V}"):
        TextGenerator(model_with(None)[1], load_tokenizer(corpus.tokenizer), DecodeConfig())
