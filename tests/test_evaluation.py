"""Exit quality against a plain computation; tasks and their scores; the sandbox of generated code."""

import contextlib
import dataclasses
import json
import re
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bucket import sign
from corpora import write_corpus
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_model

from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.checkpoint.run_folder import find_checkpoint
from layerskip_jax.commands import decode, sweep
from layerskip_jax.commands import evaluate as command
from layerskip_jax.commands import tasks as generation
from layerskip_jax.config import Config, DecodeConfig, TrainConfig
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.errors import UserError
from layerskip_jax.evaluation import exits
from layerskip_jax.evaluation.examples import TaskExamples, read_file
from layerskip_jax.evaluation.exits import checkpoint_quality, exit_predictions, token_scores, with_small_batches
from layerskip_jax.evaluation.sandbox import runs_to_its_end
from layerskip_jax.evaluation.scores import exact_match, passes_tests, rouge_2, rouge_l
from layerskip_jax.evaluation.tasks import TASKS, Task

SOLVED = {
    "task_id": "0",
    "prompt": "def double(x):\n",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(f):\n    assert f(3) == 6\n",
    "entry_point": "double",
}


# The exits


def test_predictions_and_scores_are_those_of_the_model_cut_there():
    """The oracle: all logits of a model of E layers, for every E."""
    model = tiny_model(5, num_layers=2)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 70)), jnp.int32)
    targets, segments = jnp.roll(tokens, -1, axis=1), jnp.ones_like(tokens)
    next_LBT = exit_predictions(model, tokens, segments)
    forward = jax.jit(lambda model: model(tokens))
    for exit_layer in (1, 2):
        logits = forward(model.unstacked().first_layers(exit_layer))
        np.testing.assert_array_equal(next_LBT[exit_layer - 1], jnp.argmax(logits, -1))
        log_p = np.take_along_axis(
            np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)), targets[..., None], -1
        )
        scores, greedy = token_scores(model.unstacked(), tokens, targets, exit_layer)
        np.testing.assert_allclose(scores, log_p[..., 0], atol=1e-4)
        np.testing.assert_array_equal(greedy, jnp.argmax(logits, -1) == targets)


def test_quality_on_other_text(trained_run, tmp_path, capsys):
    own = checkpoint_quality(trained_run, 2)
    assert own.agreement_L[-1] == 1
    assert ((own.agreement_L >= 0) & (own.agreement_L <= 1)).all()
    write_corpus(tmp_path / "other", documents=6, seed=9)
    command.main([trained_run, "--batches", "2", "--json", "--data.path", str(tmp_path / "other")])
    other = json.loads(capsys.readouterr().out)
    assert other["perplexity_by_exit"] == pytest.approx(np.exp(other["held_out_loss_by_exit"]))
    assert other["held_out_loss_by_exit"] != own.loss_L.tolist()
    with pytest.raises(UserError, match="no corpus at"):
        command.main([trained_run, "--data.path", str(tmp_path / "nowhere")])
    same = checkpoint_quality(trained_run, 2, {"source": "text"})  # as the run's own
    np.testing.assert_array_equal(same.loss_L, own.loss_L)
    missing = {"source": "python_stdlib", "data_dir": str(tmp_path / "nowhere")}
    with pytest.raises(UserError, match="is not prepared in"):  # the path of the run's text is not its place
        checkpoint_quality(trained_run, 2, missing)
    with pytest.raises(UserError, match=r"source text does not read data.name lm1b: set --data.name ''"):
        checkpoint_quality(trained_run, 2, {"name": "lm1b"})


def test_a_checkpoint_is_evaluated_on_any_number_of_devices(trained_run, tmp_path):
    """Evaluation neither drops nor accumulates, so the constraints of these settings on the devices do not apply."""
    run = shutil.copytree(trained_run, tmp_path / "run")
    step = Path(str(find_checkpoint(str(run))))
    config = json.loads((step / "config" / "metadata").read_text())
    config["layer_dropout"] |= {"p_max": 0.1, "form": "skipping", "row_groups": 2}
    config["train"] |= {"batch_size": 4, "accumulate": 2}
    (step / "config" / "metadata").write_text(json.dumps(config))
    sign(step)
    own = checkpoint_quality(str(run), 2)  # on 4 of the 8 devices
    assert np.isfinite(own.loss_L).all()


@given(rows=st.integers(1, 200), batches=st.integers(1, 9), devices=st.sampled_from([1, 2, 8]))
def test_small_batches_have_the_same_sequences(rows, batches, devices):
    config = Config(train=TrainConfig(batch_size=rows * devices, evaluate_batches=batches))
    small = with_small_batches(config, devices).train
    assert small.batch_size * small.evaluate_batches == rows * devices * batches
    assert small.batch_size % devices == 0
    assert small.batch_size <= 8 * devices


