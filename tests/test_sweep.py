"""The sweep: measurements, recommendation, storage, and the measured overhead."""

import json
import math
import shutil
from pathlib import Path

import pytest
from test_decoding_text import decoded, run_folder

from layerskip_jax.checkpoint.run_folder import find_checkpoint
from layerskip_jax.checkpoint.swept import SWEPT, store_swept, swept_settings
from layerskip_jax.commands import decode, sweep
from layerskip_jax.config import ModelConfig
from layerskip_jax.decoding.cost import round_cost
from layerskip_jax.errors import UserError

__all__ = ["run_folder"]  # a fixture


def test_sweep_measures_recommends_and_stores(run_folder, capsys):
    request = [run_folder, "--prompt", "def x", "--max_new_tokens", "6", "--repeats", "1"]
    before = decoded(capsys, "--checkpoint", run_folder, "--prompt", "def x", "--json").splitlines()[0]
    sweep.main([*request, "--try_exits", "1", "3", "--try_lengths", "2", "--json"])
    *rows, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert [row["settings"]["mode"] for row in rows[:3]] == ["autoregressive", "self_speculative", "self_speculative"]
    assert [(row["settings"]["exit_layer"], row["settings"]["draft_length"]) for row in rows[1:3]] == [(1, 2), (3, 2)]
    assert [row["settings"]["policy"] for row in rows[3:]] == [
        "fixed",
        "adaptive",
        "adaptive",
        "fixed",
        "fixed",
        "fixed",
    ]
    assert [row["settings"]["lookup_length"] for row in rows[-6:]] == [0, 0, 2, 0, 2, 0]
    assert [row["settings"]["choices"] for row in rows[-6:]] == [1, 1, 1, 1, 1, 4]
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
    monkeypatch.setattr(sweep, "sweep", lambda *_: (finals, finals, ()))
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

    monkeypatch.setattr(sweep, "save_picture", read_only)
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


def measurement(exit_layer, length, drafted, cost):
    settings = {"exit_layer": exit_layer, "draft_length": length}
    return sweep.Measurement(settings, 0, 0, 0, 0, drafted, cost, True, 0)


def test_the_overhead_of_speculation_is_measured():
    """Rounds with 2, 4 and 8 drafts cost 0.1, 0.5 and 0.6 more than their bytes, for every exit."""
    model = ModelConfig(num_layers=8, vocab_size=1)
    overhead = (0.05, 0.1, 0.3, 0.5, 0.525, 0.55, 0.575, 0.6)
    measured = [
        measurement(e, d, d, round_cost(model, e, d) + more)
        for e in (1, 4)
        for d, more in ((2, 0.1), (4, 0.5), (8, 0.6))
    ]
    assert sweep.measured_overhead(model, measured) == pytest.approx(overhead)
    # The mean of the exits counts. Rounds that an end of text cut short count with the drafts that they had.
    measured = [measurement(e, 2, 1.0, round_cost(model, e, 1.0) + more) for e, more in ((1, 0.1), (4, 0.3))]
    assert sweep.measured_overhead(model, measured) == pytest.approx((0.2, 0.2))


def test_the_overhead_is_measured_where_ends_of_text_cut_rounds_short():
    """A longer draft length can have fewer drafts on average; the costs follow the drafts."""
    model = ModelConfig(num_layers=8, vocab_size=1)
    rounds = [(2, 1.5, 0.1), (4, 3.0, 0.4), (6, 2.0, 0.2)]
    measured = [
        measurement(2, length, drafted, round_cost(model, 2, drafted) + more) for length, drafted, more in rounds
    ]
    expected = (0.0667, 0.2, 0.4, 0.4, 0.4, 0.4)  # rounded to 4 digits
    assert sweep.measured_overhead(model, measured) == pytest.approx(expected)


def test_an_overhead_never_falls_and_is_never_negative():
    model = ModelConfig(num_layers=8, vocab_size=1)
    fast = [measurement(2, d, d, round_cost(model, 2, d) + more) for d, more in ((1, -0.5), (2, 0.2), (3, 0.1))]
    assert sweep.measured_overhead(model, fast) == pytest.approx((0, 0.2, 0.2))


def test_settings_of_an_earlier_sweep_that_no_longer_exist_are_ignored(run_folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    store_swept(str(run), {"draft_length": 2, "start_cost": 0.5, "width_cost": 0.1}, {})
    assert swept_settings(str(run), set()) == {"draft_length": 2}
