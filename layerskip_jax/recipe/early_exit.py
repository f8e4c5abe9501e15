"""Early-exit loss: LayerSkip eq. 5-6 as pure functions of numbers.

    J(t) = sum_l w(t,l) CE(g(x_{l+1}), Y)                         (eq. 5)
    w(t,l) = C(t,l) e(l) / sum_i C(t,i) e(i)                      (eq. 6)

w(t, l) weights the *output* of block l, which is "exit l+1": the model that runs blocks 0..l, then the head g.
``C`` is a `Curriculum`: any pure function of the same signature can take its place in a
`layerskip_jax.recipe.recipe.Recipe`. t counts optimizer steps over the whole run, also across restarts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from layerskip_jax.model import negative_log_likelihood

Curriculum = Callable[[ArrayLike, int, int], jax.Array]
"""``(step t, total_steps T, num_layers L) -> C_L``, 1 where the exit after block l has a loss at step t, else 0."""

ExitScale = Callable[[int], jax.Array]
"""``num_layers L -> e_L``, the weight of each exit before eq. 6 normalizes them; not negative."""

Unembed = Callable[[jax.Array], jax.Array]
"""``g(x)``: the final norm and the head."""

ExitLoss = Callable[[Unembed, jax.Array, jax.Array, jax.Array, Any], jax.Array]
"""``(g, x_BCD, targets_BC, mask_BC, teacher) -> loss``: the loss of an exit, summed over counted positions [nats].

``g(x_BCD)`` returns the logits of C positions of each sequence. ``teacher`` holds the arrays of `Recipe.teacher` at
these positions, or None if the recipe has no teacher. `Recipe.distillation` gets ``(x_L, m)`` instead, and
`Recipe.agreement` gets ``(x_E, a)``. This x is detached. `Taught` detaches ``g(x)`` only if g gets this very array:
with a copy, a cast or a slice of x, the head would get a gradient from the teacher.
"""


def cross_entropy(
    g: Unembed, x_BCD: jax.Array, targets_BC: jax.Array, mask_BC: jax.Array, teacher: Any = None
) -> jax.Array:
    """``CE(g(x), Y)`` of eq. 5: the sum over counted positions of ``-log softmax(g(x))[target]`` [nats]."""
    return jnp.sum(negative_log_likelihood(g(x_BCD), targets_BC) * mask_BC)


@dataclasses.dataclass(frozen=True)
class PaperScale:
    """``e(l) = e_scale l(l+1)/2`` for l < L-1, ``e(L-1) = (L-1) + e_scale (L-2)(L-1)/2`` (LayerSkip section 4.1.2).

    Block 0 has weight 0 and later blocks weigh more; ``e_scale = 0`` is the ordinary loss of the last layer.

    >>> PaperScale(e_scale=1.0)(num_layers=4).tolist()
    [0.0, 1.0, 3.0, 6.0]
    """

    e_scale: float

    def __call__(self, num_layers: int) -> jax.Array:
        last, layer_L = num_layers - 1, jnp.arange(num_layers, dtype=jnp.float32)
        inner_L = self.e_scale * layer_L * (layer_L + 1) / 2
        return inner_L.at[last].set(last + self.e_scale * (last - 1) * last / 2 if last else 1.0)


@dataclasses.dataclass(frozen=True)
class ChosenScale:
    """``e(l) = weights[k]`` if exit l+1 is ``exits[k]``, 1 at the last exit, and 0 elsewhere (not in the paper).

    >>> ChosenScale(exits=(2,), weights=(0.5,))(4).tolist()
    [0.0, 0.5, 0.0, 1.0]
    """

    exits: tuple[int, ...]
    weights: tuple[float, ...]

    def __call__(self, num_layers: int) -> jax.Array:
        return jnp.zeros(num_layers).at[_blocks(self.exits)].set(jnp.array(self.weights)).at[num_layers - 1].set(1)


def exit_weights(enabled_L: jax.Array, scale_L: jax.Array) -> jax.Array:
    """``w = C e / sum(C e)`` (LayerSkip eq. 6); all 0 if no exit that is on has a scale above 0."""
    weight_L = enabled_L * scale_L
    total = jnp.sum(weight_L)
    return weight_L / jnp.where(total > 0, total, 1)


@dataclasses.dataclass(frozen=True)
class Rotational:
    """Turn the exit after block l on if ``l mod R = t mod R``, where R is ``dilation`` (LayerSkip section 4.1.2).

    At each step, about L/R exits are on. Each exit is on once in R steps. ``always_last`` keeps the last exit on at
    every step. If ``exits`` is given, only these take turns, and all others stay off: ``exits[k]`` is on if
    ``k mod R = t mod R``; k counts from 0 (not in the paper).
    """

    dilation: int
    always_last: bool = True
    exits: tuple[int, ...] = ()

    def __call__(self, step: ArrayLike, total_steps: int, num_layers: int) -> jax.Array:
        layer_L, turn = jnp.arange(num_layers), jnp.asarray(step) % self.dilation
        on_L = layer_L % self.dilation == turn
        if self.exits:
            on_K = jnp.arange(len(self.exits)) % self.dilation == turn
            on_L = jnp.zeros(num_layers, bool).at[_blocks(self.exits)].set(on_K)
        return (on_L | (self.always_last & (layer_L == num_layers - 1))).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class FixedExits:
    """``exits`` and the last exit, at every step (not in the paper)."""

    exits: tuple[int, ...]

    def __call__(self, step: ArrayLike, total_steps: int, num_layers: int) -> jax.Array:
        return jnp.zeros(num_layers).at[_blocks((*self.exits, num_layers))].set(1)


def gradual(step: ArrayLike, total_steps: int, num_layers: int) -> jax.Array:
    """Turn the exit after block l on from step ``(L-1-l) T/(2L)``: one more every T/(2L) steps (section 4.1.2)."""
    layer_L = jnp.arange(num_layers)
    # Compare integers: rounding T/(2L) to a float could turn an exit on a step early or late.
    on_L = 2 * num_layers * jnp.asarray(step) >= (num_layers - 1 - layer_L) * total_steps
    return on_L.astype(jnp.float32)


def all_exits(step: ArrayLike, total_steps: int, num_layers: int) -> jax.Array:
    """Every exit at every step, ``C = 1``: slow, and it hurts the last layer (LayerSkip section 4.1.2)."""
    return jnp.ones(num_layers)


def last_only(step: ArrayLike, total_steps: int, num_layers: int) -> jax.Array:
    """The last layer only: an ordinary language model."""
    return jnp.zeros(num_layers).at[num_layers - 1].set(1)


def _blocks(exits: tuple[int, ...]) -> jax.Array:
    """Return the index of the block before each exit: exit l+1 follows block l."""
    return jnp.array(exits, jnp.int32) - 1