def test_quality_does_not_depend_on_the_rows_at_once(trained_run, monkeypatch):
    """On one device, the 8 sequences of a batch fit at once, or become four batches."""
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    whole = checkpoint_quality(trained_run, 2)
    monkeypatch.setattr(exits, "ROWS_AT_ONCE", 2)
    parts = checkpoint_quality(trained_run, 2)
    np.testing.assert_allclose(parts.loss_L, whole.loss_L, rtol=1e-6)
    np.testing.assert_allclose(parts.agreement_L, whole.agreement_L, rtol=1e-6)


def test_a_kernel_of_other_chips_does_not_prevent_an_evaluation(trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    step = Path(str(find_checkpoint(str(run))))
    config = json.loads((step / "config" / "metadata").read_text())
    config["model"]["attention"] = "splash"
    (step / "config" / "metadata").write_text(json.dumps(config))
    sign(step)
    np.testing.assert_array_equal(checkpoint_quality(str(run), 1).loss_L, checkpoint_quality(trained_run, 1).loss_L)


def test_another_sequence_length_needs_no_other_chunk(trained_run):
    assert np.isfinite(checkpoint_quality(trained_run, 1, {"sequence_length": 12}).loss_L).all()


def test_agreement_counts_unmasked_tokens(trained_run):
    model, config, tokenizer = load_model(trained_run)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(tokenizer)))
    from layerskip_jax.data.pipeline import local_batches
    from layerskip_jax.sharding import make_mesh

    (batch, *_) = local_batches(config, "validation", make_mesh(config), in_order=True)
    next_LBT = np.asarray(exit_predictions(model, batch["inputs_BT"], batch["segments_BT"]))
    counted = batch["mask_BT"] > 0
    expected = [(layer[counted] == next_LBT[-1][counted]).mean() for layer in next_LBT]
    np.testing.assert_allclose(checkpoint_quality(trained_run, 1).agreement_L, expected, rtol=1e-6)


# Prompts and scores


@given(length=st.integers(1, 60), shots=st.integers(0, 3), size=st.integers(0, 200))
def test_prompts_fit_where_they_can(length, shots, size):
    task = Task("Text: {text}\nSummary:", " {summary}", {}, shots=shots, shortens="text")
    example = {"text": "x" * size, "summary": "y"}
    shown = [{"text": "a" * 9, "summary": "b"}] * shots
    prompt, cut = task.prompt_for(example, shown, lambda text: len(text) <= length)
    whole = "Text: aaaaaaaaa\nSummary: b\n\n" * shots + f"Text: {'x' * size}\nSummary:"
    assert cut == (prompt != whole)
    assert cut == (len(whole) > length and bool(size or shots))
    assert prompt.endswith("\nSummary:")
    smallest = len("Text: \nSummary:")
    assert len(prompt) <= max(length, smallest)
    if smallest < length < smallest + size:
        assert len(prompt) == length  # cuts no more than necessary
    assert task.fields == ["summary", "text"]


def test_scores_by_hand():
    assert rouge_2({}, "the cat sat", "the cat sat down") == pytest.approx(0.8)  # 2 of 2 pairs, 2 of 3
    assert rouge_l({}, "a b c d", "a c d") == pytest.approx(6 / 7)  # 3 of 4 words, 3 of 3
    assert rouge_2({}, "running cats", "runs cat") == 1  # stems
    assert exact_match({}, "[A  b ]", "[A b ]\n") == 1
    assert exact_match({}, "[A b ]", "[A c ]") == 0
    assert passes_tests(SOLVED, "", SOLVED["canonical_solution"]) == 1
    assert passes_tests(SOLVED, "", "    return x\n") == 0


