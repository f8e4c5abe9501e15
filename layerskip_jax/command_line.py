"""The command-line parser: options for every setting, and the options that commands share.

argparse parses; its options are generated from the dataclass fields, so each setting is declared once, in
`layerskip_jax.config`. Every error is one line.
"""

import argparse
import contextlib
import dataclasses
import sys
import traceback
import types
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from layerskip_jax.checks import parse_value
from layerskip_jax.config import Config
from layerskip_jax.config_dict import apply_overrides
from layerskip_jax.errors import UserError, nearest

T = TypeVar("T")

SHIPPED = Path(__file__).parent / "configs"
"""The files of ``configs/`` in an installed package."""


class OneLineParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that raises its errors as `UserError` and suggests the nearest option."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))

    def parse_known_options(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse ``argv``, in which options and positional arguments may be mixed; refuse what is unknown."""
        options, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            flag = next((word for word in unknown if word.startswith("-")), unknown[0])
            flag = flag.split("=")[0]
            raise UserError(f"unknown setting {flag}{nearest(flag, known)} (--help lists all)")
        return options


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=118)


def make_parser(description: str, command: str = "") -> OneLineParser:
    """Return a parser without options; ``command`` is the name of a ``layerskip`` command, for the usage line."""
    program = f"layerskip {command}" if command else None
    return OneLineParser(program, description=description, formatter_class=_HelpFormatter, allow_abbrev=False)


# Options that several commands have


def add_run(parser: OneLineParser, kinds: str = "run folder, one checkpoint in it, or a Hugging Face folder") -> None:
    parser.add_argument("run", metavar="RUN", help=kinds)


def add_prompt_options(parser: OneLineParser) -> None:
    """Add the three sources of prompts, which `layerskip_jax.commands.prompts.read_prompts` reads."""
    parser.add_argument("--prompt", metavar="TEXT", action="append", help="a prompt; may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help="file of prompts: .jsonl with a 'prompt' each, or one a line")
    parser.add_argument(
        "--held_out", metavar="N", type=positive, help="use the beginnings of N held-out documents as prompts"
    )


def add_tensor_parallel(parser: OneLineParser) -> None:
    """Add ``--tensor_parallel N``, for `layerskip_jax.sharding.tensor_parallel`."""
    parser.add_argument(
        "--tensor_parallel",
        metavar="N",
        type=positive,
        default=1,
        help="split the model over N devices of this host, if it is too large for one (default: 1)",
    )


def add_json(parser: OneLineParser, lines: str) -> None:
    parser.add_argument("--json", action="store_true", help=f"print JSON lines: {lines}")


def add_settings(
    parser: argparse.ArgumentParser, defaults: Any, prefix: str = "", names: Collection[str] | None = None
) -> None:
    """Add one option per field of the dataclass ``defaults``, or for those of ``names``.

    A nested dataclass becomes a group of dotted options.
    """
    group = parser.add_argument_group(prefix.removesuffix(".") or "settings", (type(defaults).__doc__ or "").strip())
    hints = typing.get_type_hints(type(defaults))
    for field in dataclasses.fields(defaults):
        if names is not None and field.name not in names:
            continue
        value, hint, name = getattr(defaults, field.name), hints[field.name], f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            add_settings(parser, value, f"{name}.")
            continue
        shown = shown_value(value)
        options: dict[str, Any] = {
            "help": f"{field.metadata['doc']} (default: {shown})".replace("%", "%%"),
            "default": argparse.SUPPRESS,
            "dest": name,
        }
        if typing.get_origin(hint) is tuple:
            item = typing.get_args(hint)[0]
            options |= {"nargs": "*", "type": typed(item), "metavar": {int: "INT", float: "FLOAT", str: "TEXT"}[item]}
        elif typing.get_origin(hint) is Literal:
            options |= {"type": typed(hint), "metavar": "{" + ",".join(typing.get_args(hint)) + "}"}
        elif hint is bool:
            options |= {"type": typed(hint), "nargs": "?", "const": True, "metavar": "true|false"}
        else:
            options |= {"type": typed(hint), "metavar": hint.__name__.upper()}
        group.add_argument(f"--{name}", **options)


def shown_value(value: Any) -> str:
    """Return a setting's value as the command line takes it, or "none" if it is empty.

    >>> shown_value((2, 8)), shown_value(False), shown_value("")
    ('2 8', 'false', 'none')
    """
    if isinstance(value, bool):
        return str(value).lower()
    return (" ".join(map(str, value)) if isinstance(value, tuple) else str(value)) or "none"


# Types of single options


def typed(hint: Any) -> Callable[[str], Any]:
    """Return the argparse ``type`` that converts one word to ``hint``, see `parse_value`."""

    def convert(text: str) -> Any:
        try:
            return parse_value(hint, text, is_text=True)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


number = typed(float)


def whole(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Return the argparse ``type`` of an integer in ``least..most``."""

    def convert(text: str) -> int:
        value: int = typed(int)(text)
        if not least <= value <= most:
            limit = f"at least {least}" if value < least else f"at most {most}"
            raise argparse.ArgumentTypeError(f"must be {limit}, not {value}")
        return value

    return convert


positive, not_negative = whole(1), whole(0)


# Configs


def given_settings(options: argparse.Namespace, defaults: Any) -> dict[str, Any]:
    """Return the fields of ``defaults`` that the user set, of those that `add_settings` offered."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(defaults) if field.name in options}


def load_config_file(path: str) -> Config:
    """Execute the Python file ``path`` and return its ``get_config()``. Name only files that you trust.

    ``configs/NAME.py`` falls back to the file of that name that is installed with the package.
    """
    shipped = SHIPPED / Path(path).name
    ours = Path(path).parent == Path("configs") and shipped.is_file() and not Path(path).is_file()
    return run_file(str(shipped) if ours else path, "get_config", Config, "config")


def run_file(path: str, function: str, kind: type[T], what: str) -> T:
    """Execute the Python file ``path``; return the ``kind`` that its ``function()`` returns.

    ``what`` names the kind of file in errors, such as "config".
    """
    file = Path(path)
    if not file.is_file():
        others = sorted(str(other) for other in (file.parent if file.parent.is_dir() else Path("configs")).glob("*.py"))
        others = others or [f"configs/{other.name}" for other in sorted(SHIPPED.glob("*.py"))]
        raise UserError(f"no {what} file {path}{nearest(path, others)} (a {what} is a Python file with {function}())")
    if file.suffix != ".py":
        raise UserError(f"{what} file {path} must end in .py: a {what} is a Python file with {function}()")
    module = types.ModuleType(f"layerskip_jax_file_{file.stem}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses looks up the annotations of a class there
    with errors_in(path, what):
        exec(compile(file.read_bytes(), path, "exec"), module.__dict__)
        make = getattr(module, function, None)
        value = make() if make else None
    if make is None:
        raise UserError(f"{what} file {path} has no {function}() -> {kind.__name__}")
    if not isinstance(value, kind):
        raise UserError(
            f"{function}() of {path} returned a {type(value).__name__}, not a {kind.__module__}.{kind.__name__}"
        )
    return value


@contextlib.contextmanager
def errors_in(path: str, what: str) -> Iterator[None]:
    """Raise an error of the body as a `UserError` that names the file and the line; ``what`` is as in `run_file`."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise _at_line(f"{what} file {path}", path, error) from error


def _at_line(label: str, path: str, error: BaseException) -> UserError:
    """Say in one line what the Python file ``path`` raised, and where."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line, said = (lines or [None])[-1], str(error)
    if isinstance(error, SyntaxError) and error.filename == path:
        line, said = error.lineno, error.msg
    kind, said = "" if isinstance(error, UserError) else type(error).__name__, " ".join(said.split())
    return UserError(": ".join(filter(None, [label if line is None else f"{label}, line {line}", kind, said])))


def add_config_option(parser: OneLineParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="Python file with get_config() -> Config; it is executed")


def parse_config(parser: OneLineParser, argv: Sequence[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """Parse ``--config FILE`` and dotted overrides; return the resolved config and all options of ``parser``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    before = make_parser("")
    before.add_argument("--config")
    early, _ = before.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    defaults = Config() if early.config is None else load_config_file(early.config)
    add_config_option(parser)
    add_settings(parser, defaults)
    options = parser.parse_known_options(argv)
    overrides = {name: value for name, value in vars(options).items() if "." in name}
    return apply_overrides(defaults, overrides), options
