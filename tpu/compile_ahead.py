"""Compile a config's training step for a TPU topology, on any machine, and estimate its memory and time.

    python tpu/compile_ahead.py --config configs/scratch_1b5.py --topology v5e:4x8

Prints the memory of a chip, the FLOPs of the step (compiled, and by formula), the communication between chips, a lower
bound on the step's time from the chip's data sheet, and an estimate from the cost model with which the compiler chooses
tile sizes. ``--operations`` lists the operations that take most of the estimate. Nothing runs: no figure is a measured
time. Needs libtpu (``pip install -e '.[tpu]'``), but no TPU. The exit status is 2 if the step does not fit.
"""

import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")

import jax
import numpy as np
from chips import CHIPS, Chip
from hlo import Program, Work, shares_by_scope
from jax.experimental import topologies

from layerskip_jax.command_line import make_parser, parse_config, positive
from layerskip_jax.config import Config
from layerskip_jax.errors import UserError, run_command
from layerskip_jax.locations import keep_compiled_programs
from layerskip_jax.recipe.chunked_loss import INNER_EXIT, LAST_EXIT, TWO_EXITS
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.sharding import make_mesh
from layerskip_jax.training.monitoring.flops import (
    PEAK_FLOPS,
    attention_flops,
    exits_by_form,
    flops_per_token,
    step_flops,
)
from layerskip_jax.training.step import Trainer

jax.config.update("jax_platforms", "cpu")  # the variable comes too late where jax was imported before this module

SHOWN = 24  # operations in the list of --operations


class Compiled(NamedTuple):
    """The compiled step of one device."""

    peak_bytes: int
    argument_bytes: int
    temporary_bytes: int
    work: Work
    kernels: bool  # attention is a kernel, whose FLOPs are not in the HLO text
    seconds: float


def wraparound(topology: str) -> tuple[bool, ...]:
    """Return which of the three axes of a slice have links from the last chip to the first, so that they are rings.

    These are all axes of whole 4x4x4 cubes (v4, v5p, tpu7x), and axes of 16 chips (v5e, v6e). libtpu assumes no such
    link unless it is told. On a v5p it then replaces every all-gather by an all-reduce of twice the bytes.

    >>> wraparound("v5p:4x4x8"), wraparound("v5p:2x4x4"), wraparound("v5e:8x16")
    ((True, True, True), (False, False, False), (False, True, False))
    """
    sizes = [int(size) for size in topology.split(":")[1].split("x") if size.isdecimal()]
    if len(sizes) == 3:
        return (all(size % 4 == 0 for size in sizes),) * 3
    return (*(size == 16 for size in sizes), *[False] * (3 - len(sizes)))


def topology_devices(topology: str, slices: int) -> Sequence[Any]:
    """Return the devices of ``slices`` slices of a topology such as v5e:4x8."""
    chip = topology.split(":")[0]
    if chip not in CHIPS or ":" not in topology:
        raise UserError(f"--topology must look like v5e:4x8, with one of {', '.join(CHIPS)}, got {topology!r}")
    more: dict[str, Any] = {"wrap": wraparound(topology)} | ({"num_slices": slices} if slices > 1 else {})
    if chip == "v4":
        more["chip_config_name"] = "megacore"  # as on Cloud TPU: the two cores of a chip form one device
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices
    except Exception as error:
        if "libtpu" in str(error).lower():
            raise UserError("this needs libtpu, the TPU's compiler: pip install -e '.[tpu]'") from error
        raise UserError(f"libtpu does not know the topology {topology}: {str(error).splitlines()[0]}") from error


def compile_step(config: Config, devices: Sequence[Any]) -> Compiled:
    """Compile ``Trainer.step``. Raises `UserError` with the compiler's figures if it does not fit a chip's memory."""
    recipe, began = Recipe.from_config(config), time.perf_counter()
    trainer = Trainer(config, recipe, make_mesh(config, devices))
    try:
        step = trainer.compile_step()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        line = next((line for line in str(error).splitlines() if "Used" in line), str(error).splitlines()[0])
        raise UserError(f"does not fit: {line.strip()}") from error
    memory, text = step.memory_analysis(), step.as_text()
    peak = getattr(memory, "peak_memory_in_bytes", 0) or memory.argument_size_in_bytes + memory.temp_size_in_bytes
    weights_L, rates_L = typical_step(config)
    # On average, the loop of the skipping form runs once for each kept row group.
    kept_groups = config.layer_dropout.row_groups * (1 - float(rates_L.mean()))
    # The shares of the conditionals that take the true branch. The scan over L blocks has one conditional of an inner
    # exit before each block; the first is never taken. The others are outside the scan.
    inner, last, two = exits_by_form(recipe, weights_L)
    shares = {INNER_EXIT: inner / len(weights_L), LAST_EXIT: last, TWO_EXITS: two}
    work = Program(text).work(shares_by_scope(shares), kept_groups)
    return Compiled(
        peak, memory.argument_size_in_bytes, memory.temp_size_in_bytes, work, "splash" in text,
        time.perf_counter() - began,
    )  # fmt: skip


