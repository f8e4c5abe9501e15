"""Held-out loss of every exit, runs side by side: ``python -m layerskip_jax.evaluation RUN [RUN ...]``."""

import dataclasses
import json
import math

import jax
import numpy as np

from layerskip_jax.checkpoint import load_model
from layerskip_jax.command_line import integer, make_parser
from layerskip_jax.config import MeshConfig
from layerskip_jax.errors import run_command
from layerskip_jax.recipe import Recipe
from layerskip_jax.sharding import make_mesh, shardings_of
from layerskip_jax.train_step import Trainer
from layerskip_jax.training import evaluate


def exit_losses_of(checkpoint: str, batches: int) -> np.ndarray:
    """Return ``loss_L`` of a checkpoint on the first ``batches`` batches of its own held-out split [nats a token]."""
    model, config, tokenizer = load_model(checkpoint)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, tokenizer=str(tokenizer), workers=0),
        train=dataclasses.replace(config.train, evaluate_batches=batches),
        mesh=MeshConfig(),
    )
    mesh = make_mesh(config)
    model = jax.device_put(model, shardings_of(model, model, mesh))
    return evaluate(Trainer(config, Recipe.from_config(config), mesh), model)


def table(losses: dict[str, np.ndarray]) -> str:
    """Lay losses and perplexities out by exit, a column a run; at the foot, the middle exit against the last."""
    width = max(20, *(len(name) for name in losses)) + 2
    lines = ["exit " + "".join(f"{name:>{width}}" for name in losses)]
    for row in range(max(map(len, losses.values()))):
        cells = (
            f"{loss[row]:.3f} (ppl {math.exp(loss[row]):.1f})" if row < len(loss) else "" for loss in losses.values()
        )
        lines.append(f"{row + 1:>4} " + "".join(f"{cell:>{width}}" for cell in cells))
    for name, loss in losses.items():
        middle = len(loss) // 2
        excess = loss[middle - 1] / loss[-1] - 1
        lines.append(f"{name}: the loss at exit {middle} is {excess:+.1%} of the last exit's")
    return "\n".join(lines)


def main() -> None:
    parser = make_parser("Print the held-out loss of every exit.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or single checkpoints")
    parser.add_argument("--batches", metavar="N", type=integer, default=32, help="held-out batches (default: 32)")
    parser.add_argument("--json", action="store_true", help="print one JSON line a run instead of the table")
    options = parser.parse_known_options(None)
    losses = {run: exit_losses_of(run, options.batches) for run in options.runs}
    if options.json:
        for run, loss in losses.items():
            print(json.dumps({"run": run, "held_out_loss_by_exit": loss.tolist()}))
    else:
        print(table(losses))


if __name__ == "__main__":
    run_command(main)
