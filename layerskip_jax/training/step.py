"""One optimizer step and one evaluation, as pure functions: everything that is compiled for training."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerskip_jax.compiler_options import compile_step
from layerskip_jax.config import Config
from layerskip_jax.data.batch import Batch
from layerskip_jax.model import Transformer
from layerskip_jax.recipe.fused_exit_loss import Apply, Draw, exit_losses
from layerskip_jax.recipe.layer_dropout import apply_masked, draw_kept
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.recipe.skipping import apply_skipping
from layerskip_jax.sharding import batch_sharding, batch_shards, shardings_of
from layerskip_jax.training.optimizer import learning_rate, make_optimizer


@flax.struct.dataclass
class TrainState:
    """All that an optimizer step changes. Dropout keys, schedules and curricula follow from ``step`` and the config."""

    step: jax.Array
    model: Transformer
    opt_state: Any
    usual: jax.Array
    """Moving mean of the objective over the steps that were applied [nats]; 0 before the first."""


class StepMetrics(NamedTuple):
    """What one optimizer step reports; losses are means per counted token [nats]."""

    objective: jax.Array
    exit_loss_L: jax.Array
    exit_weight_L: jax.Array
    drop_rate_L: jax.Array
    gradient_norm: jax.Array
    gradient_norm_L: jax.Array
    learning_rate: jax.Array
    tokens: jax.Array
    applied: jax.Array
    """False where the step has changed nothing but the count of steps."""


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The compiled functions of a run: make a state, step it, evaluate it. Holds no state of its own."""

    config: Config
    recipe: Recipe
    mesh: Mesh

    def init(self, model: Transformer | None = None) -> TrainState:
        """Return the state before step 0 on the mesh: of ``model``, or of one made from ``config.train.seed``."""
        with jax.set_mesh(self.mesh):
            return self._init_on_mesh(model)

    @partial(jax.jit, static_argnums=0)
    def _init_on_mesh(self, model: Transformer | None) -> TrainState:
        return jax.lax.with_sharding_constraint(self._init(model), self.state_shardings())

    def abstract_state(self) -> TrainState:
        """Return the state's shapes and shardings without any array: what a checkpoint is restored into."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(self._init),
            self.state_shardings(),
        )

    def state_shardings(self) -> TrainState:
        state = jax.eval_shape(self._init)
        return shardings_of(state, state.model, self.mesh)

    def _init(self, model: Transformer | None = None) -> TrainState:
        if model is None:
            model = Transformer(self.config.model, rngs=nnx.Rngs(self.config.train.seed))
        opt_state = make_optimizer(self.config).init(model)
        return TrainState(jnp.zeros((), jnp.int32), model, opt_state, usual=jnp.zeros(()))

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """One optimizer step on ``batch``; compiled once for the whole run. ``state`` is donated.

        Where the objective or the gradient is not finite, or ``recipe.is_spike`` says so, parameters and optimizer
        stay what they were.
        """
        weight_L, drop_rate_L = self.recipe.exit_weights(state.step), self.recipe.drop_rates(state.step)
        count = jnp.maximum(jnp.sum(batch.mask_BT), 1)

        def objective(model: Transformer, micro: Batch, draw: Draw | None) -> tuple[jax.Array, jax.Array]:
            guide, fixed = self.recipe.guide, jax.lax.stop_gradient(model)
            total, loss_L = exit_losses(
                model,
                micro,
                weight_L,
                chunk=self.config.train.loss_chunk,
                draw=draw,
                apply=self._apply_dropout(),
                remat=self.config.train.remat,
                loss=self.recipe.exit_loss,
                guide=guide(fixed, micro.inputs_BT, micro.segments_BT) if guide else None,
            )
            # Divided by the tokens of the whole batch, so that microbatches add up to exactly the large batch.
            return total / count, loss_L / count

        gradient = jax.value_and_grad(objective, has_aux=True)
        draw = self._draw(state.step, drop_rate_L)
        if self.config.train.accumulate == 1:
            (value, exit_loss_L), grads = gradient(state.model, batch, draw)
        else:
            parts = self._split(batch), self._split_draw(draw)
            total = jax.eval_shape(gradient, state.model, *jax.tree.map(lambda part: part[0], parts))
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), total)

            def add(total: Any, part: Any) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, gradient(state.model, *part)), None

            ((value, exit_loss_L), grads), _ = jax.lax.scan(add, zeros, parts)

        updates, opt_state = make_optimizer(self.config).update(grads, state.opt_state, state.model)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        applied = finite & ~self.recipe.is_spike(value, norm, state.usual)
        metrics = StepMetrics(
            objective=value,
            exit_loss_L=exit_loss_L,
            exit_weight_L=weight_L,
            drop_rate_L=drop_rate_L,
            gradient_norm=norm,
            gradient_norm_L=_norm_by_layer(grads.blocks),
            # At the optimizer's own count, which stands still where a step is not applied.
            learning_rate=jnp.asarray(learning_rate(self.config)(_applied_steps(state.opt_state))),
            tokens=count,
            applied=applied,
        )
        new = optax.apply_updates(state.model, updates), opt_state, _moving_mean(state.usual, value)
        old = state.model, state.opt_state, state.usual
        # Not lax.cond, which would hold old and new side by side: a select fuses into the update.
        kept = jax.tree.map(lambda new, old: jnp.where(applied, new, old), new, old)
        state = TrainState(state.step + 1, *kept)
        # Pinned, since a layout that the compiler chose would compile the next step anew.
        whole = NamedSharding(self.mesh, PartitionSpec())  # so that every process can read them
        return jax.lax.with_sharding_constraint((state, metrics), (self.state_shardings(), whole))

    def compile_step(self) -> jax.stages.Compiled:
        """Compile `step` from shapes alone, for the devices of the mesh: the one program of a run.

        It is called as `step` is; its memory and text can be read without a run.
        """
        shape = (self.config.train.batch_size, self.config.data.sequence_length)
        types = Batch(jnp.int32, jnp.int32, jnp.int32, jnp.float32)
        batch = jax.tree.map(lambda t: jax.ShapeDtypeStruct(shape, t, sharding=batch_sharding(self.mesh)), types)
        with jax.set_mesh(self.mesh):
            lowered = Trainer.step.lower(self, self.abstract_state(), batch)
            kind = self.mesh.devices.flat[0].device_kind
            return compile_step(lowered, kind, self.config.train.compiler_options)

    def _draw(self, step: jax.Array, drop_rate_L: jax.Array) -> Draw | None:
        if self.recipe.p_max == 0:
            return None
        key = jax.random.fold_in(jax.random.key(self.config.train.seed), step)
        kept_LB = draw_kept(key, drop_rate_L, self.config.train.batch_size, batch_shards(self.mesh))
        scale_L = 1 / (1 - drop_rate_L) if self.config.layer_dropout.rescale else jnp.ones_like(drop_rate_L)
        return Draw(kept_LB, scale_L)

    def _apply_dropout(self) -> Apply:
        settings = self.config.layer_dropout
        if settings.form == "masked":
            return apply_masked
        return partial(apply_skipping, groups=settings.row_groups)

    def _split(self, batch: Batch) -> Batch:
        """[B, ...] -> [accumulate, B / accumulate, ...], every microbatch with rows of every shard: none moves."""
        parts = self.config.train.accumulate
        return jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)

    def _split_draw(self, draw: Draw | None) -> Draw | None:
        if draw is None:
            return None
        parts = self.config.train.accumulate
        kept_ALB = jnp.moveaxis(draw.kept_LB.reshape(draw.kept_LB.shape[0], -1, parts), -1, 0)
        return Draw(kept_ALB, jnp.tile(draw.scale_L, (parts, 1)))


def _applied_steps(opt_state: Any) -> jax.Array:
    return optax.tree.get_all_with_path(opt_state, "count")[0][1]


def _moving_mean(mean: jax.Array, value: jax.Array, decay: float = 0.98) -> jax.Array:
    return jnp.where(mean == 0, value, decay * mean + (1 - decay) * value)


def _norm_by_layer(stacked: Any) -> jax.Array:
    squares = [jnp.sum(leaf * leaf, axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(stacked)]
    return jnp.sqrt(sum(squares[1:], squares[0]))
