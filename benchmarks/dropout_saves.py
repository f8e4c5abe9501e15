"""Time that layer dropout saves: ``python -m benchmarks.dropout_saves [--rounds 8] [--remat none dots full]``.

Times a step without dropout, with the masked form and with the skipping form, interleaved in one run. CPU time is
reported too, since other work on the machine affects it less. Drop rates are linear in depth and constant in time. The
bar: if a share r of all blocks is dropped, a skipping step takes at most 1 - 0.8 r of a step without dropout. The head,
the embedding and the optimizer are never skipped, so the limit by FLOPs is 1 - r times the blocks' share.
"""

import argparse
import statistics
import time

import jax

from benchmarks.common import header
from benchmarks.step_cost import random_batch
from layerskip_jax.command_line import positive
from layerskip_jax.config import Config, DataConfig, LayerDropoutConfig, ModelConfig, OptimizerConfig, TrainConfig
from layerskip_jax.errors import run_command
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.sharding import make_mesh
from layerskip_jax.training.monitoring.flops import flops_per_token
from layerskip_jax.training.step import Trainer

ROWS, LENGTH, LAYERS, VOCABULARY = 8, 256, 12, 4096


def config(p_max: float, form: str, remat: str) -> Config:
    return Config(
        model=ModelConfig(LAYERS, 256, 4, 4, 688, VOCABULARY, compute_dtype="float32"),
        layer_dropout=LayerDropoutConfig(p_max, "linear", "constant", rescale=True, form=form, row_groups=ROWS),
        data=DataConfig(sequence_length=LENGTH),
        optimizer=OptimizerConfig(warmup_steps=0),
        train=TrainConfig(batch_size=ROWS, loss_chunk=64, steps=50_000, remat=remat),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=positive, default=8, help="timed steps of each")
    parser.add_argument("--p_max", type=float, nargs="+", default=[0.6, 0.8])
    parser.add_argument("--remat", nargs="+", default=["none", "dots", "full"], choices=["none", "dots", "full"])
    options = parser.parse_args()
    header()
    print(f"{LAYERS} layers x 256, {ROWS} x {LENGTH} tokens, float32")

    configs = {}
    for remat in options.remat:
        configs[f"{remat}: without"] = config(0.0, "masked", remat)
        for p_max in options.p_max:
            configs |= {f"{remat}: {form} {p_max}": config(p_max, form, remat) for form in ("masked", "skipping")}
    batch = random_batch(next(iter(configs.values())))
    trainers = {name: Trainer(it, Recipe.from_config(it), make_mesh(it)) for name, it in configs.items()}
    states, memory = {}, {}
    for name, trainer in trainers.items():
        memory[name] = trainer.compile_step().memory_analysis().temp_size_in_bytes
        states[name], metrics = trainer.step(trainer.init(), batch)
        jax.block_until_ready(metrics)
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in configs}
    dropped: dict[str, list[float]] = {name: [] for name in configs}
    for _ in range(options.rounds):
        for name, trainer in trainers.items():
            if configs[name].layer_dropout.p_max > 0:  # the share that this step drops
                dropped[name].append(1 - float(trainer.dropout_mask(states[name].step).keep_LB.mean()))
            began, cpu = time.perf_counter(), time.process_time()
            states[name], metrics = trainer.step(states[name], batch)
            jax.block_until_ready(metrics)
            seconds[name].append(time.perf_counter() - began)
            cpu_seconds[name].append(time.process_time() - cpu)

    some = next(iter(configs.values()))
    head = 6 * some.model.dim * VOCABULARY / flops_per_token(some)
    print(
        f"{'remat: form':20} median step  of without  of its CPU time  dropped    bar    limit by "
        "FLOPs  temporary memory"
    )
    for name, times in seconds.items():
        without = f"{name.split(':')[0]}: without"
        ratio, work = (
            statistics.median(a / b for a, b in zip(column[name], column[without], strict=True))
            for column in (seconds, cpu_seconds)
        )
        r = statistics.mean(dropped[name]) if dropped[name] else 0.0
        print(
            f"{name:20} {statistics.median(times):9.3f} s  {ratio:9.3f}x  {work:14.3f}x  {r:7.1%}  {1 - 0.8 * r:5.3f}  "
            f"{1 - r * (1 - head):10.3f}       {memory[name] / 2**20:9.1f} MiB"
        )


if __name__ == "__main__":
    run_command(main)