@functools.cache
def typical_step(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Return the exit weights of the step with the median number of exits, and the mean drop rates of the run."""
    recipe = Recipe.from_config(config)
    steps = np.linspace(0, config.train.steps - 1, 97).astype(int)
    weights_SL = np.array([recipe.exit_weights(step) for step in steps])
    rates_SL = np.array([recipe.drop_rates(step) for step in steps])
    exits_S = np.count_nonzero(weights_SL, axis=1)
    return weights_SL[np.argsort(exits_S)[len(steps) // 2]], rates_SL.mean(axis=0)


def report(config: Config, chip: Chip, peak: float, chips: int, compiled: Compiled) -> dict[str, Any]:
    """Return the compiler's figures with those of the formulas and the data sheet."""
    formula = step_flops(config, Recipe.from_config(config), *typical_step(config))
    positions = config.train.batch_size * config.data.sequence_length
    forward_passes = 4 / 3 if config.train.remat in ("full", "offload") else 1
    kernel_flops = positions * attention_flops(config) * forward_passes if compiled.kernels else 0.0
    flops = compiled.work.flops * chips + kernel_flops
    received = compiled.work.received
    ici = sum(size for transfer, size in received.items() if not transfer.between_slices)
    dcn = sum(size for transfer, size in received.items() if transfer.between_slices)
    exposed = sum(size for t, size in received.items() if not t.overlapped and not t.between_slices)
    matmuls = flops / chips / peak
    # The cost model includes memory traffic that matmuls do not hide, but no kernels.
    modelled = compiled.work.cycles / chip.clock + kernel_flops / chips / peak

    def step_seconds(compute: float) -> float:
        """Hide transfers that overlap within a slice; add exposed ones, and those between slices."""
        return max(compute, (ici - exposed) / chip.ici) + exposed / chip.ici + dcn / chip.dcn

    bound, estimate = step_seconds(matmuls), step_seconds(modelled)
    model_flops = positions * flops_per_token(config) / (chips * peak)
    return {
        "fits": compiled.peak_bytes < chip.hbm,
        "chips": chips,
        "hbm": {"peak": compiled.peak_bytes, "arguments": compiled.argument_bytes,
                "temporaries": compiled.temporary_bytes, "chip": chip.hbm},
        "flops": {"compiled": flops, "formula": formula.hardware, "plain": formula.plain, "exits": formula.exits,
                  "skipped": formula.skipped, "recomputed": formula.recomputed},
        "received": {str(transfer): size for transfer, size in received.items()},
        "overlapped": 1 - exposed / ici if ici else 1.0,
        "seconds": {"matmuls": matmuls, "chip to chip": ici / chip.ici, "slice to slice": dcn / chip.dcn,
                    "exposed": exposed / chip.ici, "bound": bound, "cost model": modelled, "estimate": estimate},
        "mfu_at_bound": model_flops / bound,
        "mfu_at_estimate": model_flops / estimate,
        "operations": most_costly(compiled.work, chip.clock, peak),
        "compile_seconds": compiled.seconds,
    }  # fmt: skip


def most_costly(work: Work, clock: float, peak: float) -> list[dict[str, Any]]:
    """Return the operations with the largest estimates, by JAX's name of the traced operation.

    ``of_peak`` is the share of the chip's peak FLOP/s that their matmuls would reach, 0 without a matmul.
    """
    by_cycles = sorted(work.operations.items(), key=lambda one: -one[1][0])
    return [
        {"name": name.replace("while/body/closed_call/", ""), "share": cycles / work.cycles,
         "seconds": cycles / clock, "of_peak": flops / peak / (cycles / clock)}
        for name, (cycles, flops) in by_cycles[:SHOWN]
    ]  # fmt: skip


def show(found: dict[str, Any], operations: bool) -> None:
    memory, flops, seconds = found["hbm"], found["flops"], found["seconds"]

    def show_line(name: str, text: str) -> None:
        print(f"  {name:20}{text}")

    show_line(
        "memory of a chip",
        f"{memory['peak'] / 1e9:8.2f} GB of {memory['chip'] / 1e9:.0f} at the peak, "
        f"{1 - memory['peak'] / memory['chip']:.0%} left (arguments {memory['arguments'] / 1e9:.2f}, "
        f"temporaries {memory['temporaries'] / 1e9:.2f})",
    )
    show_line(
        "FLOPs per step",
        f"{flops['compiled']:8.3g} compiled, {flops['formula']:.3g} by formula "
        f"({flops['compiled'] / flops['formula']:.3f}x): plain {flops['plain']:.3g}, exits {flops['exits']:.3g}, "
        f"skipped {flops['skipped']:.3g}, recomputed {flops['recomputed']:.3g}",
    )
    for transfer, size in sorted(found["received"].items(), key=lambda pair: -pair[1]):
        show_line("received by a chip", f"{size / 1e9:8.3f} GB {transfer}")
    show_line(
        "overlapped",
        f"{found['overlapped']:8.1%} of the bytes within a slice; the exposed transfers take "
        f"{seconds['exposed'] / seconds['estimate']:.1%} of the estimate",
    )
    show_line(
        "bound on the step",
        f"{seconds['bound']:8.3f} s (matmuls {seconds['matmuls']:.3f}, chip to chip {seconds['chip to chip']:.3f}, "
        f"slice to slice {seconds['slice to slice']:.3f}); MFU at the bound {found['mfu_at_bound']:.0%}",
    )
    show_line(
        "estimate",
        f"{seconds['estimate']:8.3f} s (cost model of the fusions and attention at the peak "
        f"{seconds['cost model']:.3f}); MFU at the estimate {found['mfu_at_estimate']:.0%}",
    )
    show_line("compile time", f"{found['compile_seconds']:8.0f} s")
    for one in found["operations"] if operations else ():
        print(f"  {one['share']:6.1%} {one['seconds'] * 1e3:9.2f} ms, {one['of_peak']:4.0%} of the peak  {one['name']}")


def alternatives(config: Config, chips: int, slices: int) -> Iterator[tuple[str, Config]]:
    """Yield the settings that ``--suggest`` tries: 1 to 8 microbatches, each with remat none, dots and full."""
    mesh = dataclasses.replace(config.mesh, data=slices, fsdp=chips // slices, sequence=1, tensor=1)
    for accumulate in (1, 2, 4, 8):
        for remat in ("none", "dots", "full"):
            if config.train.batch_size % (accumulate * chips):
                continue
            train = dataclasses.replace(config.train, remat=remat, accumulate=accumulate)
            words = f"--mesh.data {slices} --mesh.fsdp {chips // slices} --mesh.sequence 1 --mesh.tensor 1"
            words += f" --train.remat {remat}"
            yield f"{words} --train.accumulate {accumulate}", dataclasses.replace(config, mesh=mesh, train=train)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("Compile a config's training step for a TPU topology, without a TPU.")

    parser.add_argument(
        "--topology", required=True, metavar="CHIP:SHAPE", help="for example v5e:4x8, v5p:4x4x4, v6e:8x8"
    )
    parser.add_argument(
        "--slices",
        type=positive,
        default=1,
        help="number of slices of that shape, connected by the data-center network",
    )
    parser.add_argument("--suggest", action="store_true", help="try remat policies and microbatches until a step fits")
    parser.add_argument(
        "--store", action="store_true", help="store the compiled step in train.run_dir, where a run looks for it"
    )
    parser.add_argument(
        "--operations", action="store_true", help=f"list the {SHOWN} operations that take most of the estimate"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    config, options = parse_config(parser, argv)
    devices, chip = topology_devices(options.topology, options.slices), CHIPS[options.topology.split(":")[0]]
    peak = PEAK_FLOPS[devices[0].device_kind]
    if options.store:
        keep_compiled_programs(config.train.run_dir)
    tried = alternatives(config, len(devices), options.slices) if options.suggest else iter([("", config)])
    problem = "nothing to try: train.batch_size must be a multiple of the chips"
    for words, candidate in tried:
        try:
            found = report(candidate, chip, peak, len(devices), compile_step(candidate, devices))
        except UserError as error:
            if not options.suggest:
                raise
            problem = str(error)
            print(f"{words}: {problem}", file=sys.stderr)
            continue
        if options.json:
            print(json.dumps({"topology": options.topology, "slices": options.slices, "settings": words, **found}))
        else:
            verdict = "fits" if found["fits"] else "does not fit"
            print(f"{options.config} on {options.slices} x {options.topology}: {verdict} {words}".rstrip())
            show(found, options.operations)
        if found["fits"]:
            return
        problem = "the peak exceeds the chip's memory"
        if not options.suggest:
            raise UserError(problem)
    raise UserError(f"none of the tried settings fits; the last one: {problem}")


if __name__ == "__main__":
    run_command(main)