@pytest.mark.parametrize(
    ("program", "ends"),
    [
        ("x = 1", True),
        ("raise ValueError", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
        ("while True: pass", False),
        ("x = 'x' * (1 << 31)", False),
        ("def f(:", False),
        ("import os; assert not os.listdir('.'); open('here', 'w').write('x')", True),
        ("open('large', 'w').write('x' * (1 << 21))", False),
        ("import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))", False),
        ("import os; assert 'CANARY' not in os.environ", True),
    ],
)
def test_generated_code_is_isolated(program, ends, monkeypatch):
    monkeypatch.setenv("CANARY", "1")
    assert runs_to_its_end(program, seconds=2) == ends


def test_processes_of_generated_code_end_with_it(tmp_path):
    started = tmp_path / "started"
    program = f"import os, time\nif os.fork() == 0:\n    time.sleep(1)\n    open({str(started)!r}, 'w')\n"
    assert runs_to_its_end(program, seconds=5)
    time.sleep(1.2)
    assert not started.exists()


def test_examples_from_every_file_format(tmp_path):
    rows = [{"domain": "weather", "utterance": 'is it "hot"', "semantic_parse": "[IN:GET_WEATHER ]"}] * 3
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.tsv").write_text("\n".join(["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]))
    (tmp_path / "a.csv").write_text(
        "domain,utterance,semantic_parse\n" + 'weather,"is it ""hot""",[IN:GET_WEATHER ]\n' * 3
    )
    for kind in ("jsonl", "tsv", "csv"):
        assert read_file(str(tmp_path / f"a.{kind}")) == rows
        assert read_file(str(tmp_path / f"a.{kind}"), limit=2) == rows[:2]
    (tmp_path / "bad.jsonl").write_text("{\n")
    (tmp_path / "none.csv").write_text("a,b\n")
    for name, message in [
        ("bad.jsonl", "bad.jsonl line 1 is not JSON"),
        ("none.csv", "has no examples"),
        ("nowhere.csv", "cannot read examples from"),
        ("a.txt", r"must be a \.jsonl, \.csv or \.tsv file"),
    ]:
        with pytest.raises(UserError, match=message):
            read_file(str(tmp_path / name))


# Whole tasks


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small files for the paper's tasks, with the fields of the real datasets."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {
        "cnn_dm": {"article": "the value of x is the index of y " * 9, "highlights": "x is y"},
        "xsum": {"document": "the value of x", "summary": "x"},
        "humaneval": SOLVED,
        "topv2": {"utterance": "is it hot", "semantic_parse": "[IN:GET_WEATHER is it hot ]"},
    }
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 3)
    return folder


