"""`benchmarks.accelerator` with tiny shapes: measured parts, stored results, skipped parts, errors."""

import json
import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import pytest

from benchmarks import accelerator, accelerator_training
from benchmarks.accelerator import PARTS, Results, main, measure_all
from benchmarks.accelerator_decoding import ACCEPTANCES
from benchmarks.accelerator_page import SECTIONS
from benchmarks.accelerator_sizes import FULL, TINY, Bench, ImpossibleHereError
from benchmarks.accelerator_training import RECIPES, least_bytes, training
from layerskip_jax.errors import UserError, run_command

ROOT = Path(__file__).parent.parent
IMPOSSIBLE = {"attention/cudnn", "attention/splash"}  # these backends need a GPU and a TPU
DEVICE = {
    "kind": "Chip 9", "platform": "cpu", "count": 1, "tiny": True, "memory_bytes": None, "runtime": "none",
    "host": "here", "python": "3", "versions": {"jax": "1"}, "commit": "abc", "changed": False, "environment": {},
    "date": "today", "command": "python -m benchmarks.accelerator",
}  # fmt: skip


def run_tiny(folder):
    """Run the command on one device. ``--commit`` makes the results independent of the state of the checkout."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
    command = [sys.executable, "-m", "benchmarks.accelerator", "--tiny", "--out", str(folder), "--commit", "test"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return the folder of a tiny run, its results, and its output."""
    folder = tmp_path_factory.mktemp("accelerator")
    done = run_tiny(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, json.loads((folder / "cpu-tiny.json").read_text()), done.stdout


def test_every_part_is_measured(tiny):
    _, results, _ = tiny
    assert list(results["parts"]) == list(PARTS)
    assert {name for name, part in results["parts"].items() if "measured" not in part} == IMPOSSIBLE
    device = results["device"]
    assert (device["kind"], device["count"], device["commit"], device["tiny"]) == ("cpu", 1, "test", True)
    assert {"jax", "jaxlib", "flax"} <= set(device["versions"])
    assert device["command"] == "python -m benchmarks.accelerator --minutes 8 --tiny"


def test_rates_attention_and_steps_are_sane(tiny):
    parts = {name: part.get("measured") for name, part in tiny[1]["parts"].items()}
    assert all(parts["rates"][name] > 0 for name in ("flops", "copy_bandwidth", "read_bandwidth", "bandwidth"))
    attention = parts["attention/xla"]
    assert 0 < attention["output_difference"] < 0.02
    assert 0 < attention["gradient_difference"] < 0.02
    assert attention["documents"] > 1
    step = parts["training"]
    assert list(step["recipes"]) == list(RECIPES)
    for one in step["recipes"].values():
        assert one["tokens_per_second"] * one["seconds"] == pytest.approx(step["batch_size"] * step["length"])
        assert one["mfu"] is None  # no data sheet of this CPU
        assert one["mfu_of_measured"] > 0
        assert math.isfinite(one["objective"])
        assert one["of_plain"] > 0
    assert step["recipes"]["plain"]["of_plain"] == 1
    assert step["out_of_memory"] == []


@pytest.mark.parametrize("rows", [1, 8])
def test_forced_acceptance_is_exact_and_the_text_is_the_full_models(tiny, rows):
    one = tiny[1]["parts"][f"decoding/{rows}"]["measured"]
    assert one["right"]
    assert one["plain_tokens_per_second"] > 0
    assert [way["forced"] for way in one["speculative"]] == list(ACCEPTANCES)
    for way in one["speculative"]:
        assert way["identical"]
        assert way["same_tokens"] == 1
        rounds = one["new_tokens"] / way["tokens_per_round"]
        assert 0 <= way["forced"] - way["acceptance"] < 1 / (rounds * one["draft_length"]) + 1e-3
        assert way["speedup"] > 0
        assert way["predicted"] > 0


def test_the_trained_model_has_exits_and_speculates_without_loss(tiny):
    run = tiny[1]["parts"]["trained"]["measured"]
    assert run["steps"] > 0
    assert len(run["held_out_loss_by_exit"]) == TINY.trained.num_layers
    assert all(0 < loss < 10 for loss in run["held_out_loss_by_exit"])
    assert all(0 <= share <= 1 for share in run["agreement_by_exit"])
    assert run["agreement_by_exit"][-1] == 1
    assert [(way["exit_layer"], way["draft_length"]) for way in run["speculative"]] == list(TINY.speculation)
    assert all(way["identical"] for way in run["speculative"])


def test_the_page_has_a_table_for_every_section(tiny):
    page = (tiny[0] / "cpu-tiny.md").read_text()
    assert page.startswith("---\norphan: true\n---\n\n# 1 x cpu\n")
    blocks = page.split("\n## ")
    assert [block.split("\n")[0] for block in blocks[1:]] == ["device", *SECTIONS]
    assert all("| --- |" in block for block in blocks[1:])
    assert "- attention/cudnn, skipped: model.attention cudnn needs a GPU, not cpu" in page


def test_a_second_call_measures_only_missing_parts(tiny):
    folder, results, first = tiny
    done = run_tiny(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((folder / "cpu-tiny.json").read_text()) == results
    begun = {line.split(":")[0] for line in done.stdout.splitlines() if line.endswith(" s left")}
    assert begun == IMPOSSIBLE  # tried again, at no cost
    assert {line.split(":")[0] for line in first.splitlines() if line.endswith(" s left")} == set(PARTS)


def test_a_failed_part_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    calls = []

    def fail(bench):
        raise ValueError("no such\nshape")

    parts = {name: lambda bench, name=name: calls.append(name) or {} for name in ("attention/xla", "trained")}
    monkeypatch.setattr(accelerator, "PARTS", {"rates": fail, "training": fail} | parts)
    monkeypatch.setattr(accelerator, "page", lambda results: "")
    bench = Bench(TINY, time.monotonic() + 60)
    results = Results(tmp_path, DEVICE)
    measure_all(bench, results)
    assert calls == list(parts)
    kept = json.loads((tmp_path / "chip-9-tiny.json").read_text())["parts"]
    assert {name: part["error"] for name, part in kept.items() if "error" in part} == {
        "rates": "ValueError: no such shape",
        "training": "ValueError: no such shape",
    }
    assert all("measured" in kept[name] for name in parts)
    assert "training: error: ValueError: no such shape\n" in capsys.readouterr().out


def test_the_next_call_retries_failed_parts_and_another_commit_starts_over(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(accelerator, "page", lambda results: "")
    monkeypatch.setattr(accelerator, "PARTS", {"rates": lambda bench: {"flops": 1.0 / len(calls)}})
    measure_all(Bench(TINY, time.monotonic() + 60), Results(tmp_path, DEVICE))  # fails: division by zero
    calls.append(1)
    for _ in range(2):
        bench = Bench(TINY, time.monotonic() + 60)
        measure_all(bench, Results(tmp_path, DEVICE))
        assert bench.rate("flops") == 1.0
        calls.append(1)
    results = Results(tmp_path, DEVICE | {"commit": "def"})
    assert results.measured("rates") is None


def test_only_a_part_that_is_impossible_here_is_skipped(tmp_path, monkeypatch):
    def raise_error(error, bench):
        raise error

    outcomes = {
        "rates": ImpossibleHereError("needs a TPU"),
        "training": UserError("bad setting"),
        "trained": OSError("x"),
    }
    monkeypatch.setattr(accelerator, "PARTS", {name: partial(raise_error, error) for name, error in outcomes.items()})
    monkeypatch.setattr(accelerator, "describe", lambda options: DEVICE)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # restored after the test
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # `main` would change the settings of this process
    with pytest.raises(SystemExit) as ended:
        main(["--tiny", "--out", str(tmp_path)])
    assert ended.value.code == 1
    kept = json.loads((tmp_path / "chip-9-tiny.json").read_text())["parts"]
    assert kept["rates"] == {"skipped": "needs a TPU"}
    assert kept["training"]["error"] == "UserError: bad setting"
    assert kept["trained"]["error"] == "OSError: x"


def test_uncommitted_changes_add_only_to_results_of_the_same_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "page", lambda results: "")
    changed = DEVICE | {"changed": True, "changes": "123"}
    Results(tmp_path, changed).keep("rates", {"measured": {"flops": 1.0}, "seconds": 1.0})
    assert Results(tmp_path, changed).measured("rates") == {"flops": 1.0}
    with pytest.raises(UserError, match="this tree has uncommitted changes: commit them, or give another --out"):
        Results(tmp_path, changed | {"changes": "456"})
    clean = Results(tmp_path, DEVICE)  # replaces them
    assert clean.measured("rates") is None
    clean.keep("rates", {"measured": {"flops": 2.0}, "seconds": 1.0})
    with pytest.raises(UserError, match="this tree has uncommitted changes"):
        Results(tmp_path, changed)


def test_parts_without_enough_time_left_are_skipped(tmp_path):
    results = Results(tmp_path, DEVICE)
    measure_all(Bench(TINY, time.monotonic()), results)
    kept = json.loads(results.file.read_text())["parts"]
    assert kept["training"] == {"skipped": f"needs about {TINY.needs['training']:.0f} s, and 0 s were left"}
    assert all(set(part) == {"skipped"} for part in kept.values())
    page = results.file.with_suffix(".md").read_text()
    assert all(f"- {name}, skipped: needs about" in page for name in PARTS)


@pytest.mark.parametrize(
    ("gib", "chosen"), [(8, "0.4B full 2"), (16, "0.8B full 2"), (32, "1.5B dots 1"), (80, "1.5B dots 8")]
)
def test_the_first_config_tried_can_fit(monkeypatch, gib, chosen):
    tried = []
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    monkeypatch.setattr(accelerator_training, "memory_of", lambda device: 0.92 * gib * 2**30)
    monkeypatch.setattr(accelerator_training, "time_recipes", lambda config, bench: tried.append(config) or {})
    name = training(Bench(FULL, time.monotonic() + 60))["model"]
    assert f"{name} {tried[0].train.remat} {tried[0].train.batch_size}" == chosen
    assert least_bytes(tried[0], 1) < 0.85 * 0.92 * gib * 2**30


def test_a_smaller_config_follows_one_that_does_not_fit(monkeypatch):
    def timed(config, bench):
        if config.train.remat == "dots":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte")
        return {"batch_size": config.train.batch_size}

    monkeypatch.setattr(accelerator_training, "time_recipes", timed)
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    step = training(Bench(FULL, time.monotonic() + 60))
    assert (step["model"], step["batch_size"]) == ("1.5B", FULL.rows[0])
    assert step["out_of_memory"] == [f"1.5B, remat dots, {rows} sequences" for rows in FULL.rows]
    with pytest.raises(TimeoutError, match="no time is left to try smaller models; out of memory: "):
        training(Bench(FULL, time.monotonic() - 1))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "JAX found no GPU or TPU to measure: add --tiny to test this command on a CPU"),
        (["--minutes", "0"], "--minutes must be positive, got 0"),
        (["--minutes", "-1"], "--minutes must be positive, got -1"),
        (["--minutes", "soon"], "--minutes: must be a finite number, not 'soon'"),
        (["--tiny", "--out", "FILE/below"], "--out FILE/below is not writable: "),
        (["--tinny"], "unknown setting --tinny; did you mean '--tiny'?"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # restored after the test
    Path("FILE").touch()
    with pytest.raises(SystemExit) as ended:
        run_command(partial(main, arguments))
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert line in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_results_file_is_named(tmp_path, text):
    (tmp_path / "chip-9-tiny.json").write_text(text)
    with pytest.raises(UserError, match=r"chip-9-tiny\.json is not a results file: .*; delete it"):
        Results(tmp_path, DEVICE)
