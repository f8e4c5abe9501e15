"""Cost of LayerSkip per optimizer step: ``python -m benchmarks.step_cost [--rounds 2] [--config FILE]``.

Times ``--rounds`` x (L - 1) steps of each recipe; the recipes take turns, step by step. Reports the temporary memory of
the compiled step. L - 1 steps are a full rotation of the paper's recipe, which has R = L - 1, so about one inner exit
has a loss at each step (LayerSkip table 1, e_scale 0.2). ``--config FILE``, with any setting, compares that config with
its plain model instead, in the middle of its schedules.
"""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import header
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
from layerskip_jax.training.step import Trainer

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


@dataclasses.dataclass(frozen=True)
class Steps:
    """Cost of the optimizer steps of several recipes, interleaved in one run."""

    seconds: dict[str, list[float]]
    temporary_bytes: dict[str, int]

    def ratio_to_first(self, name: str) -> float:
        """Return the median ratio of the times of ``name`` to those of the first recipe, step by step."""
        first = next(iter(self.seconds.values()))
        return statistics.median(a / b for a, b in zip(self.seconds[name], first, strict=True))


def random_batch(config: Config) -> Batch:
    shape = (config.train.batch_size, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (shape[0], shape[1] + 1)).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones(shape, np.int32), np.ones(shape, np.float32))


def time_steps(recipes: dict[str, Config], turns: int, first: int = 0) -> Steps:
    """Time ``turns`` steps of each recipe on random tokens from step ``first`` on, after one step that is not timed."""
    steps, states, memory, batches = {}, {}, {}, {}
    for name, config in recipes.items():
        mesh = make_mesh(config)
        batches[name] = to_devices(random_batch(config)._asdict(), mesh)
        trainer = Trainer(config, Recipe.from_config(config), mesh)
        steps[name] = trainer.compile_step()
        memory[name] = steps[name].memory_analysis().temp_size_in_bytes
        begun = trainer.init()
        begun = dataclasses.replace(begun, step=jax.device_put(jnp.int32(first), begun.step.sharding))
        states[name], metrics = steps[name](begun, batches[name])
        jax.block_until_ready(metrics)
    seconds: dict[str, list[float]] = {name: [] for name in recipes}
    for _ in range(turns):
        for name, step in steps.items():
            began = time.perf_counter()
            states[name], metrics = step(states[name], batches[name])
            jax.block_until_ready(metrics)
            seconds[name].append(time.perf_counter() - began)
    return Steps(seconds, memory)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--rounds", type=positive, default=2, help="timed rotations of each recipe")
    config, options = parse_config(parser, argv)
    require(bool(options.config) or config == Config(), "settings need --config FILE")
    header()
    recipes, first = RECIPES, 0
    if options.config:
        recipes, first = {"plain": without_layerskip(config), options.config: config}, config.train.steps // 2
    model, shape = recipes["plain"].model, random_batch(recipes["plain"]).inputs_BT.shape
    print(f"{model.num_layers} layers x {model.dim}, a batch of {shape[0]} x {shape[1]} tokens, {model.compute_dtype}")

    steps = time_steps(recipes, options.rounds * (model.num_layers - 1), first)
    seconds, memory = steps.seconds, steps.temporary_bytes
    print(f"{'':24}  mean step    of plain   median ratio   temporary memory   of plain")
    for name, times in seconds.items():
        mean = statistics.mean(times) / statistics.mean(seconds["plain"])
        print(
            f"{name:24}  {statistics.mean(times):7.3f} s   {mean:7.3f}x       {steps.ratio_to_first(name):7.3f}x   "
            f"{memory[name] / 2**20:10.1f} MiB   {memory[name] / memory['plain']:7.3f}x"
        )
    rate = shape[0] * shape[1] / statistics.median(seconds["plain"])
    print(f"plain: {rate:,.0f} tokens/s")


if __name__ == "__main__":
    run_command(main)
