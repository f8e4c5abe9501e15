"""From the command line to a frozen config: ``--config configs/NAME.py --optimizer.learning_rate 1e-3``.

argparse does the parsing. Its options are made from the dataclass fields, so that a setting is declared once, in
`layerskip_jax.config`, and an error is one line (the candidate libraries print boxes of five).
"""

import argparse
import dataclasses
import importlib.util
import math
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from layerskip_jax.config import Config
from layerskip_jax.errors import UserError, nearest

T = TypeVar("T")

SHIPPED = Path(__file__).parent / "configs"
"""The experiments of ``configs/``, where the package is installed without its checkout."""


class OneLineParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` whose errors are `UserError`s that name the nearest right option."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))

    def parse_known_options(self, argv: Sequence[str] | None) -> argparse.Namespace:
        options, unknown = self.parse_known_args(argv)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            flag = next((word for word in unknown if word.startswith("-")), unknown[0])
            flag = flag.split("=")[0]
            raise UserError(f"unknown setting {flag}{nearest(flag, known)} (--help lists all)")
        return options


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=118)


def make_parser(description: str) -> OneLineParser:
    return OneLineParser(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)


def add_settings(parser: argparse.ArgumentParser, defaults: Any, prefix: str = "") -> None:
    """Add one option per field of the dataclass ``defaults``; a nested dataclass becomes a group of dotted options."""
    group = parser.add_argument_group(prefix.removesuffix(".") or "settings", (type(defaults).__doc__ or "").strip())
    hints = typing.get_type_hints(type(defaults))
    for field in dataclasses.fields(defaults):
        value, hint, name = getattr(defaults, field.name), hints[field.name], f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            add_settings(parser, value, f"{name}.")
            continue
        shown = "none" if value in ((), "") else value
        options: dict[str, Any] = {
            "help": f"{field.metadata['doc']} (default: {shown})".replace("%", "%%"),
            "default": argparse.SUPPRESS,
            "dest": name,
        }
        if typing.get_origin(hint) is tuple:
            item = typing.get_args(hint)[0]
            options |= {
                "nargs": "*",
                "type": {int: integer, str: str}[item],
                "metavar": {int: "INT", str: "TEXT"}[item],
            }
        elif typing.get_origin(hint) is Literal:
            options |= {"type": one_of(typing.get_args(hint)), "metavar": "{" + ",".join(typing.get_args(hint)) + "}"}
        elif hint is bool:
            options |= {"type": boolean, "nargs": "?", "const": True, "metavar": "true|false"}
        else:
            convert = {int: integer, float: number, str: str}[hint]
            options |= {"type": convert, "metavar": hint.__name__.upper()}
        group.add_argument(f"--{name}", **options)


def boolean(text: str) -> bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    raise argparse.ArgumentTypeError(f"must be true or false, not {text!r:.60}")


def integer(text: str) -> int:
    try:
        return int(text.replace("_", ""))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r:.60}") from None


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text!r:.60}")
    return value


def one_of(choices: tuple[str, ...]) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(
                f"must be one of {', '.join(choices)}, not {text!r:.60}{nearest(text, choices)}"
            )
        return text

    return convert


def given_settings(options: argparse.Namespace, defaults: Any) -> dict[str, Any]:
    """Return the settings of ``defaults`` that the user has given, of those that `add_settings` has offered."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(defaults) if field.name in options}


def apply_overrides(defaults: T, overrides: dict[str, Any]) -> T:
    """Return ``defaults`` with dotted ``overrides`` applied; the checks of the dataclasses run on the result."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(typing.cast(Any, defaults)):
        value = getattr(defaults, field.name)
        if dataclasses.is_dataclass(value):
            inner = {k.split(".", 1)[1]: v for k, v in overrides.items() if k.startswith(f"{field.name}.")}
            if inner:
                changes[field.name] = apply_overrides(value, inner)
        elif field.name in overrides:
            new = overrides[field.name]
            changes[field.name] = tuple(new) if isinstance(new, list) else new
    return dataclasses.replace(typing.cast(Any, defaults), **changes) if changes else defaults


def load_config_file(path: str) -> Config:
    """Run the Python file ``path`` and return its ``get_config()``. It is code: name only files that you trust.

    Where there is no file ``configs/NAME.py``, the one that is installed with the package is meant.
    """
    shipped = SHIPPED / Path(path).name
    ours = Path(path).parent == Path("configs") and shipped.is_file() and not Path(path).is_file()
    return run_file(str(shipped) if ours else path, "get_config", Config)


def run_file(path: str, function: str, kind: type[T]) -> T:
    """Run the Python file ``path`` and return what its ``function`` returns, which must be a ``kind``."""
    file = Path(path)
    if not file.is_file():
        others = sorted(str(other) for other in (file.parent if file.parent.is_dir() else Path("configs")).glob("*.py"))
        others = others or [f"configs/{other.name}" for other in sorted(SHIPPED.glob("*.py"))]
        what = kind.__name__.lower()
        raise UserError(f"no {what} file {path}{nearest(path, others)} (a {what} is a Python file with {function}())")
    spec = importlib.util.spec_from_file_location(f"layerskip_jax_file_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise UserError(f"{kind.__name__.lower()} file {path} has no {function}() -> {kind.__name__}")
        value = getattr(module, function)()
    except (SyntaxError, ImportError, NameError, TypeError, AttributeError) as error:
        raise UserError(f"{kind.__name__.lower()} file {path} does not run: {type(error).__name__}: {error}") from error
    if not isinstance(value, kind):
        raise UserError(
            f"{function}() of {path} returned a {type(value).__name__}, not a {kind.__module__}.{kind.__name__}"
        )
    return value


def add_config_option(parser: OneLineParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="Python file with get_config() -> Config; it is executed")


def parse_config(parser: OneLineParser, argv: Sequence[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """Parse ``--config FILE`` and dotted overrides; return the resolved config and all other options of ``parser``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    before = make_parser("")
    before.add_argument("--config")
    early, _ = before.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    defaults = load_config_file(early.config) if early.config else Config()
    add_config_option(parser)
    add_settings(parser, defaults)
    options = parser.parse_known_options(argv)
    overrides = {name: value for name, value in vars(options).items() if "." in name}
    return apply_overrides(defaults, overrides), options
