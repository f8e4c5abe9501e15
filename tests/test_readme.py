"""The README is run: its Python as it stands, its commands through the parsers and the Makefile."""

import re
import shlex
from pathlib import Path

import pytest

from layerskip_jax import sweep
from layerskip_jax.command_line import add_settings, make_parser, parse_config
from layerskip_jax.commands.prompts import add_prompt_options
from layerskip_jax.config import DecodeConfig
from layerskip_jax.errors import UserError

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


DOCS = [code for page in sorted((ROOT / "docs").glob("*.md")) for code in blocks("python", page.read_text())]


@pytest.mark.parametrize("code", [*blocks("python"), *DOCS])
def test_python_runs(code):
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_what_the_programs_take(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif words[1] == "train.py":
        parse_config(make_parser(""), [word for word in words[2:] if word != "--help"])
    elif words[1] == "decode.py":
        parser = make_parser("")
        add_prompt_options(parser)
        source = (ROOT / "layerskip_jax/commands/decode.py").read_text()
        for option in ("--checkpoint", "--batch_size", "--compare", "--quiet", "--json"):
            assert f'"{option}"' in source
            parser.add_argument(option, nargs="?")
        add_settings(parser, DecodeConfig())
        parser.parse_known_options(words[2:])
    elif words[2] == "layerskip_jax.sweep":
        with pytest.raises(UserError, match="no checkpoint at nowhere"):  # so the rest was understood
            sweep.main(["nowhere" if word == "runs/quickstart" else word for word in words[3:]])
    else:
        assert words[1:3] == ["-m", "layerskip_jax.data"]
        assert words[3] in (ROOT / "layerskip_jax/data/__main__.py").read_text()
        parse_config(make_parser(""), words[4:])


def test_the_file_tree_is_the_real_one():
    tree = blocks("text")[-1]
    for name in re.findall(r"[\w/]+\.py", tree):
        assert list(ROOT.rglob(name)), name
    documented = set(re.findall(r"(\w+)\.py", tree))
    real = {file.stem for file in (ROOT / "layerskip_jax").glob("*.py")} - {"__init__", "errors"}
    assert real <= documented


def test_every_local_link_leads_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
