"""``layerskip evaluate RUN [RUN ...]`` measures every exit on held-out text."""

import dataclasses
import itertools
import json
from typing import TYPE_CHECKING

from layerskip_jax.command_line import add_json, add_settings, make_parser, positive
from layerskip_jax.config import DataConfig

if TYPE_CHECKING:
    from layerskip_jax.evaluation.exits import ExitQuality


SETTINGS = {field.name for field in dataclasses.fields(DataConfig)} - {"tokenizer", "shuffle_window", "workers"}
"""The settings of the held-out text. The tokenizer is the run's own; the other two have no effect in evaluation."""


def table(qualities: "dict[str, ExitQuality]") -> str:
    """Return losses, perplexities and agreements: a row per exit, a column per run, a line on each middle exit."""
    columns = {
        name: [
            f"{loss:.3f} (ppl {perplexity:.1f}, {agreement:.1%})"
            for loss, perplexity, agreement in zip(q.loss_L, q.perplexity_L, q.agreement_L, strict=True)
        ]
        for name, q in qualities.items()
    }
    width = 2 + max(26, *(len(text) for name, column in columns.items() for text in (name, *column)))
    lines = ["exit " + "".join(f"{name:>{width}}" for name in columns)]
    for row, cells in enumerate(itertools.zip_longest(*columns.values(), fillvalue=""), 1):
        lines.append(f"{row:>4} " + "".join(f"{cell:>{width}}" for cell in cells))
    lines.append("(ppl: perplexity; %: how often the exit predicts the same token as the last exit)")
    for name, quality in qualities.items():
        middle = max(1, len(quality.loss_L) // 2)
        excess = quality.loss_L[middle - 1] / quality.loss_L[-1] - 1
        compared = "higher" if excess >= 0 else "lower"
        lines.append(f"{name}: the loss at exit {middle} is {abs(excess):.1%} {compared} than at the last exit")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(
        "Print the held-out loss, perplexity and agreement of every exit. --data.* selects other text; without an "
        "option, the run's own setting holds, not the default shown here.",
        "evaluate",
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="run folder, one checkpoint in it, or a Hugging Face folder"
    )
    parser.add_argument("--batches", metavar="N", type=positive, default=32, help="held-out batches (default: 32)")
    add_json(parser, "one per run")
    add_settings(parser, DataConfig(), "data.", names=SETTINGS)
    options = parser.parse_known_options(argv)

    # Imported after parsing, so that --help and errors are immediate.
    from layerskip_jax.checkpoint.reading import open_model_folder
    from layerskip_jax.evaluation.exits import checkpoint_quality

    data = {name.removeprefix("data."): value for name, value in vars(options).items() if name.startswith("data.")}
    folders = {run: open_model_folder(run) for run in options.runs}  # all at first: one may be missing
    qualities = {}
    for run, folder in folders.items():
        qualities[run] = checkpoint_quality(folder, options.batches, data)
        if options.json:
            print(json.dumps({"run": run} | qualities[run].as_dict()), flush=True)
    if not options.json:
        print(table(qualities))
