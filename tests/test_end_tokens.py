"""Several tokens that end a text: from a model's files, in every strategy and batch; stop strings of special tokens."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from corpora import VOCABULARY
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_model, write_llama

from layerskip_jax.checkpoint.arrays import named_arrays
from layerskip_jax.checkpoint.huggingface.tokenizer_files import tokenizer_files
from layerskip_jax.commands import decode
from layerskip_jax.config import DecodeConfig
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.pipeline import _to_row
from layerskip_jax.data.tokenizer_settings import TokenizerSettings
from layerskip_jax.decoding.adaptive import AdaptiveSpeculative
from layerskip_jax.decoding.adaptive_policy import Adaptive
from layerskip_jax.decoding.confident_exit import ConfidentExit
from layerskip_jax.decoding.engine import generate
from layerskip_jax.decoding.hybrid import Hybrid
from layerskip_jax.decoding.policies import ConfidenceStop, Fixed
from layerskip_jax.decoding.prompt_lookup import PromptLookup
from layerskip_jax.decoding.rounds import Autoregressive, SelfSpeculative
from layerskip_jax.decoding.sampling import Greedy
from layerskip_jax.decoding.text import TextGenerator
from layerskip_jax.errors import UserError
from layerskip_jax.evaluation.likelihood import log_likelihoods
from layerskip_jax.training.checkpoints import Checkpoints

STRATEGIES = [
    Autoregressive(Greedy()),
    SelfSpeculative(Greedy(), Fixed(2, 3)),
    SelfSpeculative(Greedy(), ConfidenceStop(2, 3, 0.1)),
    AdaptiveSpeculative(Greedy(), Adaptive((1, 2), 3)),
    PromptLookup(Greedy(), 3),
    Hybrid(PromptLookup(Greedy(), 4), SelfSpeculative(Greedy(), Fixed(2, 3)), 4),
    ConfidentExit(Greedy(), (1, 4), 2.0),
]
T = 77


def with_files(target, source, name="tokenizer.json", **files):
    """Copy a tokenizer, write JSON files next to it, and open it."""
    for file in (name, "tokenizer_config.json"):
        (target / file).write_bytes((source / file).read_bytes())
    for file, values in files.items():
        (target / f"{file}.json").write_text(json.dumps(values))
    return load_tokenizer(str(target / name))


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: type(s).__name__)
def test_every_row_ends_at_the_first_of_several_tokens(strategy):
    model, prompts = tiny_model(2).unstacked(), [[5, 6], [1], [9, 9, 9]]
    free = generate(model, prompts, 24, Autoregressive(Greedy())).tokens
    ends = (free[0][9], free[1][5], 60)
    expected = [row[: next((n for n, token in enumerate(row) if token in ends), 23) + 1] for row in free]
    assert [len(row) < 24 for row in expected][:2] == [True, True]
    assert generate(model, prompts, 24, strategy, eos=ends).tokens == expected


def test_an_empty_list_of_end_tokens_ends_no_row():
    model = tiny_model(2).unstacked()
    free = generate(model, [[5, 6]], 9, STRATEGIES[0])
    assert generate(model, [[5, 6]], 9, STRATEGIES[0], eos=()).tokens == free.tokens


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, (2,)),
        ({"generation_config": {"eos_token_id": [2, T]}}, (2, T)),
        ({"generation_config": {"eos_token_id": T}, "config": {"eos_token_id": [2, 3]}}, (T,)),
        ({"config": {"eos_token_id": [2, T]}}, (2, T)),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": [T, 2, T]}}, (T, 2)),
        ({"generation_config": {"eos_token_id": []}, "config": {"eos_token_id": None}}, (2,)),
        ({"generation_config": {"eos_token_id": [T, VOCABULARY, 10**9, -1]}}, (T,)),
        ({"generation_config": {"eos_token_id": -1}}, (2,)),
    ],
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_the_models_files_list_the_end_tokens(llama, tmp_path, name, files, ends):
    assert with_files(tmp_path, llama, name, **files).end_tokens(VOCABULARY) == ends


@pytest.mark.parametrize("value", ["</s>", 2.0, [2, "x"], True, {"a": 1}, [[2]]])
def test_end_tokens_of_another_type_are_an_error(llama, tmp_path, value):
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id must be a token id or a list"):
        with_files(tmp_path, llama, generation_config={"eos_token_id": value})


@given(values=st.recursive(st.none() | st.booleans() | st.integers(-3, 400) | st.text(max_size=3), st.lists))
def test_any_list_of_end_tokens_is_read_or_refused(values):
    settings = TokenizerSettings({"generation_config.json": json.dumps({"eos_token_id": values}).encode()})
    flat = values if isinstance(values, list) else [] if values is None else [values]
    if all(type(value) is int for value in flat):
        assert list(settings.end_ids) == sorted({v for v in flat if v >= 0}, key=flat.index)
    else:
        with pytest.raises(UserError, match="eos_token_id must be"):
            _ = settings.end_ids


@pytest.mark.parametrize("mode", ["autoregressive", "self_speculative", "prompt_lookup", "early_exit"])
def test_texts_end_at_any_end_token(llama, tmp_path, model, tokenizer, mode):
    config = DecodeConfig(mode=mode, exit_layer=4, max_new_tokens=24)
    prompts = ["def x", "for", "while y"]
    free = TextGenerator(model.unstacked(), tokenizer, config).generate(prompts).completions
    end = free[1].tokens[6]
    ours = with_files(tmp_path, llama, generation_config={"eos_token_id": [2, end]})
    for before, after in zip(
        free, TextGenerator(model.unstacked(), ours, config).generate(prompts).completions, strict=True
    ):
        cut = before.tokens.index(end) + 1 if end in before.tokens else 24
        assert after.tokens == before.tokens[:cut]
        assert after.finish == ("eos" if cut < 24 or end in before.tokens else "length")
        assert after.text == tokenizer.decode([token for token in after.tokens if token != end])


def test_runs_and_exports_keep_the_end_tokens_and_the_chat_template(llama, tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    source = with_files(tmp_path, llama, config={"eos_token_id": [T]}, generation_config={"temperature": 0.6})
    run = tmp_path / "run" / "checkpoints"
    run.mkdir(parents=True)
    checkpoints = object.__new__(Checkpoints)
    checkpoints.folder = epath.Path(run)
    checkpoints.save_tokenizer(source)
    stored = load_tokenizer(str(run / "tokenizer.json"))
    assert stored.files == source.files
    assert stored.end_tokens(VOCABULARY) == (T, 2)  # training documents end with the tokenizer's EOS
    assert json.loads(stored.companions["generation_config.json"]) == {"temperature": 0.6, "eos_token_id": [T, 2]}
    assert stored.encode_chat([{"role": "user", "content": "def"}]) == stored.encode("def")


# Stop strings


def spoken(monkeypatch, generator, tokens):
    """Let the engine return ``tokens`` for every prompt, in as many rounds as it takes."""
    from layerskip_jax.decoding import text

    def fake(model, prompts, new, strategy, *, eos, on_rounds=None, **_):
        row = list(tokens)
        for n in range(1, len(tokens) + 1):
            if on_rounds is not None:
                known = np.array([[*prompts[0], *tokens[:n]]])
                host = types.SimpleNamespace(
                    tokens_BS=known, drafted_BS=known < 0, length_B=[known.shape[1]], done_B=[n == len(tokens)]
                )
                if on_rounds(host)[0]:
                    row = list(tokens[:n])
                    break
            if tokens[n - 1] in eos:
                row = list(tokens[:n])
                break
        return types.SimpleNamespace(tokens=[row])

    monkeypatch.setattr(text, "generate", fake)
    pieces = []
    completion = generator.generate(["x"], pieces.append).completions[0]
    assert "".join(piece.text for piece in pieces) == completion.text
    assert generator.generate(["x"]).completions[0] == completion
    return completion


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize(
    ("stop", "text", "finish", "tokens"),
    [
        (("<s>",), "def x", "stop", 3),
        (("never", "<s>"), "def x", "stop", 3),
        (("x<s>",), "def ", "stop", 3),
        (("<s> y",), "def x", "stop", 4),
        (("<s>z",), "def x y", "eos", 5),
        (("</s>",), "def x y", "stop", 5),
        (("s>",), "def x y", "eos", 5),
        ((" y</s>",), "def x", "stop", 5),
    ],
)
def test_stop_strings_match_special_tokens(monkeypatch, llama, model, name, stop, text, finish, tokens):
    tokenizer = load_tokenizer(str(llama / name))
    def_x, y = tokenizer.encode("def x"), tokenizer.encode(" y")
    script = [*def_x, 1, *y, 2]
    counts = {3: len(def_x) + 1, 4: len(def_x) + 1 + len(y), 5: len(script)}
    config = DecodeConfig(mode="autoregressive", stop=stop)
    completion = spoken(monkeypatch, TextGenerator(model.unstacked(), tokenizer, config), script)
    assert (completion.text, completion.finish) == (text, finish)
    assert completion.tokens == script[: counts[tokens]]


def test_a_stop_string_that_is_a_special_token_ends_a_generated_text(llama, model):
    """With the engine: a model whose logits are all equal generates token 0, <unk>."""
    biased = tiny_model(5, vocab_size=VOCABULARY)
    biased.head_DV[...] = jnp.zeros_like(biased.head_DV[...])
    tokenizer = load_tokenizer(str(llama / "tokenizer.json"))
    config = DecodeConfig(stop=("<unk>",), max_new_tokens=12, ignore_eos=True)
    completion = TextGenerator(biased.unstacked(), tokenizer, config).generate(["def"]).completions[0]
    assert (completion.text, completion.finish, completion.tokens) == ("", "stop", [0])


# A tokenizer larger than the model


def test_a_tokenizer_larger_than_the_model_opens(llama, tmp_path, model, capsys):
    small = write_llama(tmp_path / "small", model.config, named_arrays(model))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (small / name).write_bytes((llama / name).read_bytes())
    settings = json.loads((small / "tokenizer_config.json").read_text()) | {"pad_token": "[PAD]"}
    (small / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(small / "tokenizer.json"))
    assert tokenizer.vocab_size == VOCABULARY + 1
    assert tokenizer.encode("[PAD]") == [VOCABULARY]
    tokenizer.check_vocabulary(VOCABULARY)
    decode.main([str(small), "--prompt", "def", "--max_new_tokens", "4", "--quiet"])
    assert "4 tokens from 1 prompt" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"prompt 0 has a token outside the model's vocabulary 0\.\.339"):
        decode.main([str(small), "--prompt", "def [PAD]", "--max_new_tokens", "4", "--quiet"])


def test_tokens_that_the_model_lacks_are_refused_wherever_texts_are_scored(model):
    row = {"tokens": np.array([1, 7]), "tokens_segment_ids": np.array([1, 1])}
    with pytest.raises(UserError, match="a document has the token 7, beyond the model's vocabulary of 7"):
        _to_row(False, 7, row)
    assert _to_row(False, 8, row)["targets_BT"].tolist() == [7]
    with pytest.raises(UserError, match="a text has the token 340, beyond the model's vocabulary of 340"):
        log_likelihoods(model, [([1], [2, VOCABULARY])], 4, 64, 1)


def test_exported_tokenizer_files_follow_the_bos_policy(llama, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((llama / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false, "chat_template": "x"}')
    ours = load_tokenizer(str(tmp_path / "tokenizer.model"))
    exported = tmp_path / "exported"
    exported.mkdir()
    for name, content in (ours.companions | tokenizer_files(ours)).items():
        (exported / name).write_bytes(content)
    written = load_tokenizer(str(exported / "tokenizer.json"))
    assert written.encode_prompt("def x") == ours.encode_prompt("def x") == ours.encode("def x")
    assert written.settings.chat_template == "x"
