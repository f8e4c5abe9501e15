"""How large `benchmarks.accelerator` measures, how long it may take, and what its parts know of each other."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from layerskip_jax.config import ModelConfig

Measured = dict[str, Any]


def llama(layers: int, dim: int, heads: int, ffn_dim: int, vocab_size: int, dtype: str) -> ModelConfig:
    return ModelConfig(layers, dim, heads, heads, ffn_dim, vocab_size, compute_dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The shapes of every part. ``FULL`` is for accelerators; ``TINY`` shows on any machine that all parts run."""

    matmul: int
    """Rows and columns of the matrices in ``rates``."""
    matmul_dtype: str
    megabytes: int
    """The array that ``rates`` copies and reads: larger than any cache."""
    attention: tuple[int, int, int, int]
    """Batch, length, heads and head width."""
    models: dict[str, ModelConfig]
    """Models to train a step of, largest first: the first that fits is timed."""
    length: int
    """Tokens in a training sequence."""
    rows: tuple[int, ...]
    """Sequences on a device in a training step, most first."""
    turns: int
    """Timed steps of each recipe."""
    decoder: ModelConfig
    exit_layer: int
    draft_length: int
    cache: int
    """Positions of the cache in ``decoding``."""
    new_tokens: int
    repeats: int
    """Timed generations of each way to decode."""
    trained: ModelConfig
    trained_rows: int
    trained_length: int
    trained_seconds: float
    """Optimizer steps of ``trained`` take so long at most."""
    trained_epochs: int
    """And so many passes over the corpus, after which the model would only learn it by heart."""
    speculation: tuple[tuple[int, int], ...]
    """Exit layers and draft lengths to time in ``trained``, while time is left."""
    needs: dict[str, float]
    """Seconds without which a part is not begun, by section: our estimate of what it takes, compilation included."""


FULL = Sizes(
    matmul=8192,
    matmul_dtype="bfloat16",
    megabytes=2048,
    attention=(1, 4096, 16, 128),
    models={
        "1.5B": llama(24, 2048, 16, 5632, 32_000, "bfloat16"),  # configs/scratch_1b5.py
        "0.8B": llama(24, 1536, 12, 4224, 32_000, "bfloat16"),
        "0.4B": llama(24, 1024, 8, 2816, 32_000, "bfloat16"),
        "0.1B": llama(12, 768, 6, 2048, 32_000, "bfloat16"),
    },
    length=4096,
    rows=(8, 4, 2, 1),
    turns=10,
    decoder=llama(24, 2048, 16, 5632, 32_000, "bfloat16"),
    exit_layer=8,
    draft_length=6,
    cache=512,
    new_tokens=256,
    repeats=3,
    trained=llama(12, 768, 12, 2048, 4096, "bfloat16"),
    trained_rows=64,
    trained_length=512,
    trained_seconds=600.0,
    trained_epochs=8,
    speculation=((3, 4), (2, 3), (4, 6)),
    needs={"rates": 15.0, "attention": 30.0, "training": 120.0, "decoding": 60.0, "trained": 100.0},
)

TINY = Sizes(
    matmul=256,
    matmul_dtype="float32",
    megabytes=16,
    attention=(1, 128, 2, 16),
    models={"tiny": llama(3, 32, 2, 64, 128, "float32")},
    length=64,
    rows=(2,),
    turns=3,
    decoder=llama(2, 32, 2, 64, 128, "float32"),
    exit_layer=1,
    draft_length=3,
    cache=128,
    new_tokens=40,
    repeats=1,
    trained=llama(3, 32, 2, 64, 512, "float32"),
    trained_rows=8,
    trained_length=64,
    trained_seconds=1.0,
    trained_epochs=1,
    speculation=((1, 2),),
    needs={"rates": 1.0, "attention": 2.0, "training": 5.0, "decoding": 5.0, "trained": 10.0},
)


@dataclasses.dataclass
class Bench:
    """What a part is given: its sizes, the time that is left, and what was measured before it."""

    sizes: Sizes
    ends: float
    """On the clock of `time.monotonic`."""
    measured: dict[str, Measured] = dataclasses.field(default_factory=dict)

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.ends - time.monotonic()

    def rate(self, name: str) -> float | None:
        """Return a rate that ``rates`` has measured, or None if it has not."""
        return self.measured.get("rates", {}).get(name)


def seconds_of(call: Callable[[], Any], calls: int, repeats: int) -> float:
    """Return the least seconds that a call takes, of ``repeats`` rows of ``calls``, after one that compiles.

    Within a row the host does not wait, so that starting a call overlaps with the device's work on the one before.
    """
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(calls):
            last = call()
        jax.block_until_ready(last)
        seconds.append((time.perf_counter() - began) / calls)
    return min(seconds)
