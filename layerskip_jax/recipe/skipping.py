"""Layer dropout that does not compute what it drops, forward or backward, under static shapes.

On each device a loop takes the kept rows through the block, a group of rows at a turn, and leaves the others where
they are; how often it turns is known only while the program runs. JAX does not differentiate such a loop, so the
backward pass is written here: a second loop over the same rows. What it needs of the forward pass (what `jax.vjp`
keeps, or what `jax.checkpoint` leaves of that) lies in arrays with a place for every group, and only those of kept rows
are written.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layerskip_jax.recipe.layer_dropout import BlockFunction, Rows, apply_masked
from layerskip_jax.sharding import on_each_device


def apply_skipping(
    f: BlockFunction, weights: Any, rows: Rows, kept_B: jax.Array, scale: jax.Array, *, groups: int
) -> jax.Array:
    """Return what `apply_masked` returns, but run ``f`` only on as many of ``groups`` groups as hold the kept rows.

    Every device does so with its own rows, which ``groups`` divides, so no row moves to another. Devices wait for each
    other at the next collective, so draw alike for all of them (`draw_kept`).
    """

    @jax.custom_vjp
    def run(weights: Any, *inputs: jax.Array) -> jax.Array:
        return by_device(partial(_forward, f, groups))(weights, *inputs)

    def forward(weights: Any, *inputs: jax.Array) -> tuple[jax.Array, Any]:
        out_BTD, saved = by_device(partial(_forward_saving, f, groups))(weights, *inputs)
        return out_BTD, (weights, inputs[1:], saved)

    def backward(kept: Any, d_out_BTD: jax.Array) -> tuple[Any, ...]:
        weights, inputs, saved = kept
        d_weights, d_x_BTD = by_device(partial(_backward, f, groups), saved)(weights, d_out_BTD, *inputs, saved)
        # Over devices, added up once and not at every turn of the loop.
        return jax.tree.map(lambda parts: jnp.sum(parts, axis=0), d_weights), d_x_BTD, None, None, None

    def by_device(loop: Callable[..., Any], *more: Any) -> Callable[..., Any]:
        whole, rows = (), ("batch",)
        return on_each_device(loop, [whole, rows, rows, rows, whole, *(rows for _ in more)], rows, along=rows)

    run.defvjp(forward, backward)
    return run(weights, *rows, kept_B, jnp.asarray(scale))


class _Turns(NamedTuple):
    """Which rows each turn of the loop takes, kept ones first, and how many turns are needed."""

    row_NG: jax.Array
    needed: jax.Array

    @classmethod
    def of(cls, kept_R: jax.Array, groups: int) -> "_Turns":
        row_NG = jnp.argsort(~kept_R, stable=True).reshape(groups, -1)
        return cls(row_NG, -(-jnp.sum(kept_R) // row_NG.shape[1]))

    def take(self, array: jax.Array, turn: jax.Array) -> jax.Array:
        """Return this turn's rows. Slices, for XLA:CPU gathers element by element."""
        return jnp.concatenate([jax.lax.dynamic_slice_in_dim(array, row, 1) for row in self.row_NG[turn]])

    def put(self, array: jax.Array, turn: jax.Array, rows: jax.Array) -> jax.Array:
        for place, row in enumerate(self.row_NG[turn]):
            array = jax.lax.dynamic_update_slice_in_dim(array, rows[place : place + 1], row, 0)
        return array


def _forward(f: BlockFunction, groups: int, weights: Any, x_RTD: jax.Array, *others: jax.Array) -> jax.Array:
    """Return ``out_RTD`` of a device's own rows."""
    segments_RT, kept_R, scale = others
    turns = _Turns.of(kept_R, groups)

    def turn(t: jax.Array, out_RTD: jax.Array) -> jax.Array:
        x_GTD, segments_GT, kept_G = (turns.take(array, t) for array in (x_RTD, segments_RT, kept_R))
        return turns.put(out_RTD, t, apply_masked(f, weights, (x_GTD, segments_GT), kept_G, scale))

    return jax.lax.fori_loop(0, turns.needed, turn, x_RTD)


