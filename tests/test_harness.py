"""lm-evaluation-harness: six local tasks score the same with our model class and with its own ``hf`` class.

The oracle needs torch, transformers and lm_eval: ``pip install -e '.[lm-eval,benchmarks]'``. Without them, only the
likelihoods are tested, against all logits.
"""

import json
import shutil
import sys
import types
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_model

from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.commands import lm_eval as harness
from layerskip_jax.commands.export import export_model
from layerskip_jax.config import DecodeConfig
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.errors import UserError
from layerskip_jax.evaluation.likelihood import log_likelihoods
from layerskip_jax.sharding import mesh_size

TASKS = {
    "choices": {
        "rows": [
            {"q": q, "a": a, "options": ["x = value", "return", "if the"]} for q, a in [("x", 0), ("self", 2)] * 6
        ],
        "yaml": {
            "output_type": "multiple_choice",
            "doc_to_text": "what is {{q}}:",
            "doc_to_target": "a",
            "doc_to_choice": "options",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
    },
    "sentences": {  # choices without a context
        "rows": [{"a": 0, "options": ["return x", "x return"]}, {"a": 1, "options": ["index = y", "for a in the"]}],
        "yaml": {
            "output_type": "multiple_choice",
            "doc_to_text": "",
            "target_delimiter": "",
            "doc_to_target": "a",
            "doc_to_choice": "options",
            "metric_list": [{"metric": "acc"}],
        },
    },
    "last_word": {
        "rows": [
            {"q": "def x ( self", "a": ")"},
            {"q": "for index in the", "a": "value"},
            {"q": "x " * 99, "a": "y"},
            {"q": "<s> def", "a": "x"},
        ],
        "yaml": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{q}}",
            "doc_to_target": "{{a}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
    },
    "rolling": {
        "rows": [{"q": "the value of x of the index. " * n} for n in (1, 3, 7)],  # the last is longer than max_length
        "yaml": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{q}}",
            "metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
    },
    "writing": {
        "rows": [{"q": q, "a": "a"} for q in ("x", "return value", "self " * 60)],
        "yaml": {
            "output_type": "generate_until",
            "doc_to_text": "say {{q}}:",
            "doc_to_target": "{{a}}",
            "generation_kwargs": {"until": ["="], "max_gen_toks": 20, "do_sample": False, "temperature": 0.0},
            "metric_list": [{"metric": "exact_match"}],
        },
    },
    "solved": {  # with solved examples, and with another name for the length
        "rows": [{"q": q, "a": a} for q, a in (("a", "b"), ("x", "y"), ("the", "of"))],
        "yaml": {
            "output_type": "generate_until",
            "doc_to_text": "Q: {{q}}\nA:",
            "doc_to_target": "{{a}}",
            "num_fewshot": 2,
            "fewshot_split": "test",
            "fewshot_config": {"sampler": "first_n"},
            "generation_kwargs": {"until": ["\n\n", "Q:"], "max_new_tokens": 7},
            "metric_list": [{"metric": "exact_match"}],
        },
    },
}
MAX_LENGTH = 100


@jax.jit
def _log_p(model, tokens):
    return jax.nn.log_softmax(model(tokens), axis=-1)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=5),
    exit_layer=st.sampled_from([1, 2]),
    max_length=st.sampled_from([20, 64]),
)
@settings(max_examples=15)
def test_likelihoods_are_sums_over_all_logits(lengths, exit_layer, max_length):
    """The oracle goes token by token, without batches."""
    model, random = tiny_model(2, num_layers=2).unstacked(), np.random.default_rng(len(lengths))
    pairs = [tuple(random.integers(0, 61, size).tolist() for size in pair) for pair in lengths]
    early = model.first_layers(exit_layer)
    for (context, continuation), (score, greedy) in zip(
        pairs, log_likelihoods(model, pairs, exit_layer, max_length, batch_size=2), strict=True
    ):
        row = [*context, *continuation][-(max_length + 1) :]
        log_p = np.asarray(_log_p(early, jnp.zeros((1, 64), int).at[0, : len(row) - 1].set(jnp.array(row[:-1])))[0])
        counted = range(max(0, len(row) - 1 - len(continuation)), len(row) - 1)
        assert score == pytest.approx(sum(log_p[at, row[at + 1]] for at in counted), abs=1e-3)
        assert greedy == all(log_p[at].argmax() == row[at + 1] for at in counted)


