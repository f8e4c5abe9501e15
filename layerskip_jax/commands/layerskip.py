"""The command ``layerskip``: ``layerskip COMMAND ...``, or ``python -m layerskip_jax COMMAND ...``."""

import importlib
import sys

from layerskip_jax import __version__
from layerskip_jax.errors import UserError, nearest, run_command

COMMANDS = {
    "train": "pretrain a model with layer dropout and early-exit loss",
    "decode": "generate text from a checkpoint",
    "data": "prepare a corpus, train its tokenizer, store it as tokens, show training rows",
    "evaluate": "print the loss, perplexity and agreement of every exit on held-out text",
    "tasks": "score generated answers on the paper's tasks, or on your own",
    "lm-eval": "run lm-evaluation-harness at any exit",
    "search": "find a recipe for a config: exits, weights, distillation, agreement, layer dropout",
    "sweep": "find the fastest exit and draft length of a checkpoint, and store them with it",
    "plots": "redraw the plots of a run",
    "report": "write one HTML page with all plots of a run",
    "export": "write a run as a Hugging Face folder",
    "publish": "push an exported folder to the Hugging Face Hub",
}


def usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{does}" for name, does in COMMANDS.items()]
    end = "layerskip COMMAND --help lists the options of a command; layerskip --version prints the version."
    return "\n".join(["usage: layerskip COMMAND ...", "", *lines, "", end])


def main(argv: list[str] | None = None) -> None:
    """Run the command that ``argv`` names: ``main`` of the module of that name in `layerskip_jax.commands`."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"layerskip_jax {__version__}")
    elif name in COMMANDS:
        importlib.import_module(f"layerskip_jax.commands.{name.replace('-', '_')}").main(rest)
    else:
        raise UserError(f"unknown command {name!r}{nearest(name, COMMANDS)} (layerskip --help lists all)")


def run() -> None:
    """The installed command ``layerskip``."""
    run_command(main)
