"""Compile the splash attention kernel by chip, head width and tile: ``python -m benchmarks.splash_tiles``.

Compiles the forward and backward pass for one chip with libtpu, which needs no TPU, and prints which tiles fit into the
chip's vector memory, the temporaries and the compile time. The compiler estimates no time for a kernel. On a machine
with a TPU, ``--time`` runs the same passes on it and prints their time in place of the compile time.
"""

import argparse
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.accelerator_sizes import seconds_of
from benchmarks.common import add_json_option, header, write_json
from layerskip_jax.document_attention import LARGEST_TILE, SPLASH_TILE, attend_splash
from layerskip_jax.errors import UserError, run_command
from layerskip_jax.sharding import AXES

TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
TILES = tuple(SPLASH_TILE * 2**power for power in range(5))


def gradients(tile: int) -> Any:
    """Return the jitted forward and backward pass of attention with this tile."""

    def loss(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, segments_BT: jax.Array) -> jax.Array:
        return jnp.sum(attend_splash(q_BTNH, k_BTNH, v_BTNH, segments_BT, largest_tile=tile).astype(jnp.float32))

    return jax.jit(jax.grad(loss, (0, 1, 2)))


def examine(device: Any, shape: tuple[int, ...], tile: int, timed: bool) -> dict[str, Any]:
    """Compile for ``device``; with ``timed``, which needs a TPU, also run."""
    mesh = Mesh(np.array([device]).reshape(1, 1, 1, 1), AXES)
    sharding = NamedSharding(mesh, PartitionSpec())
    array = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
    segments_BT = jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=sharding)
    row: dict[str, Any] = {"chip": device.device_kind, "shape": shape, "tile": tile}
    with jax.set_mesh(mesh):
        began = time.perf_counter()
        try:
            step = gradients(tile).lower(array, array, array, segments_BT).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return row | {"fits": False}
        row |= {"fits": True, "temporaries": step.memory_analysis().temp_size_in_bytes,
                "compile_seconds": time.perf_counter() - began}  # fmt: skip
        if timed:
            zeros = [jnp.zeros(a.shape, a.dtype, device=sharding) for a in (array, array, array, segments_BT)]
            row["seconds"] = seconds_of(partial(step, *zeros), calls=5, repeats=5)
    return row


def find_devices(options: argparse.Namespace) -> list[Any]:
    """Return this machine's first TPU with ``--time``, else the first chip of each topology."""
    if not options.time:
        # Imported late: it sets the environment for a machine without a TPU.
        from tpu.compile_ahead import topology_devices

        return [topology_devices(topology, 1)[0] for topology in options.topologies]
    if jax.default_backend() != "tpu":
        raise UserError(f"--time needs a TPU, and this machine has {jax.default_backend()}: leave --time out")
    return jax.devices()[:1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES, metavar="CHIP:SHAPE")
    parser.add_argument("--head_dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--tiles", type=int, nargs="+", default=TILES)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--time", action="store_true", help="run on this machine's TPU")
    add_json_option(parser)
    options = parser.parse_args()
    devices, about, rows = find_devices(options), header(), []
    for device in devices:
        for head_dim in options.head_dims:
            for tile in options.tiles:
                row = examine(device, (1, options.length, 2048 // head_dim, head_dim), tile, options.time)
                rows.append(row)
                result = "does not fit into vector memory"
                if row["fits"]:
                    result = f"{row['temporaries'] / 1e6:6.0f} MB of temporaries, "
                    result += (f"{row['seconds'] * 1e3:.2f} ms" if options.time
                               else f"{row['compile_seconds']:.1f} s to compile")  # fmt: skip
                mine = "  (this project's)" * (tile == LARGEST_TILE)
                print(f"{device.device_kind:12} heads of {head_dim:3}, tile {tile:4}: {result}{mine}", flush=True)
    write_json(options.json, about, rows)


if __name__ == "__main__":
    run_command(main)