def test_a_missing_extra_is_a_one_line_error(trained_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"lm_eval.*pip install 'layerskip-jax\[lm-eval\]'"):
        harness.main([trained_run, "--tasks", "choices"])


def test_likelihoods_refuse_pairs_without_tokens_and_name_what_is_too_long(capsys):
    model = tiny_model(2, num_layers=2).unstacked()
    for pair, message in [
        (([1], []), "context and continuation 1 must have tokens"),
        (([], [1]), "context and continuation 1 must have tokens"),
        (([1], [2] * 21), "continuation 1 has 21 tokens, more than max_length 20"),
    ]:
        with pytest.raises(UserError, match=message):
            log_likelihoods(model, [([1], [2]), pair], 2, 20, batch_size=2)
    assert not capsys.readouterr().err
    log_likelihoods(model, [([1], [2]), ([1] * 2, [2] * 20), ([1] * 3, [2] * 18)], 2, 20, batch_size=2)
    assert "1 of 3 texts are longer than max_length 20 (the longest has 22 tokens)" in capsys.readouterr().err


@pytest.fixture(scope="module")
def lm_eval_model():
    pytest.importorskip("lm_eval", reason="pip install -e '.[lm-eval,benchmarks]'")
    from layerskip_jax.evaluation import lm_eval_model

    return lm_eval_model


class Letters(Tokenizer):
    """A character tokenizer in which "th" is one token."""

    characters: ClassVar[list[str]] = [*"abcdefghijklmnopqrstuvwxyz .:", "th"]
    bos_id, eos_id, vocab_size = 1, 2, 3 + len(characters)
    files: ClassVar[dict[str, bytes]] = {}
    _spelling: ClassVar[list[bytes]] = [b"", b"", b"", *(c.encode() for c in characters)]

    def encode(self, text):
        split = text.replace("th", "T").replace("<", "").replace(">", "")
        return [3 + self.characters.index("th" if c == "T" else c) for c in split]


def requests(*arguments):
    return [types.SimpleNamespace(args=each) for each in arguments]


@pytest.fixture(scope="module")
def make_lm(lm_eval_model):
    model = tiny_model(6, vocab_size=Letters.vocab_size, num_layers=2).unstacked()

    def make(settings=DecodeConfig(), **changes):  # noqa: B008  (immutable)
        return lm_eval_model.LayerSkipLM(model, Letters(), settings, max_length=MAX_LENGTH, **changes)

    return make


def test_a_continuation_that_joins_the_context_is_scored_and_one_without_tokens_is_refused(make_lm):
    lm = make_lm()
    th, t, a = Letters().encode("th")[0], *Letters().encode("ta")
    joined, plain, alone, spaces = lm.loglikelihood(requests(("at", "h"), ("a", "t"), ("", "ta"), ("  ", "ta")))
    (space,) = Letters().encode(" ")
    pairs = [([1, a], [th]), ([1, a], [t]), ([1], [t, a]), ([1], [space, space, t, a])]
    assert [joined, plain, alone, spaces] == log_likelihoods(lm.model, pairs, 2, MAX_LENGTH, 8)
    for context, continuation in [("a cat", ""), ("a cat ", ""), ("", ""), ("a", "<>"), ("", "<>")]:
        with pytest.raises(UserError, match=f"the continuation {continuation!r} has no tokens of its own"):
            lm.loglikelihood(requests((context, continuation)))


