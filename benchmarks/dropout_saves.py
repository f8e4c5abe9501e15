"""Measure what layer dropout saves: ``python -m benchmarks.dropout_saves [--steps 8] [--remat none dots full]``.

Times a step without dropout, with the masked form and with the skipping form, in turn. CPU time is reported too, since
other work on the machine affects it less. Drop rates are linear in depth and constant in time. The bar: if a share r of
all blocks is dropped, a skipping step takes at most 1 - 0.8 r of a step without dropout. The head, the embedding and
the optimizer are never skipped, so the limit by FLOPs is 1 - r times the blocks' share.
"""

import argparse
import statistics
import time
from functools import partial

import jax

from benchmarks.common import Timings, called_in_turn, header
from benchmarks.step_cost import CompiledStep
from layerskip_jax.command_line import positive
from layerskip_jax.config import Config, DataConfig, LayerDropoutConfig, ModelConfig, OptimizerConfig, TrainConfig
from layerskip_jax.errors import run_command
from layerskip_jax.training.monitoring.flops import flops_per_token

ROWS, LENGTH, LAYERS, VOCABULARY = 8, 256, 12, 4096


def config(p_max: float, form: str, remat: str) -> Config:
    return Config(
        model=ModelConfig(LAYERS, 256, 4, 4, 688, VOCABULARY, compute_dtype="float32"),
        layer_dropout=LayerDropoutConfig(p_max, "linear", "constant", rescale=True, form=form, row_groups=ROWS),
        data=DataConfig(sequence_length=LENGTH),
        optimizer=OptimizerConfig(warmup_steps=0),
        train=TrainConfig(batch_size=ROWS, loss_chunk=64, steps=50_000, remat=remat),
    )


def measure(step: CompiledStep) -> tuple[float, float, float]:
    """Run a step; return its seconds, its seconds of CPU time, and the share of the blocks that it drops."""
    mask = step.trainer.dropout_mask(step.state.step)
    dropped = 1 - float(mask.keep_LB.mean()) if mask is not None else 0.0
    began, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(step())
    return time.perf_counter() - began, time.process_time() - cpu, dropped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=positive, default=8, help="timed steps of each (default: 8)")
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
    steps = {name: CompiledStep(one) for name, one in configs.items()}
    measured = called_in_turn({name: partial(measure, step) for name, step in steps.items()}, options.steps)
    timings, cpu_timings = (
        Timings({name: [row[column] for row in rows] for name, rows in measured.items()}) for column in range(2)
    )
    shares = {name: [dropped for _, _, dropped in rows] for name, rows in measured.items()}

    some = next(iter(configs.values()))
    head = 6 * some.model.dim * VOCABULARY / flops_per_token(some)
    print(
        f"{'remat: form':20} median step  of without  of its CPU time  dropped    bar    limit by "
        "FLOPs  temporary memory"
    )
    for name, step in steps.items():
        without, r = f"{name.split(':')[0]}: without", statistics.mean(shares[name])
        ratio, work = (column.ratio(name, without) for column in (timings, cpu_timings))
        print(
            f"{name:20} {timings.median(name):9.3f} s  {ratio:9.3f}x  {work:14.3f}x  {r:7.1%}  {1 - 0.8 * r:5.3f}  "
            f"{1 - r * (1 - head):10.3f}       {step.temporary_bytes / 2**20:9.1f} MiB"
        )


if __name__ == "__main__":
    run_command(main)
