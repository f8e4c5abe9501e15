"""Layer dropout that does not compute what it drops, in the forward and the backward pass, with static shapes.

Each device sorts its own R sequences, kept ones first, and splits them into I groups of J. A loop runs the block on the
first ceil(kept / J) groups; this trip count is only known at run time. JAX cannot differentiate such a loop in reverse
mode, so a second loop over the same groups computes the backward pass. It reads the residuals of `jax.vjp` (all of
them, or those that `jax.checkpoint` saves) from arrays with one slot per group, which the first loop wrote. Residuals
that do not depend on the rows, such as weights in the compute dtype, are computed again.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layerskip_jax.recipe.layer_dropout import BlockFunction, Rows, apply_masked
from layerskip_jax.sharding import on_each_device


def apply_skipping(
    f: BlockFunction, weights: Any, rows: Rows, keep_B: jax.Array, scale: jax.Array, *, groups: int
) -> jax.Array:
    """Return what `apply_masked` returns, but run ``f`` only on the groups of rows that contain a kept row.

    ``groups`` must divide the rows of a device. No row moves to another device. Devices wait for each other at the
    next collective, so each should keep the same number of rows (`sample_dropout_mask` with ``shards``).
    """
    loop = _GroupLoop(f, groups)

    @jax.custom_vjp
    def run(weights: Any, *inputs: jax.Array) -> jax.Array:
        return on_devices(loop.forward)(weights, *inputs)

    def forward(weights: Any, *inputs: jax.Array) -> tuple[jax.Array, Any]:
        out_BTD, residuals = on_devices(loop.forward_with_residuals)(weights, *inputs)
        return out_BTD, (weights, inputs[1:], residuals)

    def backward(saved: Any, d_out_BTD: jax.Array) -> tuple[Any, ...]:
        weights, inputs, residuals = saved
        d_weights, d_x_BTD = on_devices(loop.backward, residuals)(weights, d_out_BTD, *inputs, residuals)
        # Sum over the devices once, after the loop, and not in every iteration.
        return jax.tree.map(lambda parts: jnp.sum(parts, axis=0), d_weights), d_x_BTD, None, None, None

    def on_devices(loop: Callable[..., Any], *residuals: Any) -> Callable[..., Any]:
        replicated, batch = (), ("batch",)
        inputs = [replicated, batch, batch, batch, replicated, *(batch for _ in residuals)]
        return on_each_device(loop, inputs, batch, along=batch)

    run.defvjp(forward, backward)
    return run(weights, *rows, keep_B, jnp.asarray(scale))


class _Groups(NamedTuple):
    """The rows of each group, kept rows first, and the number of groups that contain a kept row."""

    row_IJ: jax.Array
    needed: jax.Array

    @classmethod
    def create(cls, keep_R: jax.Array, groups: int) -> "_Groups":
        row_IJ = jnp.argsort(~keep_R, stable=True).reshape(groups, -1)
        return cls(row_IJ, -(-jnp.sum(keep_R) // row_IJ.shape[1]))

    def read(self, array: jax.Array, i: jax.Array) -> jax.Array:
        """Return the rows of group ``i``. Slice them, because XLA:CPU gathers element by element."""
        return jnp.concatenate([jax.lax.dynamic_slice_in_dim(array, row, 1) for row in self.row_IJ[i]])

    def write(self, array: jax.Array, i: jax.Array, values: jax.Array) -> jax.Array:
        """Return ``array`` with the rows of group ``i`` replaced."""
        for place, row in enumerate(self.row_IJ[i]):
            array = jax.lax.dynamic_update_slice_in_dim(array, values[place : place + 1], row, 0)
        return array


@dataclasses.dataclass(frozen=True)
class _GroupLoop:
    """The loops over groups on one device; ``scale`` is a scalar and the other arrays are the device's rows."""

    f: BlockFunction
    groups: int

    def forward(
        self, weights: Any, x_RTD: jax.Array, segments_RT: jax.Array, keep_R: jax.Array, scale: jax.Array
    ) -> jax.Array:
        """Return ``out_RTD``."""
        groups = _Groups.create(keep_R, self.groups)

        def run_group(i: jax.Array, out_RTD: jax.Array) -> jax.Array:
            x_JTD, segments_JT, keep_J = (groups.read(array, i) for array in (x_RTD, segments_RT, keep_R))
            return groups.write(out_RTD, i, apply_masked(self.f, weights, (x_JTD, segments_JT), keep_J, scale))

        return jax.lax.fori_loop(0, groups.needed, run_group, x_RTD)

    def forward_with_residuals(
        self, weights: Any, x_RTD: jax.Array, segments_RT: jax.Array, keep_R: jax.Array, scale: jax.Array
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Return ``out_RTD``, and the residuals that depend on the rows, each ``[groups, ...]``."""
        groups = _Groups.create(keep_R, self.groups)

        def run_group(i: jax.Array, carry: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
            # Read the rows from x_RTD, although out_RTD still holds the same values for them. XLA can then remove
            # out_RTD when `jax.checkpoint` reruns this loop only for the residuals.
            out_RTD, saved = carry
            x_JTD, segments_JT, keep_J = (groups.read(array, i) for array in (x_RTD, segments_RT, keep_R))
            out_JTD, pullback = self._vjp(weights, x_JTD, segments_JT, keep_J, scale)
            leaves = [leaf for leaf, varies in zip(jax.tree.leaves(pullback), by_row, strict=True) if varies]
            store = partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
            return groups.write(out_RTD, i, out_JTD), [store(*pair) for pair in zip(saved, leaves, strict=True)]

        shapes, by_row = self._residual_shapes(weights, x_RTD, segments_RT, keep_R, scale)
        stored = [shape for shape, varies in zip(shapes, by_row, strict=True) if varies]
        slots = [jnp.zeros((self.groups, *shape.shape), shape.dtype) for shape in stored]
        return jax.lax.fori_loop(0, groups.needed, run_group, (x_RTD, slots))

    def backward(
        self,
        weights: Any,
        d_RTD: jax.Array,
        segments_RT: jax.Array,
        keep_R: jax.Array,
        scale: jax.Array,
        residuals: list[jax.Array],
    ) -> tuple[Any, jax.Array]:
        """Return ``d_weights``, with a leading axis of size 1 for the devices, and ``d_x_RTD``."""
        groups = _Groups.create(keep_R, self.groups)
        _, by_row = self._residual_shapes(weights, d_RTD, segments_RT, keep_R, scale)

        def run_group(i: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            d_RTD, d_weights = carry
            d_JTD, segments_JT, keep_J = (groups.read(array, i) for array in (d_RTD, segments_RT, keep_R))
            # Rebuild the pullback for its residuals that do not depend on the rows, such as weights in the compute
            # dtype. The others are replaced by the stored ones, so XLA drops their computation.
            _, pullback = self._vjp(weights, jnp.zeros_like(d_JTD), segments_JT, keep_J, scale)
            rebuilt, structure = jax.tree.flatten(pullback)
            stored = iter(residuals)
            leaves = [next(stored)[i] if varies else leaf for leaf, varies in zip(rebuilt, by_row, strict=True)]
            group_d_weights, d_JTD = jax.tree.unflatten(structure, leaves)(d_JTD)
            return groups.write(d_RTD, i, d_JTD), jax.tree.map(jnp.add, d_weights, group_d_weights)

        zeros = jax.tree.map(jnp.zeros_like, weights)
        d_RTD, d_weights = jax.lax.fori_loop(0, groups.needed, run_group, (d_RTD, zeros))
        return jax.tree.map(lambda total: total[None], d_weights), d_RTD

    def _vjp(
        self, weights: Any, x_JTD: jax.Array, segments_JT: jax.Array, keep_J: jax.Array, scale: jax.Array
    ) -> tuple[jax.Array, Callable[[jax.Array], tuple[Any, jax.Array]]]:
        return jax.vjp(lambda w, x: apply_masked(self.f, w, (x, segments_JT), keep_J, scale), weights, x_JTD)

    def _residual_shapes(
        self, weights: Any, x_RTD: jax.Array, segments_RT: jax.Array, keep_R: jax.Array, scale: jax.Array
    ) -> tuple[list[jax.ShapeDtypeStruct], list[bool]]:
        """Return the shape of each residual of a group's pullback, and whether it depends on the rows.

        A residual depends on the rows if its shape changes with their number. A scalar computed from the rows would be
        missed and give a wrong gradient. A block has none: its rows are independent of each other (`BlockFunction`).
        """

        def shapes(rows: int) -> list[jax.ShapeDtypeStruct]:
            arrays = [jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype) for a in (x_RTD, segments_RT, keep_R)]
            return jax.eval_shape(lambda *arrays: jax.tree.leaves(self._vjp(*arrays)[1]), weights, *arrays, scale)

        J = x_RTD.shape[0] // self.groups
        group, larger = shapes(J), shapes(J + 1)
        return group, [a.shape != b.shape for a, b in zip(group, larger, strict=True)]