@pytest.mark.parametrize("text", ["a cat", "the cat. " * 30, ""])
def test_rolling_likelihoods_can_leave_out_the_bos(make_lm, capsys, text):
    """The oracle sums over all tokens of the text, in windows of `MAX_LENGTH`."""
    (with_bos,), note = make_lm().loglikelihood_rolling(requests((text,))), capsys.readouterr().err
    (without,), silent = make_lm(bos=(None, False)).loglikelihood_rolling(requests((text,))), capsys.readouterr().err
    assert make_lm(bos=(False, True)).loglikelihood_rolling(requests((text,))) == [without]
    lm, ids = make_lm(), [1, *Letters().encode(text)]
    first = ids[: MAX_LENGTH + 1]
    log_p = np.asarray(
        _log_p(lm.model, jnp.zeros((1, MAX_LENGTH), int).at[0, : len(first)].set(jnp.array(first[:100])))
    )
    expected = sum(log_p[0, at, first[at + 1]] for at in range(len(first) - 1))
    if len(ids) <= MAX_LENGTH:
        assert without == pytest.approx(expected, abs=1e-3)
        bos_after_bos = float(_log_p(lm.model, jnp.ones((1, MAX_LENGTH), int))[0, 0, 1])
        assert with_bos < without
        if not text:
            assert with_bos == pytest.approx(bos_after_bos, abs=1e-3)
    else:
        assert without < expected  # the windows after the first
    assert "1 texts include that of BOS after BOS" in note
    assert not silent


@pytest.mark.parametrize(
    ("request_kwargs", "expected"),
    [
        ({}, {"max_new_tokens": 256, "temperature": 0.0}),
        ({"max_gen_toks": 5}, {"max_new_tokens": 5}),
        ({"max_new_tokens": 6}, {"max_new_tokens": 6}),
        ({"max_tokens": 7, "max_gen_toks": None}, {"max_new_tokens": 7}),
        ({"max_completion_tokens": "8"}, {"max_new_tokens": 8}),
        ({"temperature": None, "do_sample": None, "until": None, "top_p": None}, {"temperature": 0.0, "stop": ()}),
        ({"temperature": 0.7, "top_k": 5, "top_p": 0.9}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}),
        ({"temperature": 0.7, "do_sample": False, "top_k": 5}, {"temperature": 0.0, "top_k": 0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"until": "x"}, {"stop": ("x",)}),
        ({"until": ["x", "", "y"]}, {"stop": ("x", "y")}),
    ],
)
def test_generation_kwargs_have_the_names_that_lm_eval_knows(make_lm, capsys, request_kwargs, expected):
    settings = make_lm()._request_settings(request_kwargs)
    assert {name: getattr(settings, name) for name in expected} == expected
    assert not capsys.readouterr().err


def test_generation_kwargs_that_cannot_be_used_are_named(make_lm, capsys):
    lm = make_lm()
    for _ in range(2):
        lm._request_settings({"max_gen_tok": 5, "num_beams": 4})
    lines = sorted(capsys.readouterr().err.splitlines())
    assert lines == [
        "WARNING: the setting 'max_gen_tok' of a task's generation_kwargs is not used; did you mean 'max_gen_toks'?",
        "WARNING: the setting 'num_beams' of a task's generation_kwargs is not used",
    ]
    for wrong in ({"max_gen_toks": 0}, {"max_new_tokens": "many"}, {"temperature": "warm"}, {"temperature": [1]},
                  {"until": [5]}, {"top_p": 2, "do_sample": True}):  # fmt: skip
        with pytest.raises(UserError, match=f"generation_kwargs {{'{next(iter(wrong))}': .* cannot be used"):
            lm._request_settings(wrong)


def test_repeated_prompts_get_different_samples(make_lm):
    sampled = {"do_sample": True, "max_gen_toks": 12}
    texts = make_lm(batch_size=2).generate_until(requests(*[("a cat", sampled)] * 6), disable_tqdm=True)
    assert len(set(texts)) == 6


def test_an_inner_exit_generates_whatever_the_other_settings_are(make_lm):
    lm = make_lm(settings=DecodeConfig(choices=4), exit_layer=1)
    assert lm.generate_until(requests(("a cat", {"max_gen_toks": 3})), disable_tqdm=True)


def test_a_prompt_that_is_cut_is_named_once(make_lm, capsys):
    lm = make_lm()
    lm.generate_until(requests(*[("a" * 150, {"max_gen_toks": 4})] * 3), disable_tqdm=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert "a prompt of 151 tokens and 4 new ones are longer than max_length 100" in line
    with pytest.raises(UserError, match="asks for 100 new tokens, but the model's max_length is 100"):
        lm.generate_until(requests(("a", {"max_gen_toks": 100})))


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory, lm_eval_model):
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export_model(trained_run, str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, task in TASKS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task["rows"]))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
        (folder / f"{name}.yaml").write_text(
            yaml.safe_dump({"task": name, "test_split": "test", **source, **task["yaml"]})
        )
    return str(folder)


