"""Compile two forms of the attention output's projection for a TPU: ``python -m benchmarks.output_projection``.

    python -m benchmarks.output_projection --config configs/scratch_1b5.py --topology v6e:4x8 --mesh.fsdp 32

Compiles the training step twice with libtpu, which needs no TPU, and prints the estimate, the memory and the compile
time of each form. `Block` contracts over the heads and the head width on a TPU; the other form merges the two axes
first, as `Block` does on other platforms. `tpu/compile_ahead.py` explains the estimate.
"""

from contextlib import nullcontext
from typing import Any
from unittest import mock

import jax
from chips import CHIPS

from benchmarks.common import add_json_option, header, write_json
from layerskip_jax import model
from layerskip_jax.command_line import make_parser, parse_config
from layerskip_jax.errors import run_command
from layerskip_jax.training.monitoring.flops import PEAK_FLOPS
from tpu.compile_ahead import compile_step, report, topology_devices

PROJECT = model.project


def merge_heads(equation: str, x: jax.Array, matrix: jax.Array, **options: Any) -> jax.Array:
    """Replace `model.project`: merge heads and head width of the attention output before the matmul."""
    if equation != "BTNH,NHD->BTD":
        return PROJECT(equation, x, matrix, **options)
    return PROJECT("BTM,MD->BTD", x.reshape(*x.shape[:2], -1), matrix.reshape(-1, matrix.shape[-1]), **options)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("Compile a training step with two forms of the attention output's projection.")
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="for example v6e:4x8")
    add_json_option(parser)
    config, options = parse_config(parser, argv)
    devices, chip = topology_devices(options.topology, 1), CHIPS[options.topology.split(":")[0]]
    about, rows, peak = header(), [], PEAK_FLOPS[devices[0].device_kind]
    forms = {"heads and head width": nullcontext(), "merged axis": mock.patch.object(model, "project", merge_heads)}
    for form, patch in forms.items():
        jax.clear_caches()  # the traced block of the other form
        with patch:
            found = report(config, chip, peak, len(devices), compile_step(config, devices))
        rows.append({"form": form, "topology": options.topology, "config": options.config, **found})
        print(
            f"{form:20} estimate {found['seconds']['estimate']:.4f} s, "
            f"peak memory {found['hbm']['peak'] / 1e9:.2f} GB, compiled in {found['compile_seconds']:.0f} s",
            flush=True,
        )
    write_json(options.json, about, rows)


if __name__ == "__main__":
    run_command(main)
