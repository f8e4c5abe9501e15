"""The README and the pages of docs/ are run: their Python as it stands, their commands through the parsers."""

import importlib
import itertools
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from benchmarks import evidence
from layerskip_jax.command_line import add_settings, make_parser, parse_config
from layerskip_jax.commands import evaluate as evaluation
from layerskip_jax.commands import export, plots, report, sweep
from layerskip_jax.commands import lm_eval as harness
from layerskip_jax.commands import tasks as generation
from layerskip_jax.commands.prompts import add_prompt_options
from layerskip_jax.config import DecodeConfig
from layerskip_jax.errors import UserError

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {page.name: page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
# What is said to other programs; those of tpu/pod are run in test_tpu_files.py.
OTHERS = {"hf", "kill", "gcloud", "export", "ssh-add", "kubectl", "docker", "tpu/pod"}
PROGRAMS = {"make", "python", "pip", "pytest", "layerskip-train", "layerskip-decode", *OTHERS}
OF_CHECKPOINTS = {
    "layerskip_jax.commands.export": export.main,
    "layerskip_jax.commands.sweep": sweep.main,
    "layerskip_jax.evaluation": evaluation.main,
    "layerskip_jax.commands.tasks": generation.main,
    "layerskip_jax.commands.lm_eval": harness.main,
    "layerskip_jax.commands.plots": plots.main,
    "layerskip_jax.commands.report": report.main,
}


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "benchmarks").glob("[a-z]*.py")))
def test_a_benchmark_opens_or_says_what_to_install(name):
    try:
        importlib.import_module(f"benchmarks.{name}")
    except SystemExit as said:
        assert "pip install" in str(said)  # noqa: PT017


def blocks(language, text):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def indented(text):
    """Code blocks of four spaces, which begin after a blank line."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"(?:\A|\n)\n((?: {4}[^\n]*\n(?:\n(?= {4}))?)+)", prose)
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in found]


def is_command(block):
    return block.split()[0] in PROGRAMS


def commands(text):
    shells = [*blocks("bash", text), *filter(is_command, indented(text))]
    lines = itertools.chain.from_iterable(block.splitlines() for block in shells)
    return [line for line in lines if line.strip() and line.split()[0] not in OTHERS]


COMMANDS = sorted({c for text in [*PAGES.values(), (ROOT / "tpu/README.md").read_text()] for c in commands(text)})
CODE = [
    pytest.param(code, name, id=f"{name}-{i}")
    for name, t in PAGES.items()
    for i, code in enumerate(blocks("python", t))
]


@pytest.mark.parametrize(("code", "page"), CODE)
def test_python_runs(code, page):
    exec(compile(code, page, "exec"), {"__name__": "readme"})


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "docs/first_steps.ipynb").read_text())["cells"]
    namespace = {"__name__": "notebook"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
    assert namespace["picture"].stat().st_size > 10_000


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_kind_that_is_run_or_says_what_it_is(page):
    opened = re.findall(r"^```(\S*)\n", re.sub(r"^```$", "", PAGES[page], flags=re.MULTILINE), flags=re.MULTILINE)
    assert set(opened) <= {"bash", "python", "text", "{toctree}", "{include}", "{eval-rst}"}
    for block in indented(PAGES[page]):
        assert is_command(block) or "=" in block, block  # else a formula


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_what_the_programs_take(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif words[0] == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        asked = re.findall(r"\[(.*?)\]", command)
        assert {extra for group in asked for extra in group.split(",")} <= project["optional-dependencies"].keys()
        assert words[1] == "install"
        assert project["name"] in command or "-e" in words or "torch" in words
    elif words[0] == "layerskip-train" or words[1] == "train.py":
        arguments = words[1 if words[0] == "layerskip-train" else 2 :]
        parse_config(make_parser(""), [word for word in arguments if word != "--help"])
    elif words[0] == "layerskip-decode" or words[1] == "decode.py":
        parser = make_parser("")
        add_prompt_options(parser)
        source = (ROOT / "layerskip_jax/commands/decode.py").read_text()
        for option in ("--checkpoint", "--batch_size", "--compare", "--quiet", "--json"):
            assert f'"{option}"' in source
            parser.add_argument(option, nargs="?")
        add_settings(parser, DecodeConfig())
        parser.parse_known_options(words[words.index("--checkpoint") :])
    elif words[1].endswith(".py"):
        source = (ROOT / words[1]).read_text()
        if "parse_config" in source and words[1].startswith("examples/"):
            parse_config(make_parser(""), words[2:])
        else:
            settings = [at for at, word in enumerate(words) if re.match(r"--\w+\.", word)]
            parse_config(make_parser(""), [part for at in settings for part in words[at : at + 2]])
            options = {word for word in words if word.startswith("--")} - {words[at] for at in settings}
            assert all(f'"{option}"' in source or option == "--config" for option in options)
    elif words[2] in OF_CHECKPOINTS:
        argv = ["nowhere" if word.startswith(("runs/quickstart", "layerskip-1b")) else word for word in words[3:]]
        with pytest.raises(UserError, match=r"no (checkpoint|metrics) at nowhere"):  # so the rest was understood
            OF_CHECKPOINTS[words[2]](argv)
    elif words[2] == "benchmarks.evidence":
        evidence.parse(words[3:])
    elif words[2].startswith("benchmarks."):
        source = (ROOT / words[2].replace(".", "/")).with_suffix(".py").read_text()
        assert all(f'"{word}"' in source for word in words[3:] if word.startswith("--"))
    else:
        assert words[1:3] == ["-m", "layerskip_jax.data"]
        assert words[3] in (ROOT / "layerskip_jax/commands/data.py").read_text()
        parser = make_parser("")
        parser.add_argument("--out")
        parse_config(parser, words[4:])


def test_the_file_tree_is_the_real_one():
    tree = blocks("text", README)[-1]
    for name in re.findall(r"[\w/]+\.py", tree):
        assert list(ROOT.rglob(name)), name
    documented = set(re.findall(r"(\w+)\.py", tree))
    real = {file.stem for file in (ROOT / "layerskip_jax").glob("*.py")} - {"__init__", "errors"}
    assert real <= documented


@pytest.mark.parametrize("page", PAGES)
def test_every_local_link_leads_somewhere(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGES[page]):
        assert (folder / target).exists(), target
