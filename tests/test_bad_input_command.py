"""Bad input to ``layerskip decode``, in this process: a one-line error, or else exactly the full model's text.

The number of cases, and the command of the long run, are in test_bad_input.py.
"""

import contextlib
import io
import json
import shutil
from functools import cache
from pathlib import Path

import pytest
from bucket import NEW, changed, sign, train_once
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bad_input import CASES, assert_one_sentence

from layerskip_jax.checkpoint import reading
from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.checkpoint.run_folder import find_checkpoint
from layerskip_jax.checkpoint.swept import SWEPT
from layerskip_jax.commands import decode
from layerskip_jax.config import DecodeConfig
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.sentencepiece_tokenizer import TOKENIZER
from layerskip_jax.decoding import cost
from layerskip_jax.decoding.text import TextGenerator
from layerskip_jax.errors import UserError

DEEP = "[" * 100_000
"""JSON nested deeper than Python's parser allows."""


@pytest.fixture(scope="module")
def run(corpus):
    return train_once(corpus)


@pytest.fixture(scope="module", autouse=True)
def fast():
    """Read the good checkpoint once, and skip the memory benchmark."""
    with pytest.MonkeyPatch.context() as patch:
        load = cache(load_model)
        patch.setattr(reading, "load_model", lambda path, **options: load(path, **options))
        patch.setattr(cost, "measured_bandwidth", lambda: 1e10)
        yield


@pytest.fixture(scope="module")
def plain(run):
    """Plain greedy decoding as a function of prompt and stop strings."""
    model, _, tokenizer = load_model(run)
    model, tokenizer = model.unstacked(), load_tokenizer(str(tokenizer))

    @cache
    def text(prompt, stop):
        settings = DecodeConfig(mode="autoregressive", max_new_tokens=NEW, stop=stop)
        return TextGenerator(model, tokenizer, settings).generate([prompt]).completions[0].text

    return text


def decoded(*argv):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        decode.main(list(argv))
    return out.getvalue()


PROMPTS = [
    "def x",
    "",
    " ",
    "\n\n",
    "漢字 naïve",
    "\u2581",
    "\x00\x1b[31m",
    "</s><s>",
    "<0x41>",
    "--prompt",
    "'\"\\",
    "x" * 30,
]
STOPS = [
    (),
    ("e",),
    (" ", "\n"),
    ("\ufffd",),
    ("never there" * 50,),
    ("\u2581",),
    ("\x00", "")[:1],
    ("\U0001f600", "a"),
]
MODES = [[], ["--mode", "autoregressive"], ["--mode", "prompt_lookup"]]
OUTPUTS = [[], ["--json"], ["--quiet"], ["--stream_every", "3"]]
# Wrong options, each with a word of its error.
BAD_OPTIONS = [
    (["--exit_layer", "3"], "exit_layer 3"),
    (["--exit_layer", "-1"], "exit_layer"),
    (["--exit_layer", "two"], "--exit_layer"),
    (["--exit_layer"], "--exit_layer"),
    (["--exit_layr", "1"], "--exit_layr; did you mean '--exit_layer'"),
    (["--exits", "2", "1"], "exits must be strictly increasing"),
    (["--exits", "0"], "exits must be strictly increasing and at least 1"),
    (["--policy", "adaptive", "--exits", "1", "9"], "exits 1 9"),
    (["--draft_length", "0"], "draft_length"),
    (["--draft_length", "64"], "draft_length"),
    (["--draft_length", "9" * 5000], "--draft_length"),
    (["--max_new_tokens", "0"], "max_new_tokens"),
    (["--max_new_tokens", "-5"], "max_new_tokens"),
    (["--max_new_tokens", "1.5"], "--max_new_tokens"),
    (["--max_new_tokens", "2_000_000_000"], "GiB"),
    (["--max_new_tokens", "1" + "0" * 12], "max_new_tokens"),
    (["--max_new_tokens", "1" + "0" * 30], "max_new_tokens"),
    (["--temperature", "-1"], "temperature"),
    (["--temperature", "nan"], "--temperature"),
    (["--temperature", "inf"], "--temperature"),
    (["--temperature", "1e-300"], "temperature"),
    (["--top_p", "0"], "top_p"),
    (["--top_p", "1.0001"], "top_p"),
    (["--top_k", "-1"], "top_k"),
    (["--seed", str(1 << 70)], "seed"),
    (["--stop", ""], "stop string"),
    (["--draft_threshold", "1.1"], "draft_threshold"),
    (["--exit_threshold", "-0.1"], "exit_threshold"),
    (["--round_costs", "0.1", "-1"], "round_costs"),
    (["--round_costs", "inf"], "round_costs"),
    (["--weights", "int4"], "--weights"),
    (["--mode", "early-exit"], "--mode"),
    (["--policy", ""], "--policy"),
    (["--ignore_eos", "maybe"], "--ignore_eos"),
    (["--stream_every", "0"], "stream_every"),
    (["--batch_size", "0"], "--batch_size"),
    (["--batch_size", "-3"], "--batch_size"),
    (["--held_out", "1"], "one way"),
    (["--prompts", "nowhere.txt"], "one way"),
    (["--model.dim", "8"], "--model.dim"),
    (["stray"], "stray"),
    (["--prompt", "\udcff"], "not Unicode"),
]


