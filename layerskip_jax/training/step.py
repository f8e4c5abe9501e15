"""The optimizer step as a pure function."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerskip_jax.checks import require
from layerskip_jax.compiler_options import compile_step
from layerskip_jax.config import Config
from layerskip_jax.data.batch import Batch
from layerskip_jax.model import Transformer
from layerskip_jax.recipe.fused_exit_loss import FusedSettings, Shares, losses_and_gradients
from layerskip_jax.recipe.layer_dropout import DropoutMask
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.sharding import batch_sharding, batch_shards, named_shardings
from layerskip_jax.training.optimizer import learning_rate, make_optimizer, schedule_count


@flax.struct.dataclass
class TrainState:
    """Everything that an optimizer step changes.

    Dropout keys, drop rates and exit weights follow from ``step``, the learning rate from the count in ``opt_state``.
    """

    step: jax.Array
    model: Transformer
    opt_state: Any
    loss_ema: jax.Array
    """Exponential moving average of the objective over the steps that were applied [nats]; 0 before the first."""


class StepMetrics(NamedTuple):
    """Metrics of one optimizer step; losses are means over counted tokens [nats]."""

    objective: jax.Array
    exit_loss_L: jax.Array
    exit_weight_L: jax.Array
    drop_rate_L: jax.Array
    gradient_norm: jax.Array
    gradient_norm_L: jax.Array
    learning_rate: jax.Array
    tokens: jax.Array
    applied: jax.Array
    """False if the update was skipped."""


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The compiled functions of a run. Stateless; every public method that runs a program sets the mesh itself.

    Raises `UserError` if the recipe is for another number of layers or steps, or if its layer dropout cannot split the
    rows of a device.
    """

    config: Config
    recipe: Recipe
    mesh: Mesh

    def __post_init__(self) -> None:
        train, recipe = self.config.train, self.recipe
        made_for, needed = (recipe.num_layers, recipe.total_steps), (self.config.model.num_layers, train.steps)
        problem = f"the recipe is for {made_for} (layers, steps), not {needed}: make it with Recipe.from_config(config)"
        require(made_for == needed, problem)
        recipe.check_rows(train.batch_size // train.accumulate // batch_shards(self.mesh))

    def init(self, model: Transformer | None = None) -> TrainState:
        """Return the state before step 0 on the mesh, with ``model`` or one initialized from ``config.train.seed``."""
        with jax.set_mesh(self.mesh):
            return self._init_on_mesh(model)

    @partial(jax.jit, static_argnums=0)
    def _init_on_mesh(self, model: Transformer | None) -> TrainState:
        return jax.lax.with_sharding_constraint(self._init(model), self.state_shardings())

    def abstract_state(self) -> TrainState:
        """Return the shapes and shardings of the state: the target of a restore."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(self._init),
            self.state_shardings(),
        )

    def state_shardings(self) -> TrainState:
        """Return a `NamedSharding` for every array of the state."""
        state = jax.eval_shape(self._init)
        return named_shardings(state, state.model, self.mesh)

    def _init(self, model: Transformer | None = None) -> TrainState:
        if model is None:
            model = Transformer(self.config.model, rngs=nnx.Rngs(self.config.train.seed))
        opt_state = make_optimizer(self.config).init(model)
        return TrainState(jnp.zeros((), jnp.int32), model, opt_state, loss_ema=jnp.zeros(()))

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """Run one optimizer step on ``batch``; ``state`` is donated. One program serves all steps of a run.

        Only ``state.step`` changes if the objective or the gradient is not finite, if no token of the batch has a loss,
        or if ``recipe.is_spike`` is True.
        """
        with jax.set_mesh(self.mesh):
            return self._step(state, batch)

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        weight_L, drop_rate_L = self.recipe.exit_weights(state.step), self.recipe.drop_rates(state.step)
        tokens = jnp.sum(batch.mask_BT)
        (value, exit_loss_L), grads = self._gradients(state, batch, weight_L, jnp.maximum(tokens, 1))
        updates, opt_state = make_optimizer(self.config).update(grads, state.opt_state, state.model)
        norm = optax.tree.norm(grads)
        applied = jnp.isfinite(value) & jnp.isfinite(norm) & (tokens > 0)
        applied &= ~self.recipe.is_spike(value, norm, state.loss_ema)
        metrics = StepMetrics(
            objective=value,
            exit_loss_L=exit_loss_L,
            exit_weight_L=weight_L,
            drop_rate_L=drop_rate_L,
            gradient_norm=norm,
            gradient_norm_L=jax.vmap(optax.tree.norm)(grads.blocks),
            # The schedule counts applied steps only, so `state.step` may be ahead of it.
            learning_rate=jnp.asarray(learning_rate(self.config)(schedule_count(state.opt_state))),
            tokens=tokens,
            applied=applied,
        )
        loss_ema = jnp.where(state.loss_ema == 0, value, 0.98 * state.loss_ema + 0.02 * value)
        new = optax.apply_updates(state.model, updates), opt_state, loss_ema
        old = state.model, state.opt_state, state.loss_ema
        # lax.cond would keep old and new in memory at once; a select fuses into the update.
        chosen = jax.tree.map(lambda new, old: jnp.where(applied, new, old), new, old)
        state = TrainState(state.step + 1, *chosen)
        # Return the state in the shardings of the input. If the compiler chose others, the next call would recompile,
        # and a program that is compiled ahead would reject the state.
        replicated = NamedSharding(self.mesh, PartitionSpec())  # so that every process can read the metrics
        return jax.lax.with_sharding_constraint((state, metrics), (self.state_shardings(), replicated))

    def _gradients(
        self, state: TrainState, batch: Batch, weight_L: jax.Array, count: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Transformer]:
        """Return ``((objective, loss_L), gradients)``, means over the ``count`` tokens of the whole batch."""
        settings = FusedSettings(
            chunk=self.config.train.loss_chunk,
            remat=self.config.train.remat,
            loss=self.recipe.exit_loss,
            apply_dropout=self.recipe.apply_dropout,
            distillation=self.recipe.distillation,
            agreement=self.recipe.agreement,
            agreement_exit=self.recipe.agreement_exit,
        )
        shares = Shares(
            self.recipe.distillation_share(state.step, self.recipe.total_steps),
            self.recipe.agreement_share(state.step, self.recipe.total_steps),
        )

        # Divide by the tokens of the whole batch, so that microbatches add up to exactly the large batch.
        weights = weight_L / count

        def gradient(micro: Batch, dropout_mask: DropoutMask | None) -> tuple[tuple[jax.Array, jax.Array], Transformer]:
            model, teacher = state.model, self.recipe.teacher
            teacher_arrays = teacher(model, micro.inputs_BT, micro.segments_BT) if teacher else None
            losses, grads = losses_and_gradients(model, micro, weights, settings, dropout_mask, teacher_arrays, shares)
            return (losses.objective, losses.loss_L / count), grads

        dropout_mask = self.dropout_mask(state.step)
        if self.config.train.accumulate == 1:
            return gradient(batch, dropout_mask)
        parts = self._split(batch), self._split_mask(dropout_mask)
        zeros = (jnp.zeros(()), jnp.zeros_like(weight_L)), jax.tree.map(jnp.zeros_like, state.model)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(*part)), None

        return jax.lax.scan(add, zeros, parts)[0]

    def compile_step(self) -> jax.stages.Compiled:
        """Compile `step` from shapes alone, with the XLA options of the mesh's devices; call the result like `step`.

        The training loop runs this program. Its memory and text can be read without a run.
        """
        shape = (self.config.train.batch_size, self.config.data.sequence_length)
        types = Batch(jnp.int32, jnp.int32, jnp.int32, jnp.float32)
        batch = jax.tree.map(lambda t: jax.ShapeDtypeStruct(shape, t, sharding=batch_sharding(self.mesh)), types)
        with jax.set_mesh(self.mesh):
            lowered = Trainer._step.lower(self, self.abstract_state(), batch)
            kind = self.mesh.devices.flat[0].device_kind
            return compile_step(lowered, kind, self.config.train.compiler_options)

    def dropout_mask(self, step: jax.Array) -> DropoutMask | None:
        """Draw the layer dropout of optimizer step ``step``, which depends on the seed and the step alone."""
        key = jax.random.fold_in(jax.random.key(self.config.train.seed), step)
        drop_rate_L = self.recipe.drop_rates(step)
        return self.recipe.sample_dropout(key, drop_rate_L, self.config.train.batch_size, batch_shards(self.mesh))

    def _split(self, batch: Batch) -> Batch:
        """[B, ...] -> [accumulate, B / accumulate, ...]; microbatch p takes the rows p, p + accumulate, ...

        So every microbatch has rows of every shard, and no row moves to another device.
        """
        parts = self.config.train.accumulate
        return jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)

    def _split_mask(self, dropout_mask: DropoutMask | None) -> DropoutMask | None:
        if dropout_mask is None:
            return None
        parts = self.config.train.accumulate
        keep_ALB = jnp.moveaxis(dropout_mask.keep_LB.reshape(dropout_mask.keep_LB.shape[0], -1, parts), -1, 0)
        return DropoutMask(keep_ALB, jnp.tile(dropout_mask.scale_L, (parts, 1)))
