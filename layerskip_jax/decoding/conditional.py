"""Conditions that leave the cache where it lies."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from layerskip_jax.attention import LayerCache
from layerskip_jax.model import Positions, Transformer

Carry = TypeVar("Carry")
Hidden = tuple[jax.Array, list[LayerCache]]


def run_if(condition: bool | jax.Array, run: Callable[[Carry], Carry], carry: Carry) -> Carry:
    """Return ``run(carry)`` if ``condition`` says so, else ``carry``.

    By a loop of one turn or none: a loop updates the cache in place, where XLA copies what a conditional returns.
    """
    if isinstance(condition, bool):
        return run(carry) if condition else carry
    return jax.lax.fori_loop(0, condition.astype(jnp.int32), lambda _, carry: run(carry), carry)


def run_blocks_if(
    condition: bool | jax.Array, model: Transformer, position: Positions, blocks: tuple[int, int], carry: Hidden
) -> Hidden:
    """Return ``x_BTD`` and the caches after ``blocks``, first to last (exclusive), or ``carry`` as it came in."""
    return run_if(condition, lambda carry: model.run_cached(carry[0], position, carry[1], *blocks), carry)
