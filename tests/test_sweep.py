"""The sweep: measurements, recommendation, storage, and the fitted overhead."""

import json
import math
from pathlib import Path

import pytest
from test_decoding_text import decoded, run_folder

from layerskip_jax.checkpoint.run_folder import find_checkpoint
from layerskip_jax.checkpoint.swept import SWEPT, swept_settings
from layerskip_jax.commands import decode, sweep
from layerskip_jax.config import ModelConfig
from layerskip_jax.decoding.cost import Overhead, round_cost
from layerskip_jax.errors import UserError

__all__ = ["run_folder"]  # a fixture


def test_sweep_measures_recommends_and_stores(run_folder, capsys):
    request = [run_folder, "--prompt", "def x", "--max_new_tokens", "6", "--repeats", "1"]
    before = decoded(capsys, "--checkpoint", run_folder, "--prompt", "def x", "--json").splitlines()[0]
    sweep.main([*request, "--try_exits", "1", "3", "--try_lengths", "2", "--json"])
    *rows, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert [row["settings"]["mode"] for row in rows[:3]] == ["autoregressive", "self_speculative", "self_speculative"]
    assert [(row["settings"]["exit_layer"], row["settings"]["draft_length"]) for row in rows[1:3]] == [(1, 2), (3, 2)]
    assert [row["settings"]["policy"] for row in rows[3:]] == ["fixed", "adaptive", "fixed", "fixed", "fixed"]
    assert [row["settings"]["lookup_length"] for row in rows[-5:]] == [0, 0, 0, 2, 0]
    assert [row["settings"]["choices"] for row in rows[-5:]] == [1, 1, 1, 1, 4]
    assert all(row["identical"] for row in rows)
    assert (Path(run_folder) / "plots" / "sweep.png").stat().st_size > 10_000

    stored = swept_settings(run_folder, set())
    assert stored == last["recommended"]
    assert decoded(capsys, "--checkpoint", run_folder, "--prompt", "def x", "--json").splitlines()[0] == before
    assert "exit_layer" not in swept_settings(run_folder, {"draft_length"})
    (find_checkpoint(run_folder).parent / SWEPT).write_text("{}")
    with pytest.raises(UserError, match=r"decode\.json is not what .*layerskip.* sweep writes"):
        decode.main(["--checkpoint", run_folder, "--prompt", "a"])
    (find_checkpoint(run_folder).parent / SWEPT).unlink()


def test_sweep_recommends_lossless_settings_and_reports_that_it_cannot_store(run_folder, capsys, monkeypatch):
    def measured(mode, speed, identical):
        return sweep.Measurement(
            {"mode": mode, "policy": "fixed", "exit_layer": 1, "draft_length": 2, "lookup_length": 0,
             "choices": 1},
            speed, speed, math.nan, 1.0, 1.0, 1.0, identical, 1.0,
        )  # fmt: skip

    finals = [measured("autoregressive", 1.0, True), measured("self_speculative", 2.0, False)]
    monkeypatch.setattr(sweep, "sweep", lambda *_: (finals, finals, Overhead()))
    request = [run_folder, "--prompt", "def x", "--try_exits", "1", "--try_lengths", "2"]
    before = sorted(Path(run_folder).rglob("*"))
    sweep.main([*request, "--no_store", "--json"])
    *rows, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert last["recommended"]["mode"] == "autoregressive"
    assert not any("acceptance" in row for row in rows)
    sweep.main([*request, "--no_store"])
    assert "nothing drafted" in capsys.readouterr().out
    assert sorted(Path(run_folder).rglob("*")) == before

    def read_only(*_):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(sweep, "plot", read_only)
    with pytest.raises(UserError, match="cannot be stored: read-only file system; --no_store stores nothing"):
        sweep.main(request)


def test_sweep_errors(run_folder):
    for argv, message in [
        (["--prompt", "a", "--try_exits", "5"], r"--try_exits must be in 1\.\.4"),
        (["--prompt", "a", "--try_lengths", "0"], "--try_lengths: must be at least 1, not 0"),
        (["--prompt", "a", "--try_lengths", "64"], "--try_lengths: must be at most 63"),
        (["--prompt", "a", "--held_out", "2"], "give the prompts in one way"),
    ]:
        with pytest.raises(UserError, match=message):
            sweep.main([run_folder, *argv])


@pytest.mark.parametrize("overhead", [Overhead(0.5, 0.07), Overhead(0.0, 0.07), Overhead(0.5, 0.0), Overhead()])
def test_the_overhead_of_speculation_is_fitted(overhead):
    model = ModelConfig(num_layers=8, vocab_size=1)
    rounds = [(exit_layer, d) for exit_layer in (1, 2, 4) for d in (2, 4, 8)]
    measurements = [
        sweep.Measurement({"exit_layer": e}, 0, 0, 0, 0, d, round_cost(model, e, d, overhead), True, 0)
        for e, d in rounds
    ]
    assert sweep.fit_overhead(model, measurements) == pytest.approx(overhead, abs=1e-9)


def test_the_overhead_is_the_best_fit_that_is_not_negative():
    """A fit with a negative cost per draft would be best; without it, all of the overhead is a cost per round."""
    model = ModelConfig(num_layers=8, vocab_size=1)
    measured = [
        sweep.Measurement({"exit_layer": 2}, 0, 0, 0, 0, d, round_cost(model, 2, d) + more, True, 0)
        for d, more in ((2, 0.48), (4, 0.46), (6, 0.44), (8, 0.42))
    ]
    assert sweep.fit_overhead(model, measured) == pytest.approx((0.45, 0))


def test_an_overhead_is_never_negative():
    model = ModelConfig(num_layers=8, vocab_size=1)
    fast = [
        sweep.Measurement({"exit_layer": 2}, 0, 0, 0, 0, d, cost * round_cost(model, 2, d), True, 0)
        for d, cost in ((2, 0.9), (4, 1.0), (8, 0.9))
    ]
    assert min(sweep.fit_overhead(model, fast)) >= 0
