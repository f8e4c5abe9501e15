"""Measure what LayerSkip adds to an optimizer step: ``python -m benchmarks.step_cost [--rotations 2] [--config FILE]``.

Times ``--rotations`` x (L - 1) steps of each recipe; the recipes take turns, step by step. Reports the temporary memory
of the compiled step. L - 1 steps are a full rotation of the paper's recipe, which has R = L - 1, so about one inner
exit has a loss at each step (LayerSkip table 1, e_scale 0.2). ``--config FILE``, with any setting, compares that config
with its plain model instead, in the middle of its schedules.
"""

import dataclasses
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import Timings, header, timed_in_turn
from layerskip_jax.checks import require
from layerskip_jax.command_line import make_parser, parse_config, positive
from layerskip_jax.config import (
    Config,
    DataConfig,
    EarlyExitConfig,
    LayerDropoutConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from layerskip_jax.data.batch import Batch
from layerskip_jax.data.pipeline import to_devices
from layerskip_jax.errors import run_command
from layerskip_jax.presets import without_layerskip
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.sharding import make_mesh
from layerskip_jax.training.step import StepMetrics, Trainer

LAYERS = 12
PLAIN = Config(
    model=ModelConfig(LAYERS, 256, 4, 4, 688, 4096, compute_dtype="float32"),
    data=DataConfig(sequence_length=256),
    optimizer=OptimizerConfig(warmup_steps=0),
    train=TrainConfig(batch_size=8, loss_chunk=64, steps=50_000),
)
PAPER = EarlyExitConfig(curriculum="rotational", dilation=LAYERS - 1, e_scale=0.2)
RECIPES = {
    "plain": PLAIN,
    "rotational, R = L-1": dataclasses.replace(PLAIN, early_exit=PAPER),
    "and layer dropout 0.2": dataclasses.replace(
        PLAIN, early_exit=PAPER, layer_dropout=LayerDropoutConfig(p_max=0.2, time_scale="constant")
    ),
    "rotational, R = 4": dataclasses.replace(PLAIN, early_exit=dataclasses.replace(PAPER, dilation=4)),
    "all exits": dataclasses.replace(PLAIN, early_exit=dataclasses.replace(PAPER, curriculum="all")),
}


def random_batch(config: Config) -> Batch:
    shape = (config.train.batch_size, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (shape[0], shape[1] + 1)).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones(shape, np.int32), np.ones(shape, np.float32))


class CompiledStep:
    """The program of a config's training step. A call runs the next step, from ``first`` on, on random tokens."""

    def __init__(self, config: Config, first: int = 0):
        self.trainer = Trainer(config, Recipe.from_config(config), make_mesh(config))
        self._program = self.trainer.compile_step()
        self._batch = to_devices(random_batch(config)._asdict(), self.trainer.mesh)
        begun = self.trainer.init()
        self.state = dataclasses.replace(begun, step=jax.device_put(jnp.int32(first), begun.step.sharding))

    def __call__(self) -> StepMetrics:
        self.state, metrics = self._program(self.state, self._batch)
        return metrics

    @property
    def temporary_bytes(self) -> int:
        return self._program.memory_analysis().temp_size_in_bytes


def time_steps(recipes: dict[str, Config], turns: int, first: int = 0) -> tuple[Timings, dict[str, int]]:
    """Time ``turns`` steps of each recipe from step ``first`` on, after an untimed one; also return temporary bytes."""
    steps = {name: CompiledStep(config, first) for name, config in recipes.items()}
    return timed_in_turn(steps, turns), {name: step.temporary_bytes for name, step in steps.items()}


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--rotations", type=positive, default=2, help="timed rotations of each recipe (default: 2)")
    config, options = parse_config(parser, argv)
    require(bool(options.config) or config == Config(), "settings need --config FILE")
    header()
    recipes, first = RECIPES, 0
    if options.config:
        recipes, first = {"plain": without_layerskip(config), options.config: config}, config.train.steps // 2
    model, shape = recipes["plain"].model, random_batch(recipes["plain"]).inputs_BT.shape
    print(f"{model.num_layers} layers x {model.dim}, a batch of {shape[0]} x {shape[1]} tokens, {model.compute_dtype}")

    timings, memory = time_steps(recipes, options.rotations * (model.num_layers - 1), first)
    seconds = timings.seconds
    print(f"{'':24}  mean step    of plain   median ratio   temporary memory   of plain")
    for name, times in seconds.items():
        mean = statistics.mean(times) / statistics.mean(seconds["plain"])
        print(
            f"{name:24}  {statistics.mean(times):7.3f} s   {mean:7.3f}x       {timings.ratio(name, 'plain'):7.3f}x   "
            f"{memory[name] / 2**20:10.1f} MiB   {memory[name] / memory['plain']:7.3f}x"
        )
    rate = shape[0] * shape[1] / timings.median("plain")
    print(f"plain: {rate:,.0f} tokens/s")


if __name__ == "__main__":
    run_command(main)
