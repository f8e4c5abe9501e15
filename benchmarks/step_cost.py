"""What LayerSkip adds to an optimizer step: ``python benchmarks/step_cost.py [--rounds 2]``.

Time, side by side in one run, of a full rotation of the curriculum under each recipe; temporary memory of the compiled
step; and how many programs a rotation compiled. The paper's rotation has R = L - 1, so that about one inner exit has a
loss at each step (LayerSkip table 1, e_scale 0.2).
"""

import argparse
import dataclasses
import platform
import statistics
import time

import flax
import jax
import numpy as np

from layerskip_jax.config import (
    Config,
    DataConfig,
    EarlyExitConfig,
    LayerDropoutConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from layerskip_jax.losses import Batch
from layerskip_jax.recipe import Recipe
from layerskip_jax.sharding import make_mesh
from layerskip_jax.train_step import Trainer

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="rotations timed under each recipe, in turn")
    rounds = parser.parse_args().rounds
    print(f"jax {jax.__version__}, flax {flax.__version__}, Python {platform.python_version()}")
    machine = f"{jax.device_count()} {jax.devices()[0].device_kind}, {platform.machine()}"
    print(f"{machine}; {LAYERS} layers x 256, a batch of 8 x 256 tokens, float32")

    tokens = np.random.default_rng(0).integers(0, 4096, (8, 257)).astype(np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((8, 256), np.int32), np.ones((8, 256), np.float32))
    compiled: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(seconds) if name.endswith("backend_compile_duration") else None
    )
    trainers, states, memory = {}, {}, {}
    for name, config in RECIPES.items():
        trainer = Trainer(config, Recipe.from_config(config), make_mesh(config))
        memory[name] = trainer.compile_step().memory_analysis().temp_size_in_bytes
        trainers[name] = trainer
        states[name], metrics = trainer.step(trainer.init(), batch)
        jax.block_until_ready(metrics)
    compiled.clear()
    seconds: dict[str, list[float]] = {name: [] for name in RECIPES}
    for _ in range(rounds * (LAYERS - 1)):
        for name, trainer in trainers.items():
            began = time.perf_counter()
            states[name], metrics = trainer.step(states[name], batch)
            jax.block_until_ready(metrics)
            seconds[name].append(time.perf_counter() - began)
    plain = statistics.median(seconds["plain"])
    print(f"{'':24}  mean step    of plain   median ratio   temporary memory   of plain")
    for name, times in seconds.items():
        mean = statistics.mean(times) / statistics.mean(seconds["plain"])
        pairs = statistics.median(a / b for a, b in zip(times, seconds["plain"], strict=True))
        ratio = memory[name] / memory["plain"]
        print(
            f"{name:24}  {statistics.mean(times):7.3f} s   {mean:7.3f}x       {pairs:7.3f}x   "
            f"{memory[name] / 2**20:10.1f} MiB   {ratio:7.3f}x"
        )
    print(f"plain: {8 * 256 / plain:,.0f} tokens/s; programs compiled in {rounds} rotation(s) of each: {len(compiled)}")


if __name__ == "__main__":
    main()
