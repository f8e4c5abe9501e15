"""What an exit costs a TPU chip, by pieces, beside tokamax's fused kernel: ``python -m benchmarks.fused_loss``.

The loss of one exit with its gradients (`layerskip_jax.recipe.fused_exit_loss.exit_loss`), compiled by the TPU's own
compiler for one chip; its cost model's time against that of the products at the peak (6 D V a token). tokamax's
``linear_softmax_cross_entropy_loss`` is compiled beside it where it is installed: of a kernel the compiler estimates no
time, and by its source it makes the logits anew in the backward pass (8 D V). Needs libtpu.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hlo import Program, taken_in
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerskip_jax.config import ModelConfig
from layerskip_jax.model import Transformer
from layerskip_jax.recipe.early_exit import cross_entropy
from layerskip_jax.recipe.fused_exit_loss import Exit, exit_loss
from layerskip_jax.sharding import AXES
from layerskip_jax.training.monitoring.flops import PEAK_FLOPS
from tpu.compile_ahead import CHIPS, devices_of

try:
    from tokamax._src.ops.linear_softmax_cross_entropy_loss import pallas_mosaic_tpu_kernel as tokamax_kernel
except ImportError:
    tokamax_kernel = None

Loss = Callable[[Transformer, jax.Array, jax.Array], Any]


def ours(chunk: int) -> Loss:
    def loss(model: Transformer, x_BTD: jax.Array, targets_BT: jax.Array) -> Any:
        labels = targets_BT, jnp.ones(targets_BT.shape, jnp.float32), None
        d_head = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), model.head()[1])
        return exit_loss(
            Exit(model.config, cross_entropy, chunk), model.head(), x_BTD, labels, jnp.ones(()), True, d_head
        )

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
    def on_the_chip(tree: Any) -> Any:
        sharding = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    weights = nnx.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0)))
    x_BTD = jax.ShapeDtypeStruct((rows, length, model.dim), jnp.bfloat16)
    targets_BT = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    with jax.set_mesh(mesh):
        return jax.jit(loss).lower(on_the_chip(weights), on_the_chip(x_BTD), on_the_chip(targets_BT)).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v6e:2x2", help="whose first chip it is for (default: v6e:2x2)")
    parser.add_argument("--rows", type=int, default=2, help="sequences on the chip (default: 2)")
    parser.add_argument("--length", type=int, default=4096, help="tokens of each (default: 4096)")
    parser.add_argument("--dim", type=int, default=4096, help="width of the model (default: 4096)")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="pieces (default: 32000)")
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 512, 1024, 2048], help="train.loss_chunk to try")
    parser.add_argument("--json", action="store_true", help="print JSON lines only")
    options = parser.parse_args()
    name, devices = options.topology.split(":")[0], devices_of(options.topology, 1)
    mesh = Mesh(np.array(devices[:1]).reshape(1, 1, 1, 1), AXES)
    model = ModelConfig(1, options.dim, 1, 1, 128, options.vocabulary)
    ways: dict[str, Loss] = {f"chunks of {chunk}": ours(chunk) for chunk in options.chunks}
    if tokamax_kernel is not None:
        ways["tokamax"] = tokamax(block=2048 if name == "v6e" else 512)  # of the vocabulary, as it chooses itself
    tokens = options.rows * options.length
    ideal = 6 * tokens * options.dim * options.vocabulary / PEAK_FLOPS[devices[0].device_kind]
    for way, loss in ways.items():
        step = compiled(loss, model, options.rows, options.length, mesh)
        work = Program(step.as_text()).work(taken_in({"": 1.0}))
        found = {
            "way": way, "topology": options.topology, "tokens": tokens,
            "temporaries": step.memory_analysis().temp_size_in_bytes,
            "products": work.flops / (tokens * options.dim * options.vocabulary),
            "seconds_at_peak": ideal, "estimate": work.cycles / CHIPS[name].clock,
        }  # fmt: skip
        if options.json:
            print(json.dumps(found))
            continue
        said = f"{found['temporaries'] / 1e6:7.0f} MB of temporaries, "
        if way == "tokamax":
            print(f"{way:16}{said}8 D V a token by its source, {ideal * 8 / 6 * 1e3:.1f} ms at the peak; no estimate")
        else:
            print(f"{way:16}{said}{found['products']:.0f} D V a token, {ideal * 1e3:.1f} ms at the peak; "
                  f"estimate {found['estimate'] * 1e3:6.1f} ms, {ideal / found['estimate']:.0%}")  # fmt: skip


if __name__ == "__main__":
    main()