@pytest.mark.filterwarnings("default")  # warnings of third-party code
@pytest.mark.parametrize(
    ("exit_layer", "add_bos_token", "post_processor"),
    [(0, None, True), (2, None, True), (0, True, True), (0, False, True), (0, None, False)],
)
def test_six_tasks_give_the_same_numbers_as_the_hf_class(
    exported, task_folder, exit_layer, add_bos_token, post_processor, tmp_path, monkeypatch, lm_eval_model
):
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if not post_processor:  # the tokenizer adds no BOS
        exported = shutil.copytree(exported, tmp_path / "without_bos").as_posix()
        settings = json.loads((tmp_path / "without_bos" / "tokenizer.json").read_text())
        (tmp_path / "without_bos" / "tokenizer.json").write_text(json.dumps(settings | {"post_processor": None}))
    theirs = HFLM(
        pretrained=exported, batch_size=2, max_length=MAX_LENGTH, device="cpu", dtype="float32",
        add_bos_token=add_bos_token,
    )  # fmt: skip
    theirs.tokenizer.pad_token = theirs.tokenizer.eos_token
    if exit_layer:  # truncate their model
        theirs.model.model.layers = theirs.model.model.layers[:exit_layer]
        theirs.model.config.num_hidden_layers = exit_layer
    model, _, tokenizer = load_model(exported, unstacked=True)
    ours = lm_eval_model.LayerSkipLM(
        model,
        load_tokenizer(str(tokenizer)),
        DecodeConfig(exit_layer=1, draft_length=3),
        max_length=MAX_LENGTH,
        exit_layer=exit_layer,
        batch_size=2,
        bos=lm_eval_model.BosPolicy(add_bos_token),
    )
    reports = [
        evaluator.simple_evaluate(
            lm, tasks=list(TASKS), task_manager=TaskManager(include_path=task_folder), bootstrap_iters=0
        )
        for lm in (ours, theirs)
    ]
    for task in TASKS:
        a, b = (report["results"][task] for report in reports)
        assert a.keys() == b.keys()
        for metric, value in a.items():
            print(f"exit {exit_layer}: {task} {metric}: {value}, {b[metric]}")
            assert (
                value == pytest.approx(b[metric], rel=1e-4, nan_ok=True)
                if isinstance(value, float)
                else value == b[metric]
            )
        for mine, other in zip(*(report["samples"][task] for report in reports), strict=True):
            if task in ("writing", "solved"):
                assert mine["resps"] == other["resps"]
            else:
                mine, other = (np.array(jax.tree.leaves(s["filtered_resps"]), float) for s in (mine, other))
                np.testing.assert_allclose(mine, other, atol=1e-3)


def test_the_command_splits_the_model_over_as_many_devices_as_given(trained_run, monkeypatch, lm_eval_model):
    def load(*_, **__):
        raise UserError(f"{mesh_size('heads')} devices")

    monkeypatch.setattr(harness, "load_model", load)
    with pytest.raises(UserError, match=r"^2 devices$"):
        harness.main([trained_run, "--tasks", "choices", "--tensor_parallel", "2"])


@pytest.mark.filterwarnings("default")  # warnings of third-party code
def test_the_command_offers_rolling_perplexities_without_bos(exported, task_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    perplexity = {}
    for score_bos in ("true", "false"):
        words = ["--tasks", "rolling", "--include_path", task_folder, "--max_length", str(MAX_LENGTH), "--json"]
        harness.main([exported, *words, "--score_bos", score_bos])
        out, err = capsys.readouterr()
        perplexity[score_bos] = json.loads(out.splitlines()[-1])["word_perplexity,none"]
        assert ("--score_bos false leaves it out" in err) == (score_bos == "true")
        assert f"--max_length allows {MAX_LENGTH} tokens, more than the model's context of 32" in err
    assert perplexity["false"] < perplexity["true"]