def _forward_saving(
    f: BlockFunction, groups: int, weights: Any, x_RTD: jax.Array, *others: jax.Array
) -> tuple[jax.Array, list[jax.Array]]:
    """Return ``out_RTD`` and, [groups, ...] each, what the pullbacks of the turns keep of their rows."""
    segments_RT, kept_R, scale = others
    turns = _Turns.of(kept_R, groups)

    def turn(t: jax.Array, carry: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
        # Rows come from x and not from the output, so a recomputation that needs only `saved` drops the output.
        out_RTD, saved = carry
        x_GTD, segments_GT, kept_G = (turns.take(array, t) for array in (x_RTD, segments_RT, kept_R))
        out_GTD, pullback = _vjp(f, weights, x_GTD, segments_GT, kept_G, scale)
        leaves = [leaf for leaf, varies in zip(jax.tree.leaves(pullback), of_rows, strict=True) if varies]
        write = partial(jax.lax.dynamic_update_index_in_dim, index=t, axis=0)
        return turns.put(out_RTD, t, out_GTD), [write(*pair) for pair in zip(saved, leaves, strict=True)]

    shapes, of_rows = _kept_by_pullback(f, weights, turns, x_RTD, *others)
    places = [jnp.zeros((groups, *s.shape), s.dtype) for s, varies in zip(shapes, of_rows, strict=True) if varies]
    return jax.lax.fori_loop(0, turns.needed, turn, (x_RTD, places))


def _backward(f: BlockFunction, groups: int, weights: Any, d_RTD: jax.Array, *others: Any) -> tuple[Any, jax.Array]:
    """Return the gradients ``d_weights``, with an axis before it for the devices, and ``d_x_RTD``."""
    segments_RT, kept_R, scale, saved = others
    turns = _Turns.of(kept_R, groups)
    _, of_rows = _kept_by_pullback(f, weights, turns, d_RTD, segments_RT, kept_R, scale)

    def turn(t: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        d_RTD, d_weights = carry
        d_GTD, segments_GT, kept_G = (turns.take(array, t) for array in (d_RTD, segments_RT, kept_R))
        # Made again for what does not come from the rows, the weights in the compute type; the rest is put in from the
        # forward pass, so the compiler drops its computation.
        _, pullback = _vjp(f, weights, jnp.zeros_like(d_GTD), segments_GT, kept_G, scale)
        made, structure = jax.tree.flatten(pullback)
        stored = iter(saved)
        leaves = [next(stored)[t] if varies else leaf for leaf, varies in zip(made, of_rows, strict=True)]
        more, d_GTD = jax.tree.unflatten(structure, leaves)(d_GTD)
        return turns.put(d_RTD, t, d_GTD), jax.tree.map(jnp.add, d_weights, more)

    zeros = jax.tree.map(jnp.zeros_like, weights)
    d_RTD, d_weights = jax.lax.fori_loop(0, turns.needed, turn, (d_RTD, zeros))
    return jax.tree.map(lambda total: total[None], d_weights), d_RTD


def _vjp(
    f: BlockFunction, weights: Any, x_GTD: jax.Array, segments_GT: jax.Array, kept_G: jax.Array, scale: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array], tuple[Any, jax.Array]]]:
    return jax.vjp(lambda weights, x: apply_masked(f, weights, (x, segments_GT), kept_G, scale), weights, x_GTD)


def _kept_by_pullback(
    f: BlockFunction, weights: Any, turns: _Turns, *inputs: jax.Array
) -> tuple[list[jax.ShapeDtypeStruct], list[bool]]:
    """Return the shapes of what a pullback keeps, and which of it comes from the rows: what grows with their number."""

    def shapes(rows: int) -> list[jax.ShapeDtypeStruct]:
        *of_rows, scale = inputs
        taken = [jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype) for array in of_rows]
        return jax.eval_shape(lambda *arrays: jax.tree.leaves(_vjp(f, *arrays)[1]), weights, *taken, scale)

    size = turns.row_NG.shape[1]
    kept, larger = shapes(size), shapes(size + 1)
    return kept, [a.shape != b.shape for a, b in zip(kept, larger, strict=True)]
