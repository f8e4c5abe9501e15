"""The command line: every command has help, and every mistake is one line on stderr with exit status 2."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from layerskip_jax import __version__
from layerskip_jax.commands import layerskip

ROOT = Path(__file__).parent.parent
ARGUMENTS = {
    "train": [],
    "decode": ["RUN"],
    "data": ["show"],
    "evaluate": ["RUN"],
    "tasks": ["RUN", "--task", "xsum"],
    "lm-eval": ["RUN", "--tasks", "arc_easy"],
    "search": ["FOLDER"],
    "sweep": ["RUN"],
    "plots": ["RUN"],
    "report": ["RUN"],
    "export": ["RUN", "FOLDER"],
    "publish": ["FOLDER", "me/model"],
}
"""The shortest valid command lines."""


@pytest.fixture
def run(monkeypatch, capsys):
    """Run ``layerskip`` in this process; return its exit status, stdout and stderr."""

    def command(*argv):
        monkeypatch.setattr(sys, "argv", ["layerskip", *argv])
        status = 0
        try:
            layerskip.run()
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    return command


def failed(result):
    """Return the error line of a result with status 2."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").strip()


def test_every_command_is_tested():
    assert ARGUMENTS.keys() == layerskip.COMMANDS.keys()


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_usage_lists_the_commands(run, argv):
    status, out, err = run(*argv)
    assert (status, err) == (0, "")
    assert out.startswith("usage: layerskip COMMAND")
    assert all(f"\n  {name} " in out for name in layerskip.COMMANDS)


def test_version(run):
    assert run("--version") == (0, f"layerskip_jax {__version__}\n", "")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_help_names_the_program_and_its_positional_arguments(run, name):
    status, out, err = run(name, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: layerskip {name} ")
    usage = " ".join(out.split("\n\n")[0].split())
    assert ("RUN" in ARGUMENTS[name]) == usage.endswith(("RUN", "[RUN]", "RUN FOLDER", "RUN [RUN ...]"))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_unknown_option(run, name):
    assert failed(run(name, *ARGUMENTS[name], "--zzz")) == "unknown setting --zzz (--help lists all)"


@pytest.mark.parametrize("name", [name for name, words in ARGUMENTS.items() if words])
def test_a_missing_argument(run, name):
    assert failed(run(name))


@pytest.mark.parametrize("name", [name for name, words in ARGUMENTS.items() if "RUN" in words])
def test_a_missing_run(run, name, tmp_path):
    words = [str(tmp_path / "none") if word == "RUN" else word for word in ARGUMENTS[name]]
    more = ["--prompt", "x"] if name in ("decode", "sweep") else []
    assert f"no checkpoint at {tmp_path / 'none'}" in failed(run(name, *words, *more))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'"),
        (["lm_eval"], "unknown command 'lm_eval'; did you mean 'lm-eval'"),
        (["data", "tokeniser"], "unknown command 'tokeniser'; did you mean 'tokenizer'"),
        (["data", "shw", "--overwrite"], "unknown command 'shw'; did you mean 'show'"),
        (["data", "pretokenize"], "pretokenize needs --out FOLDER"),
        (["train", "--config", ""], "no config file"),
        (["evaluate", "RUN", "--batches", "0"], "--batches: must be at least 1, not 0"),
        (["sweep", "RUN", "--try_lengths", "2", "64"], "--try_lengths: must be at most 63, not 64"),
        (["decode", "RUN", "--held_out", "0"], "--held_out: must be at least 1, not 0"),
        (["report", "RUN", "--held_out", "many"], "--held_out: must be a whole number, not 'many'"),
        (["export", "RUN", "FOLDER", "--dtype", "float23"], "did you mean 'float32'"),
        (["sweep", "RUN", "--temperatur", "1"], "unknown setting --temperatur; did you mean '--temperature'"),
        (["plots", "RUN", "STRAY"], "unknown setting STRAY"),
        (
            ["decode", "A", "--checkpoint", "B", "--prompt", "x"],
            "give one run, as RUN or as --checkpoint RUN, not A and B",
        ),
        (["decode", "--prompt", "x"], "give one run, as RUN or as --checkpoint RUN"),
    ],
)
def test_mistakes(run, argv, message):
    assert message in failed(run(*argv))


@pytest.mark.parametrize("name", ["decode", "evaluate", "tasks", "lm-eval", "sweep"])
def test_every_number_is_checked_under_its_own_name(run, trained_run, tmp_path, name):
    """Options are found in --help, so new ones are tested too."""
    (tmp_path / "xsum.jsonl").write_text('{"document": "x", "summary": "y"}')
    more = {"decode": ["--prompt", "x"], "sweep": ["--prompt", "x"], "tasks": ["--task", f"xsum={tmp_path}/xsum.jsonl"]}
    words = [trained_run, *more.get(name, ARGUMENTS[name][1:])]
    options = re.findall(r"^  --(\S+)(?:,.*)? \[?(INT|FLOAT|N|E|D)\b", run(name, "--help")[1], re.MULTILINE)
    assert len(options) >= (2 if name == "evaluate" else 4)  # the pattern finds options
    for option, kind in options:
        wrong = ["many", "nan", "-1", *([] if kind == "FLOAT" or option.startswith("data.") else [str(10**20)])]
        for value in wrong if option != "seed" else wrong[:2]:
            message = failed(run(name, *words, f"--{option}={value}"))
            assert re.match(rf"(--|decode\.)?{option}\b", message), (option, value, message)


@pytest.mark.parametrize("argv", [["RUN", "--prompt", "x"], ["--prompt", "x", "RUN"], ["--checkpoint", "RUN"]])
def test_decode_takes_the_run_in_any_place(run, argv):
    assert "no checkpoint at RUN" in failed(run("decode", *argv))


@pytest.mark.parametrize("program", [["-m", "layerskip_jax", "train"], [str(ROOT / "train.py")]])
def test_the_program_name_of_a_process(program):
    done = subprocess.run(
        [sys.executable, *program, "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"JAX_PLATFORMS": "cpu", "PATH": ""},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: layerskip train ")


@pytest.mark.parametrize("command", ["train", "decode", "evaluate"])
def test_help_does_not_import_jax(command):
    code = f"""
import sys
from layerskip_jax.commands.layerskip import main
try:
    main(["{command}", "--help"])
except SystemExit:
    print("jax" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith(f"usage: layerskip {command} ")
    assert done.stdout.endswith("\nFalse\n")
