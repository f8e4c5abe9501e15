"""Conditionals that do not copy the KV cache."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from layerskip_jax.cache import LayerCache
from layerskip_jax.model import Transformer
from layerskip_jax.rope import RotaryTables

Carry = TypeVar("Carry")
Hidden = tuple[jax.Array, list[LayerCache]]


def run_if(condition: bool | jax.Array, run: Callable[[Carry], Carry], carry: Carry) -> Carry:
    """Return ``run(carry)`` if ``condition`` is true, else ``carry``.

    Use this instead of `jax.lax.cond` when ``carry`` holds the KV cache: XLA copies the outputs of a conditional, but
    updates the carry of a loop in place. So this is a loop of one iteration or none. A Python bool is decided at trace
    time and compiles to no loop.
    """
    if isinstance(condition, bool):
        return run(carry) if condition else carry
    return jax.lax.fori_loop(0, condition.astype(jnp.int32), lambda _, carry: run(carry), carry)


def run_blocks_if(
    condition: bool | jax.Array, model: Transformer, rotary: RotaryTables, blocks: tuple[int, int], carry: Hidden
) -> Hidden:
    """Run blocks [first, last) on ``(x_BTD, layers)`` if ``condition`` is true, else return them unchanged."""
    return run_if(condition, lambda carry: model.run_cached(carry[0], rotary, carry[1], *blocks), carry)
