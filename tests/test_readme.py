"""The README and docs/: their Python runs, and the real parsers accept their commands."""

import importlib
import itertools
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from benchmarks import evidence
from layerskip_jax.command_line import make_parser, parse_config
from layerskip_jax.commands.layerskip import COMMANDS as LAYERSKIP
from layerskip_jax.commands.layerskip import main as layerskip
from layerskip_jax.errors import UserError

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = sorted(file.relative_to(ROOT) for file in (ROOT / "docs").rglob("*.md") if "accelerator" not in file.parts)
PAGES = {str(page): (ROOT / page).read_text() for page in (Path("README.md"), *DOCS)}
# Commands of other programs are not tested; those of tpu/pod are tested in test_tpu_files.py.
OTHERS = {"hf", "kill", "gcloud", "export", "ssh-add", "kubectl", "docker", "tpu/pod"}
PROGRAMS = {"make", "python", "pip", "pytest", "layerskip", *OTHERS}
SCRIPTS = {"train.py": "train", "decode.py": "decode"}
RUNS = ("runs/", "layerskip-1b", "my-instruct-llama")


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "benchmarks").glob("[a-z]*.py")))
def test_a_benchmark_imports_or_names_the_missing_package(name):
    try:
        importlib.import_module(f"benchmarks.{name}")
    except SystemExit as error:
        assert "pip install" in str(error)  # noqa: PT017


