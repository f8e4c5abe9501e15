"""lm-evaluation-harness: three local tasks score the same with our model class and with its own ``hf`` class.

The oracle needs torch, transformers and lm_eval: ``pip install -e '.[lm_eval,benchmarks]'``. Without them, only the
likelihoods are tested, against all logits.
"""

import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_model

from layerskip_jax.commands import lm_eval as harness
from layerskip_jax.config import DecodeConfig
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.errors import UserError
from layerskip_jax.evaluation.likelihood import log_likelihoods

CHARACTERS = "abcdefghijklmnopqrstuvwxyz .:\n"
TASKS = {
    "choices": {
        "rows": [
            {"q": q, "a": a, "options": ["an apple", "two pears", "no"]} for q, a in [("cat", 0), ("dogs", 2)] * 6
        ],
        "yaml": {
            "output_type": "multiple_choice",
            "doc_to_text": "what is {{q}}:",
            "doc_to_target": "a",
            "doc_to_choice": "options",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
    },
    "rolling": {
        "rows": [{"q": "the cat sat on the mat. " * n} for n in (1, 3, 7)],  # the last is longer than max_length
        "yaml": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{q}}",
            "metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
    },
    "writing": {
        "rows": [{"q": q, "a": "a"} for q in ("cat", "dogs and cats", "x" * 150, "why")],
        "yaml": {
            "output_type": "generate_until",
            "doc_to_text": "say {{q}}:",
            "doc_to_target": "{{a}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 20},
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
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"lm_eval.*pip install 'layerskip-jax\[lm_eval\]'"):
        harness.main([trained_run, "--tasks", "choices"])


class Letters(Tokenizer):
    """A character tokenizer."""

    bos_id, eos_id, vocab_size = 1, 2, 3 + len(CHARACTERS)
    files: ClassVar[dict[str, bytes]] = {}
    _spelling: ClassVar[list[bytes]] = [b"", b"", b"", *(c.encode() for c in CHARACTERS)]

    def encode(self, text):
        return [3 + CHARACTERS.index(c) for c in text]


@pytest.fixture(scope="module")
def peer():
    """The same random weights in our model and in lm-eval's hf class, with the same tokenizer."""
    pytest.importorskip("lm_eval", reason="pip install -e '.[lm_eval,benchmarks]'")
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[lm_eval,benchmarks]'")
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer as Letterer
    from tokenizers import decoders, models, pre_tokenizers, processors

    from benchmarks.peers import as_llama

    model = tiny_model(6, vocab_size=Letters.vocab_size, num_layers=3, dim=32)
    llama = as_llama(model, Letters.bos_id, Letters.eos_id)

    specials = ["<unk>", "<s>", "</s>"]
    letters = Letterer(models.WordLevel({t: i for i, t in enumerate([*specials, *CHARACTERS])}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    letters.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = dict(zip(("unk_token", "bos_token", "eos_token"), specials, strict=True))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="</s>", **named)
    assert tokenizer.encode("a cat.") == [1, *Letters().encode("a cat.")]
    return model, HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=2, max_length=MAX_LENGTH, device="cpu")


@pytest.mark.filterwarnings("default")  # warnings of third-party code
@pytest.mark.parametrize("exit_layer", [0, 2])
def test_three_tasks_give_the_same_numbers_as_the_hf_class(peer, exit_layer, tmp_path, monkeypatch):
    import yaml
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    from layerskip_jax.evaluation.lm_eval_model import LayerSkipLM

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, task in TASKS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task["rows"]))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / f"{name}.jsonl")}}}
        (tmp_path / f"{name}.yaml").write_text(
            yaml.safe_dump({"task": name, "test_split": "test", **source, **task["yaml"]})
        )
    model, theirs = peer
    kept = theirs.model.model.layers
    if exit_layer:  # truncate their model
        theirs.model.model.layers = kept[:exit_layer]
        theirs.model.config.num_hidden_layers = exit_layer
    ours = LayerSkipLM(
        model.unstacked(),
        Letters(),
        DecodeConfig(exit_layer=1, draft_length=3),
        max_length=MAX_LENGTH,
        exit_layer=exit_layer,
        batch_size=2,
    )
    reports = [
        evaluator.simple_evaluate(
            lm, tasks=list(TASKS), task_manager=TaskManager(include_path=str(tmp_path)), bootstrap_iters=0
        )
        for lm in (ours, theirs)
    ]
    theirs.model.model.layers, theirs.model.config.num_hidden_layers = kept, len(kept)
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
            if task == "writing":
                assert mine["resps"] == other["resps"]
            else:
                mine, other = (np.array(jax.tree.leaves(s["filtered_resps"]), float) for s in (mine, other))
                np.testing.assert_allclose(mine, other, atol=1e-3)
