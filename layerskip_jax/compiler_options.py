"""XLA options of the training step on each kind of TPU, and of decoding on a CPU and a TPU v5e.

An option of these tables is dropped if the installed compiler rejects it. The options for TPUs overlap collectives with
matmuls and enlarge tiles. Async collective fusion (``xla_tpu_enable_async_collective_fusion``) is left out: libtpu
0.0.44 and newer reject it on every chip but v5e, because it may give wrong results.
"""

import functools
import re
import warnings
from typing import TYPE_CHECKING

from layerskip_jax.errors import UserError

if TYPE_CHECKING:
    import jax

Options = dict[str, str]

# All-gather sharded weights in one piece. By default the partitioner splits a matmul into one narrow matmul per shard
# and overlaps it with the transfer of the next shard, but the matrix unit runs narrow matmuls at a third of its speed.
WHOLE_MATMULS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}

# Run collectives on the SparseCores, so that they overlap matmuls. On a v6e this also turns the all-reduce of a 7B
# model's gradients into a reduce-scatter, which moves half the bytes.
SPARSE_CORE = dict.fromkeys(
    (
        "xla_tpu_enable_sparse_core_collective_offload_all_gather",
        "xla_tpu_enable_sparse_core_collective_offload_all_reduce",
        "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter",
        "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
    ),
    "true",
)


def vmem_limit(kib: int) -> Options:
    """Let one fusion use up to ``kib`` of vector memory, for larger tiles: matmuls then read operands fewer times.

    The default is 16 MiB. A v5e or v6e has 128 MiB, and each core of a v5p 64 MiB. Compiling takes longer.
    """
    return {"xla_tpu_scoped_vmem_limit_kib": str(kib)}


STEP_OPTIONS: dict[str, Options] = {
    "TPU v4": WHOLE_MATMULS,
    "TPU v5 lite": WHOLE_MATMULS | vmem_limit(64 * 1024),
    "TPU v5": WHOLE_MATMULS | SPARSE_CORE | vmem_limit(48 * 1024),  # v5p
    "TPU v5p": WHOLE_MATMULS | SPARSE_CORE | vmem_limit(48 * 1024),
    "TPU v6 lite": WHOLE_MATMULS | SPARSE_CORE | vmem_limit(96 * 1024),
    "TPU7x": WHOLE_MATMULS | SPARSE_CORE,
}

WITHOUT_YNNPACK: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": ""}

# With these options, most texts of speculative decoding in bfloat16 on a CPU equal those of plain decoding
# (benchmarks/bfloat16.py counts the others). Without excess precision, each operation rounds its result, fused or not.
# YNNPACK is off, because it rounds differently.
ROUNDS_OPTIONS: dict[tuple[str, str], dict[str, str | bool]] = {
    ("cpu", "bfloat16"): {"xla_allow_excess_precision": False, **WITHOUT_YNNPACK},
}

YNNPACK_LIMIT = 128e6
"""A CPU decodes without YNNPACK if the weights of a model take more bytes than this.

YNNPACK copies the weights into a layout of its own in every pass. That costs little while they stay in the processor's
cache. ``python -m benchmarks.decoding ynnpack`` compares (results: docs/results/decoding.md).
"""


TPU_ROUNDS_OPTIONS: dict[str, Options] = {"TPU v5 lite": vmem_limit(40 * 1024)}
"""Options of decoding's rounds by kind of TPU: a round of the 7B gets 9 % faster (docs/tpu_decoding.md)."""


def rounds_options(platform: str, device_kind: str, dtype: str, weight_bytes: float) -> dict[str, str | bool]:
    """Return the options of decoding's rounds, for a model whose weights take ``weight_bytes``.

    Leaves out options that the installed compiler does not know. If ``platform`` is not JAX's default backend, as when
    a CPU host compiles for a TPU, the options cannot be tried, so all are returned.
    """
    import jax  # imported late: `layerskip_jax.config` imports this module, and --help must not wait for JAX

    options = ROUNDS_OPTIONS.get((platform, dtype), {}) | TPU_ROUNDS_OPTIONS.get(device_kind, {})
    if platform == "cpu" and weight_bytes > YNNPACK_LIMIT:
        options = options | WITHOUT_YNNPACK
    here = platform == jax.default_backend()
    return {name: value for name, value in options.items() if not here or _is_known(name, value)}


@functools.cache
def _is_known(name: str, value: str | bool) -> bool:
    import jax

    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def parse_options(text: str) -> Options:
    """Parse ``name=value,name=value``, the form of ``train.compiler_options``; raise `UserError` on another form.

    >>> parse_options("xla_a=true,xla_b=off")
    {'xla_a': 'true', 'xla_b': 'off'}
    """
    options = {}
    for word in filter(None, text.replace(" ", "").split(",")):
        found = re.fullmatch(r"(xla\w+)=([^=;]+)", word)
        if not found:
            raise UserError(f"train.compiler_options must be written xla_NAME=VALUE,xla_NAME=VALUE, not {word!r}")
        options[found[1]] = found[2]
    return options


def compile_step(lowered: "jax.stages.Lowered", device_kind: str, chosen: str = "") -> "jax.stages.Compiled":
    """Compile a training step with the options for ``device_kind``, and with ``chosen`` on top.

    ``chosen`` is ``train.compiler_options``; the value ``off`` removes an option of the table. If the compiler rejects
    an option of the table, it is dropped with a warning; if it rejects a chosen one, `UserError` is raised.
    """
    import jax

    more = parse_options(chosen)
    options = {name: value for name, value in (STEP_OPTIONS.get(device_kind, {}) | more).items() if value != "off"}
    while True:
        try:
            return lowered.compile(compiler_options=dict(options))
        except jax.errors.JaxRuntimeError as error:
            line = (str(error).splitlines() or [""])[0]
            rejected = _rejected_options(line, options)
            if not rejected:
                raise
            if wrong := [name for name in rejected if name in more]:
                raise UserError(f"train.compiler_options: the compiler rejects {', '.join(wrong)}: {line}") from error
            warnings.warn(f"compiling the step without {', '.join(rejected)}: {line}", stacklevel=2)
            options = {name: value for name, value in options.items() if name not in rejected}


def _rejected_options(message: str, options: Options) -> list[str]:
    """Return the options that, by its message, the compiler does not know, cannot parse or does not support."""
    if not any(words in message for words in ("No such compile option", "Failed to parse", "not supported")):
        return []
    return [name for name in options if re.search(rf"\b{name}\b", message)]