def blocks(language, text):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def indented(text):
    """Return the code blocks that are indented by four spaces; each follows a blank line."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"(?:\A|\n)\n((?: {4}[^\n]*\n(?:\n(?= {4}))?)+)", prose)
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in found]


def words_of(command):
    """Split a command into words, without leading environment variables."""
    return list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), shlex.split(command, comments=True)))


def is_command(block):
    return words_of(block.splitlines()[0])[0] in PROGRAMS


def commands(text):
    """Return the commands in code blocks, and those in inline code that have arguments."""
    shells = [*blocks("bash", text), *filter(is_command, indented(text))]
    lines = itertools.chain.from_iterable(block.splitlines() for block in shells)
    quoted = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    named = [code for code in quoted if re.match(r"([A-Z_]+=\S+ )*(pytest|python|layerskip|make) ", code)]
    # `layerskip train` and `layerskip COMMAND --help` only mention a command.
    named = [code for code in named if "COMMAND" not in code and not re.fullmatch(r"layerskip [\w-]+( \w+)?", code)]
    found = [re.sub(r"\s+# .*", "", line) for line in [*filter(str.strip, lines), *named]]
    return [command for command in found if words_of(command)[0] not in OTHERS]


ALL_COMMANDS = sorted({c for text in [*PAGES.values(), (ROOT / "tpu/README.md").read_text()] for c in commands(text)})
CODE = [
    pytest.param(code, page, id=f"{page}-{i}")
    for page, text in PAGES.items()
    for i, code in enumerate(blocks("python", text))
]


def test_the_readme_is_short_and_its_first_screen_shows_what_works():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert "missed" not in "\n".join(lines[:60]).lower()


@pytest.mark.parametrize(("code", "page"), CODE)
def test_python_runs(code, page, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {"__name__": "readme"})


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "docs/first_steps.ipynb").read_text())["cells"]
    namespace = {"__name__": "notebook"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
    assert namespace["figure"]._repr_html_().count("</tr>") > 2


@pytest.mark.parametrize("page", PAGES)
def test_every_code_block_has_a_known_language_or_is_a_command_or_formula(page):
    opened = re.findall(r"^```(\S*)\n", re.sub(r"^```$", "", PAGES[page], flags=re.MULTILINE), flags=re.MULTILINE)
    assert set(opened) <= {"bash", "python", "text", "{toctree}", "{include}", "{eval-rst}"}
    for block in indented(PAGES[page]):
        assert is_command(block) or "=" in block, block  # else a formula, or Python that takes too long


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_the_parsers_accept_the_command(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *words = words_of(command)
    module = words[1].removesuffix(".py") if words[0] == "-m" else ""
    if program == "layerskip":
        check_layerskip(words)
    elif words[0] in SCRIPTS:
        check_layerskip([SCRIPTS[words[0]], *words[1:]])
    elif module == "layerskip_jax":
        check_layerskip(words[2:] or ["train"])
    elif program == "make":
        assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text()
    elif program == "pip":
        check_pip(command, words)
    elif program == "pytest" or module == "pytest":
        files = [word.partition("::")[0] for word in words if word.startswith("tests/")]
        assert files
        assert all((ROOT / file).exists() for file in files)
    elif module == "benchmarks.evidence":
        evidence.parse(words[2:])
    elif module:
        assert module.startswith("benchmarks."), command
        check_script(ROOT / f"{module.replace('.', '/')}.py", words[2:])
    else:
        check_script(ROOT / words[0], words[1:])


def check_layerskip(words):
    """Parse a command of ``layerskip``. Those that read a run parse all options, then fail because it is missing."""
    name, *arguments = words
    assert name in LAYERSKIP
    if "--help" in arguments:
        with pytest.raises(SystemExit) as ended:
            layerskip([name, "--help"])
        assert ended.value.code == 0
    elif name in ("train", "data", "search"):
        parser = make_parser("")
        if name == "search":
            parser.add_argument("folder")
            for option in ("--minutes", "--trials"):
                parser.add_argument(option, type=int)
        arguments = [word.replace("runs/search/best.py", "configs/quickstart.py") for word in arguments]
        if name == "data":
            assert f'"{arguments.pop(0)}"' in (ROOT / "layerskip_jax/commands/data.py").read_text()
            parser.add_argument("--out")
        parse_config(parser, arguments)
    else:
        arguments = ["nowhere" if word.startswith(RUNS) or word == "RUN" else word for word in arguments]
        with pytest.raises(UserError, match=r"no (checkpoint|metrics) at (nowhere|exported)"):
            layerskip([name, *arguments])


def check_pip(command, words):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {extra for group in re.findall(r"\[(.*?)\]", command) for extra in group.split(",")}
    assert extras <= project["optional-dependencies"].keys()
    assert words[0] == "install"
    assert project["name"] in command.replace("_", "-") or "-e" in words or "torch" in words


def check_script(file, words):
    """Parse the settings, and find every other option in the source."""
    source = file.read_text()
    if "parse_config" in source and file.parent.name == "examples":
        parse_config(make_parser(""), words)
        return
    settings = [at for at, word in enumerate(words) if re.match(r"--\w+\.", word)]
    parse_config(make_parser(""), [part for at in settings for part in words[at : at + 2]])
    options = {word for word in words if word.startswith("--")} - {words[at] for at in settings}
    assert all(f'"{option}"' in source or option == "--config" for option in options)


def test_the_file_map_names_every_module_at_the_top_and_every_package():
    tree = blocks("text", README)[-1]
    for name in re.findall(r"[\w/]+\.py", tree):
        assert list(ROOT.rglob(name)), name
    package = ROOT / "layerskip_jax"
    modules = {file.name for file in package.glob("*.py") if not file.stem.startswith("__")}
    packages = {f"{folder.parent.name}/" for folder in package.glob("*/__init__.py")}
    words = set(re.findall(r"[\w/]+\.py|\w+/", tree))
    assert modules <= words
    assert packages <= words


def anchors(text):
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "CONTRIBUTING.md", "tpu/README.md"])
def test_every_local_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)\s]+)\)", (ROOT / page).read_text()):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


def test_anchors_are_those_of_github():
    assert anchors("# A `name`, and more\n## Self-speculation\n```bash\n# no heading\n```\n") == {
        "a-name-and-more",
        "self-speculation",
    }