@st.composite
def commands(draw):
    prompts = draw(st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=2))
    stop, mode = draw(st.sampled_from(STOPS)), draw(st.sampled_from(MODES))
    wrong = draw(st.lists(st.sampled_from(BAD_OPTIONS), max_size=2))
    options = [*(["--stop", *stop] if stop else []), *(f"--prompt={prompt}" for prompt in prompts)]
    options += [*mode, *draw(st.sampled_from(OUTPUTS))]
    bad = [word for option, _ in wrong for word in option]
    # The last value of an option counts, so a wrong one may come first only if nothing overrides it.
    first = draw(st.booleans()) and not {word for word in bad if word.startswith("--")} & {*options, "--exit_layer"}
    return prompts, stop, [*bad, *options] if first else [*options, *bad], wrong


@given(command=commands())
@settings(max_examples=CASES // 4)
def test_decode_prints_the_full_models_text_or_a_one_line_error(run, plain, command):
    prompts, stop, argv, wrong = command
    try:
        out = decoded("--checkpoint", run, *argv)
    except UserError as error:
        assert_one_sentence(error, [word for _, word in wrong])
        return
    assert not wrong, f"{argv} was accepted"
    texts = [plain(prompt, stop) for prompt in prompts]
    if "--json" in argv:
        lines = [json.loads(line) for line in out.splitlines()]
        assert [(line["prompt"], line["text"]) for line in lines[:-1]] == list(zip(prompts, texts, strict=True))
    elif "--quiet" in argv:
        assert out.startswith(f"{token_count(out)} tokens from {len(prompts)} prompt(s)")
    else:
        at = 0
        for prompt, text in zip(prompts, texts, strict=True):
            at = out.index(prompt + text, at) + len(prompt + text)


def token_count(out):
    return int(out.split()[0])


BAD_FILES = [
    (b"", "p.txt", "no prompts"),
    (b"\n \n\t\n", "p.jsonl", "no prompts"),
    (b"\xff\xfe\x00", "p.txt", "UTF-8"),
    (b'{"prompt": "\xff"}', "p.jsonl", "UTF-8"),
    (b"PK\x03\x04" + bytes(range(256)), "p.jsonl", "UTF-8"),
    (b"def x", "p.jsonl", "line 1 must have a JSON object"),
    (b'{"prompt": "a"}\n{"prompt":', "p.jsonl", "line 2 must have a JSON object"),
    (b'{"prompt": "a"}\n\n{"text": "a"}', "p.jsonl", "line 3 must have a JSON object"),
    (b'["prompt"]', "p.jsonl", "line 1 must have a JSON object"),
    (b'"prompt"', "p.jsonl", "line 1 must have a JSON object"),
    (b"3", "p.jsonl", "line 1 must have a JSON object"),
    (b"null", "p.jsonl", "line 1 must have a JSON object"),
    (DEEP.encode(), "p.jsonl", "line 1 must have a JSON object"),
    (b'{"prompt": null}', "p.jsonl", "line 1 must have text"),
    (b'{"prompt": ["a"]}', "p.jsonl", "line 1 must have text"),
    (b'{"prompt": 1' + b"0" * 4000 + b"}", "p.jsonl", "line 1 must have text"),
    (b'{"prompt": "\\ud800"}', "p.jsonl", "not Unicode"),
]
# Good files, with their prompts.
GOOD_FILES = [
    (b"\xef\xbb\xbfdef x\r\n\r\nfor\x0c", "p.txt", ["def x", "for\x0c"]),
    ('{"prompt": "a\u2028b", "more": [1]}\n'.encode(), "p.jsonl", ["a\u2028b"]),
    (b'{"prompt": "", "prompt": "x"}', "p.jsonl", ["x"]),
]


@given(
    file=st.sampled_from([*BAD_FILES, *GOOD_FILES]) | st.tuples(st.binary(max_size=40), st.just("p.jsonl"), st.none())
)
@settings(max_examples=CASES // 8)
def test_a_prompts_file_is_read_or_refused(run, plain, tmp_path_factory, file):
    content, name, expected = file
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        out = decoded("--checkpoint", run, "--prompts", str(path), "--json")
    except UserError as error:
        assert_one_sentence(error, [expected] if isinstance(expected, str) else ["UTF-8", "no prompts", "must have"])
        return
    assert isinstance(expected, list), file
    made = [json.loads(line) for line in out.splitlines()][:-1]
    assert [(line["prompt"], line["text"]) for line in made] == [(prompt, plain(prompt, ())) for prompt in expected]


def test_a_prompts_path_that_is_not_a_file(run, tmp_path):
    for path, word in [
        (tmp_path, "directory"),
        ("a\0b", "null"),
        (f"{tmp_path}/none", "No such"),
        ("gs:/x", "gs://"),
        ("s3://x", "gs://"),
    ]:
        with pytest.raises(UserError, match=word):
            decoded("--checkpoint", run, "--prompts", str(path))


def with_config(change):
    return lambda step: changed(step / "config" / "metadata", change)


def written(name, content):
    def write(step):
        path = (step / name) if name != SWEPT and name != TOKENIZER else step.parent / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


METADATA = "config/metadata"
# Damage to a good checkpoint, with a word of the error.
BAD_CHECKPOINTS = {
    "no config": (lambda step: (step / METADATA).unlink(), "no readable config"),
    "config not JSON": (written(METADATA, "{"), "no readable config"),
    "config not text": (written(METADATA, b"\xff\x00"), "no readable config"),
    "config a list": (written(METADATA, "[]"), "settings by name"),
    "config too deep": (written(METADATA, DEEP), "no readable config"),
    "config empty": (written(METADATA, "{}"), "do not match its config"),
    "group a number": (with_config(lambda c: c.update(model=3)), "model must be settings"),
    "unknown setting": (with_config(lambda c: c["model"].update(dimm=3)), "did you mean 'dim'"),
    "unknown group": (with_config(lambda c: c.update(modell={})), "did you mean 'model'"),
    "dim a text": (with_config(lambda c: c["model"].update(dim="16")), "model.dim must be a whole number"),
    "dim other": (with_config(lambda c: c["model"].update(dim=32)), "do not match its config"),
    "dim huge": (with_config(lambda c: c["model"].update(ffn_dim=10**25)), "model.ffn_dim must be at most"),
    "layers": (with_config(lambda c: c["model"].update(num_layers=3)), "do not match its config: blocks"),
    "vocabulary": (with_config(lambda c: c["model"].update(vocab_size=7)), "do not match its config"),
    "tied": (with_config(lambda c: c["model"].update(tied_embedding=True)), "head_DV is"),
    "rope NaN": (with_config(lambda c: c["model"].update(rope_base=float("nan"))), "rope_base"),
    "epsilon": (with_config(lambda c: c["model"].update(norm_epsilon=-1.0)), "norm_epsilon"),
    "decode exit": (with_config(lambda c: c["decode"].update(exit_layer=9)), "decode.exit_layer 9"),
    "no tokenizer": (lambda step: (step.parent / TOKENIZER).unlink(), "no tokenizer at"),
    "tokenizer a text": (written(TOKENIZER, "def x"), "not a SentencePiece model"),
    "tokenizer empty": (written(TOKENIZER, b""), "must have pieces"),
    "sweep not JSON": (written(SWEPT, "}"), "decode.json is not what"),
    "sweep a list": (written(SWEPT, "[]"), "decode.json is not what"),
    "sweep of a list": (written(SWEPT, '{"decode": []}'), "decode.json is not what"),
    "sweep too deep": (written(SWEPT, DEEP), "decode.json is not what"),
    "sweep unknown": (written(SWEPT, '{"decode": {"exit": 1}}'), "decode.json is not what"),
    "sweep type": (written(SWEPT, '{"decode": {"exit_layer": "1"}}'), "decode.json is not what"),
    "sweep range": (written(SWEPT, '{"decode": {"draft_length": 64}}'), "decode.json is not what"),
    "sweep exit": (written(SWEPT, '{"decode": {"exit_layer": 3}}'), "exit_layer 3"),
    "no weights": (lambda step: [shutil.rmtree(path) for path in step.parent.glob("*/model")], "no checkpoint at"),
    "weights empty": (lambda step: [shutil.rmtree(step / "model"), (step / "model").mkdir()], "is missing"),
    "weights a file": (lambda step: [shutil.rmtree(step / "model"), written("model", b"x")(step)], "is missing"),
    "list not JSON": (written("model/_METADATA", "{"), "is damaged"),
    "list a list": (written("model/_METADATA", "[]"), "is damaged"),
    "no manifest": (lambda step: (step / "model" / "manifest.ocdbt").unlink(), "is missing"),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_refused(run, tmp_path, name):
    damage, word = BAD_CHECKPOINTS[name]
    shutil.copytree(run, tmp_path / "run")
    step = Path(str(find_checkpoint(str(tmp_path / "run"))))
    damage(step)
    if name != "no weights":
        sign(step)
    with pytest.raises(UserError) as error:
        decoded("--checkpoint", str(tmp_path / "run"), "--prompt", "x")
    assert_one_sentence(error, [word])


@pytest.mark.parametrize("path", ["", "/", "/dev/null", "a\0b", "x" * 5000, "s3://b", "gs:/b", "file:///x"])
def test_a_path_that_is_not_a_checkpoint(path):
    with pytest.raises(UserError) as error:
        decoded("--checkpoint", path, "--prompt", "x")
    assert str(error.value).startswith(("no checkpoint at", "the path", path))


def test_without_a_checkpoint_or_a_prompt(run):
    for argv, word in [([], "--checkpoint"), (["--checkpoint", run], "one way"), (["--checkpoint"], "--checkpoint")]:
        with pytest.raises(UserError) as error:
            decoded(*argv)
        assert_one_sentence(error, [word])