def scored(capsys, *argv):
    generation.main([*argv, "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_task_of_the_paper(trained_run, files, capsys):
    tasks = [word for name in TASKS for word in ("--task", f"{name}={files / name}.jsonl")]
    request = [trained_run, *tasks, "--max_new_tokens", "6", "--batch_size", "2", "--ignore_eos"]
    results = scored(capsys, *request, "--run_code", "--answers")
    answers, totals = [r for r in results if "completion" in r], [r for r in results if "mode" in r]
    assert [r["task"] for r in totals] == list(TASKS)
    assert [set(r["scores"]) for r in totals] == [
        {"rouge2", "rougeL"},
        {"rouge2", "rougeL"},
        {"rouge2", "pass@1"},
        {"exact_match"},
    ]
    assert [r["examples"] for r in totals] == [2, 3, 3, 3]  # one of CNN/DM is the shot
    assert totals[0]["shortened"] == 2
    for result in totals:
        own = [a["scores"] for a in answers if a["task"] == result["task"]]
        for name, score in result["scores"].items():
            assert score == pytest.approx(np.mean([scores[name] for scores in own]))
        assert 0 <= result["acceptance"] <= 1
        assert result["tokens_per_second"] > 0


def test_lossless_modes_give_the_same_texts_and_early_exit_its_own(trained_run, files, capsys):
    def texts(*mode):
        request = [trained_run, "--task", f"topv2={files / 'topv2.jsonl'}", "--answers"]
        *answers, total = scored(capsys, *request, "--max_new_tokens", "8", "--limit", "1", "--ignore_eos", *mode)
        assert total["mode"] == mode[1]
        return [answer["completion"]["text"] for answer in answers], total.get("acceptance")

    plain, acceptance = texts("--mode", "autoregressive")
    assert texts("--mode", "self_speculative", "--exit_layer", "1")[0] == plain
    assert acceptance is None
    early, _ = texts("--mode", "early_exit", "--exit_layer", "1")
    model, _, tokenizer = load_model(trained_run)
    task = dataclasses.replace(TASKS["topv2"], max_new_tokens=8)
    settings = DecodeConfig(mode="autoregressive", ignore_eos=True)
    one_layer = model.unstacked().first_layers(1)
    examples = read_file(str(files / "topv2.jsonl"), 1)
    _, answered = generation.run_task(
        one_layer, load_tokenizer(str(tokenizer)), task, TaskExamples(examples, []), settings, prompt_tokens=100
    )
    assert [answer.completion.text for answer in answered] == early


def test_texts_longer_than_the_context_get_one_warning_with_both_lengths(trained_run, files, capsys, monkeypatch):
    _, config, tokenizer_path = load_model(trained_run)
    tokens = len(load_tokenizer(str(tokenizer_path)).encode_prompt("x = " * 20))
    context = config.data.sequence_length
    assert tokens > context

    def measure(*_):
        raise StopIteration  # the warning comes first

    def warnings_of(main, *argv):
        with contextlib.suppress(StopIteration):
            main([trained_run, *argv])
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING")]

    monkeypatch.setattr(sweep, "sweep", measure)
    new = ["--max_new_tokens", "2"]
    for main in (decode.main, sweep.main):
        (line,) = warnings_of(main, "--prompt", "x", "--prompt", "x = " * 20, *new)
        assert f"{tokens + 2} tokens, more than the model's context of {context}" in line
        assert warnings_of(main, "--prompt", "x", *new) == []
    (line,) = warnings_of(command.main, "--batches", "1", "--data.sequence_length", str(2 * context))
    assert f"data.sequence_length is {2 * context} tokens, more than the model's context of {context}" in line
    assert warnings_of(command.main, "--batches", "1") == []
    task = ["--task", f"xsum={files / 'xsum.jsonl'}", "--limit", "1", "--ignore_eos"]
    (line,) = warnings_of(generation.main, *task, "--prompt_tokens", "90", "--max_new_tokens", str(context))
    assert re.search(rf"xsum: the longest prompt and answer have \d+ tokens, more than .* context of {context}", line)
    assert warnings_of(generation.main, *task, "--max_new_tokens", "2") == []


def test_a_custom_task(trained_run, files, capsys, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from layerskip_jax.evaluation.tasks import Task\n\n"
        "def length(example, wanted, generated):\n    return float(len(generated) > len(wanted))\n\n"
        "def get_task():\n    return Task('{document}', '{summary}', {'longer': length}, max_new_tokens=5)\n"
    )
    generation.main([trained_run, "--task", f"{tmp_path}/mine.py={files}/xsum.jsonl", "--limit", "1"])
    assert "longer" in capsys.readouterr().out


def test_an_error_in_a_task_keeps_the_results_of_the_earlier_ones(trained_run, files, capsys, tmp_path):
    (tmp_path / "fails.py").write_text(
        "from layerskip_jax.errors import UserError\nfrom layerskip_jax.evaluation.tasks import Task\n\n"
        "def fail(example, wanted, generated):\n    raise UserError('no score')\n\n"
        "def get_task():\n    return Task('{document}', '{summary}', {'fails': fail}, max_new_tokens=5)\n"
    )
    tasks = [f"xsum={files}/xsum.jsonl", f"{tmp_path}/fails.py={files}/xsum.jsonl"]
    with pytest.raises(UserError, match="no score"):
        generation.main([trained_run, *(word for task in tasks for word in ("--task", task)), "--limit", "1"])
    assert "rouge2" in capsys.readouterr().out


def test_a_missing_run_is_found_before_another_is_measured(trained_run, tmp_path, capsys):
    with pytest.raises(UserError, match=f"no checkpoint at {tmp_path}/none"):
        command.main([trained_run, f"{tmp_path}/none", "--batches", "1", "--json"])
    assert capsys.readouterr().out == ""


def test_wrong_tasks(trained_run, files, tmp_path):
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "bad_template.py").write_text(
        "from layerskip_jax.evaluation.tasks import Task\n\ndef get_task():\n    return Task('{document', '', {})\n"
    )
    (tmp_path / "no_test.jsonl").write_text(json.dumps({k: v for k, v in SOLVED.items() if k != "test"}))
    for argv, message in [
        (["--task", "xsun"], "no task 'xsun'; did you mean 'xsum'"),
        (["--task", "topv2"], "give --task NAME=FILE, with the fields semantic_parse, utterance"),
        (
            ["--task", f"cnn_dm={files}/cnn_dm.jsonl", "--shots", "3"],
            "has 3 examples, but the task needs more than its 3 shots",
        ),
        (["--task", f"xsum={files}/cnn_dm.jsonl"], "line 1 has no field 'document'.*it has article, highlights"),
        (["--task", f"humaneval={tmp_path}/no_test.jsonl", "--run_code"], "line 1 has no field 'test'"),
        (["--task", f"{tmp_path}/empty.py={files}/xsum.jsonl"], r"has no get_task\(\) -> Task"),
        (["--task", f"{tmp_path}/none.py={files}/xsum.jsonl"], "no task file"),
        (["--task", f"xsum={files}/xsum.jsonl", "--limit", "0"], "--limit: must be at least 1"),
        (["--task", "xsum", "--data_dir", str(tmp_path)], "xsum"),
        (["--task", f"xsum={files}/xsum.jsonl", "--answers"], "add --json"),
        (["--task", f"xsum={files}/xsum.jsonl", "--run_code"], "none of these tasks has a score that runs code"),
        (["--task", f"{tmp_path}/bad_template.py={files}/xsum.jsonl"], "bad_template.py"),
    ]:
        with pytest.raises(UserError, match=message):
            generation.main([trained_run, *argv])
