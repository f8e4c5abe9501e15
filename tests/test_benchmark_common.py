"""benchmarks/common.py: the header, timing in turn, and the JSON file."""

import argparse
import doctest
import json

import pytest

from benchmarks import common, recipes


@pytest.mark.parametrize("module", [common, recipes], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0


def test_the_header_identifies_the_measurement(capsys):
    about = common.header("pytest")
    printed = capsys.readouterr().out
    assert printed.startswith("python ")
    assert about["versions"]["pytest"] == pytest.__version__
    for value in (about["command"], about["machine"], about["commit"][:12], f"jax {about['versions']['jax']}"):
        assert value in printed
    assert ("uncommitted" in printed) == bool(about["changes"])


def test_functions_are_timed_in_turn_after_a_warm_up():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = common.timed_in_turn(functions, turns=3)
    assert calls == ["a", "b"] * 4
    assert {name: len(seconds) for name, seconds in timings.seconds.items()} == {"a": 3, "b": 3}
    common.timed_in_turn(functions, turns=9, warm_up=0, out_of_time=lambda: True)
    assert calls[8:] == ["a", "b"] * 2  # stops after the second timed turn


def test_ratios_pair_the_times_of_a_turn():
    timings = common.Timings({"a": [2.0, 4.0, 60.0], "b": [1.0, 2.0, 20.0]})
    assert timings.median("a") == 4.0
    assert timings.ratio("a", baseline="b") == 2.0
    assert timings.ratio("b", baseline="b") == 1.0


def test_json_is_strict_and_optional(tmp_path):
    parser = argparse.ArgumentParser()
    common.add_json_option(parser)
    common.write_json(parser.parse_args([]).json, {}, [])
    file = parser.parse_args(["--json", str(tmp_path / "new" / "results.json")]).json
    common.write_json(file, {"commit": "abc"}, [float("nan"), 1.0])
    assert json.loads(file.read_text()) == {"about": {"commit": "abc"}, "results": [None, 1.0]}


def test_uncommitted_changes_have_a_digest_of_their_content(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    assert common.commit() == "no checkout"
    assert common.uncommitted_changes() == ""
    common.git("init", "--quiet")
    (tmp_path / "configs").mkdir()
    digests = set()
    for text in ("a", "b"):
        (tmp_path / "configs" / "new.py").write_text(text)
        digests.add(common.uncommitted_changes())
    assert len(digests) == 2
    assert "" not in digests
