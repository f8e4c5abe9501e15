"""Compile an exit loss for a TPU chip by chunk size, and tokamax's kernel: ``python -m benchmarks.fused_loss``.

Compiles the loss of one exit with its gradients (`ChunkedLoss.value_and_gradients`) for one chip, with the options of a
training step. Prints the time of the compiler's cost model and the time of the matmuls at peak FLOP/s (6 D V FLOPs a
token). If tokamax is installed, compiles its ``linear_softmax_cross_entropy_loss`` too. The compiler estimates no time
for a kernel; its source recomputes the logits in the backward pass (8 D V). Needs libtpu.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from chips import CHIPS
from flax import nnx
from hlo import Program, shares_by_scope
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.common import add_json_option, header, write_json
from layerskip_jax.compiler_options import compile_step
from layerskip_jax.config import ModelConfig
from layerskip_jax.errors import run_command
from layerskip_jax.model import Transformer
from layerskip_jax.recipe.chunked_loss import ChunkedLoss
from layerskip_jax.recipe.early_exit import cross_entropy
from layerskip_jax.sharding import AXES
from layerskip_jax.training.monitoring.flops import PEAK_FLOPS
from tpu.compile_ahead import topology_devices

try:
    from tokamax._src.ops.linear_softmax_cross_entropy_loss import pallas_mosaic_tpu_kernel as tokamax_kernel
except ImportError:
    tokamax_kernel = None

Loss = Callable[[Transformer, jax.Array, jax.Array], Any]


def ours(chunk: int) -> Loss:
    def loss(model: Transformer, x_BTD: jax.Array, targets_BT: jax.Array) -> Any:
        labels = targets_BT, jnp.ones(targets_BT.shape, jnp.float32), None
        chunked = ChunkedLoss(model.config, cross_entropy, chunk)
        return chunked.value_and_gradients(model.head(), x_BTD, labels, jnp.ones(()))

    return loss


def tokamax(block: int) -> Loss:
    def loss(model: Transformer, x_BTD: jax.Array, targets_BT: jax.Array) -> Any:
        x_MD, targets_M = x_BTD.reshape(-1, x_BTD.shape[-1]), targets_BT.reshape(-1)
        head_DV = model.head_DV[...].astype(x_BTD.dtype)
        sizes = {"b_block_size": 1024, "h_block_size": 512, "v_block_size": block, "reduction": "sum"}
        value, lse_M = tokamax_kernel.linear_softmax_cross_entropy_loss_fwd_pallas_mosaic_tpu(
            x_MD, targets_M, head_DV, **sizes
        )
        return value, tokamax_kernel.linear_softmax_cross_entropy_loss_bwd_pallas_mosaic_tpu(
            jnp.ones(()), lse_M, x_MD, targets_M, head_DV, **sizes
        )

    return loss


def compiled(loss: Loss, model: ModelConfig, rows: int, length: int, mesh: Mesh) -> Any:
    def on_chip(tree: Any) -> Any:
        sharding = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    weights = nnx.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0)))
    x_BTD = jax.ShapeDtypeStruct((rows, length, model.dim), jnp.bfloat16)
    targets_BT = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    with jax.set_mesh(mesh):
        lowered = jax.jit(loss).lower(on_chip(weights), on_chip(x_BTD), on_chip(targets_BT))
        return compile_step(lowered, mesh.devices.flat[0].device_kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v6e:2x2", help="compile for its first chip (default: v6e:2x2)")
    parser.add_argument("--rows", type=int, default=2, help="sequences on the chip (default: 2)")
    parser.add_argument("--length", type=int, default=4096, help="tokens in each sequence (default: 4096)")
    parser.add_argument("--dim", type=int, default=4096, help="width of the model (default: 4096)")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="vocabulary size (default: 32000)")
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 512, 1024, 2048], help="loss_chunk values")
    add_json_option(parser)
    options = parser.parse_args()
    chip, devices = options.topology.split(":")[0], topology_devices(options.topology, 1)
    mesh = Mesh(np.array(devices[:1]).reshape(1, 1, 1, 1), AXES)
    model = ModelConfig(1, options.dim, 1, 1, 128, options.vocabulary)
    losses: dict[str, Loss] = {f"chunks of {chunk}": ours(chunk) for chunk in options.chunks}
    if tokamax_kernel is not None:
        losses["tokamax"] = tokamax(block=2048 if chip == "v6e" else 512)  # of the vocabulary: its own defaults
    tokens = options.rows * options.length
    ideal = 6 * tokens * options.dim * options.vocabulary / PEAK_FLOPS[devices[0].device_kind]
    about, rows = header("tokamax"), []
    for name, loss in losses.items():
        step = compiled(loss, model, options.rows, options.length, mesh)
        work = Program(step.as_text()).work(shares_by_scope({"": 1.0}))
        kernel = name == "tokamax"  # its FLOPs and cycles are not in the HLO text
        result = {
            "way": name, "topology": options.topology, "tokens": tokens,
            "temporaries": step.memory_analysis().temp_size_in_bytes,
            "matmuls": None if kernel else work.flops / (tokens * options.dim * options.vocabulary),
            "seconds_at_peak": ideal * 8 / 6 if kernel else ideal,
            "estimate": None if kernel else work.cycles / CHIPS[chip].clock,
        }  # fmt: skip
        rows.append(result)
        at_peak = f"{result['seconds_at_peak'] * 1e3:.1f} ms at peak"
        print(f"{name:16}{result['temporaries'] / 1e6:7.0f} MB of temporaries, ", end="")
        if kernel:
            print(f"8 D V FLOPs per token by its source, {at_peak}")
        else:
            print(f"{result['matmuls']:.0f} D V FLOPs per token, {at_peak}; "
                  f"estimate {result['estimate'] * 1e3:6.1f} ms, {ideal / result['estimate']:.0%}")  # fmt: skip
    write_json(options.json, about, rows)


if __name__ == "__main__":
    run_command(main)
