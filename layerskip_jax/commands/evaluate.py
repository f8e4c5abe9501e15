"""Every exit on held-out text, runs side by side: ``python -m layerskip_jax evaluate RUN [RUN ...]``."""

import json

from layerskip_jax.command_line import add_settings, integer, make_parser
from layerskip_jax.config import DataConfig
from layerskip_jax.evaluation.exits import ExitQuality, quality_of_checkpoint


def table(qualities: dict[str, ExitQuality]) -> str:
    """Lay losses, perplexities and agreements out by exit, a column a run; at the foot, the middle exit."""
    width = max(26, *(len(name) for name in qualities)) + 2
    lines = ["exit " + "".join(f"{name:>{width}}" for name in qualities)]
    for row in range(max(len(quality.loss_L) for quality in qualities.values())):
        cells = (
            f"{q.loss_L[row]:.3f} (ppl {q.perplexity_L[row]:.1f}, {q.agreement_L[row]:.1%})"
            if row < len(q.loss_L)
            else ""
            for q in qualities.values()
        )
        lines.append(f"{row + 1:>4} " + "".join(f"{cell:>{width}}" for cell in cells))
    lines.append("(perplexity; how often the exit's next token is the last exit's)")
    for name, quality in qualities.items():
        middle = max(1, len(quality.loss_L) // 2)
        excess = quality.loss_L[middle - 1] / quality.loss_L[-1] - 1
        lines.append(f"{name}: the loss at exit {middle} is {excess:+.1%} of the last exit's")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("Print the held-out loss, perplexity and agreement of every exit; --data.* for other text.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or single checkpoints")
    parser.add_argument("--batches", metavar="N", type=integer, default=32, help="held-out batches (default: 32)")
    parser.add_argument("--json", action="store_true", help="print one JSON line a run instead of the table")
    add_settings(parser, DataConfig(), "data.")
    options = parser.parse_known_options(argv)
    data = {name.removeprefix("data."): value for name, value in vars(options).items() if name.startswith("data.")}
    qualities = {run: quality_of_checkpoint(run, options.batches, data) for run in options.runs}
    if options.json:
        for run, quality in qualities.items():
            print(json.dumps({"run": run} | quality.as_dict()))
    else:
        print(table(qualities))
