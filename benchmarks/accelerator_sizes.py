"""The sizes and time limits of `benchmarks.accelerator`, and the `Bench` that each part receives."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from layerskip_jax.config import ModelConfig
from layerskip_jax.errors import UserError
from layerskip_jax.presets import LAYERSKIP_1B5

Measured = dict[str, Any]


def llama(layers: int, dim: int, heads: int, ffn_dim: int, vocab_size: int, dtype: str) -> ModelConfig:
    return ModelConfig(layers, dim, heads, heads, ffn_dim, vocab_size, compute_dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of all parts: ``FULL`` for accelerators, ``TINY`` to test them on any machine."""

    matmul: int
    """Rows and columns of the matrices in ``rates``."""
    matmul_dtype: str
    megabytes: int
    """Size of the array that ``rates`` copies and reads: larger than any cache."""
    attention: tuple[int, int, int, int]
    """Batch, length, heads and head width."""
    models: dict[str, ModelConfig]
    """Models of ``training``, largest first; the first that fits is timed."""
    length: int
    """Tokens in a training sequence."""
    rows: tuple[int, ...]
    """Sequences per device in a training step, most first."""
    turns: int
    """Timed steps of each recipe."""
    decoder: ModelConfig
    exit_layer: int
    draft_length: int
    cache: int
    """Positions of the cache in ``decoding``."""
    new_tokens: int
    repeats: int
    """Timed generations of each strategy."""
    trained: ModelConfig
    trained_rows: int
    trained_length: int
    trained_seconds: float
    """Limit on the training time of ``trained``."""
    trained_epochs: int
    """Limit on its passes over the corpus, after which it would only memorize the corpus."""
    speculation: tuple[tuple[int, int], ...]
    """Pairs of exit layer and draft length that ``trained`` times while time is left."""
    needs: dict[str, float]
    """Estimated seconds per part of a section, compilation included; a part does not start with less time left."""


FULL = Sizes(
    matmul=8192,
    matmul_dtype="bfloat16",
    megabytes=2048,
    attention=(1, 4096, 16, 128),
    models={
        "1.5B": dataclasses.replace(LAYERSKIP_1B5, compute_dtype="bfloat16"),
        "0.8B": llama(24, 1536, 12, 4224, 32_000, "bfloat16"),
        "0.4B": llama(24, 1024, 8, 2816, 32_000, "bfloat16"),
        "0.1B": llama(12, 768, 6, 2048, 32_000, "bfloat16"),
    },
    length=4096,
    rows=(8, 4, 2, 1),
    turns=10,
    decoder=dataclasses.replace(LAYERSKIP_1B5, compute_dtype="bfloat16"),
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


class ImpossibleHereError(UserError):
    """This device cannot run the part at all, for example because the backend needs another platform."""


@dataclasses.dataclass
class Bench:
    """Arguments of a part: the sizes, the deadline, and the figures of earlier parts."""

    sizes: Sizes
    ends: float
    """The deadline, on the clock of `time.monotonic`."""
    measured: dict[str, Measured] = dataclasses.field(default_factory=dict)

    def left(self) -> float:
        """Return the seconds until the deadline."""
        return self.ends - time.monotonic()

    def rate(self, name: str) -> float | None:
        """Return a figure of ``rates``, or None if it was not measured."""
        return self.measured.get("rates", {}).get(name)


def seconds_of(call: Callable[[], Any], calls: int, repeats: int) -> float:
    """Return the seconds per call of the fastest of ``repeats`` batches of ``calls``, after one call that compiles.

    Within a batch the host does not wait, so that dispatching a call overlaps the device's work on the previous one.
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
