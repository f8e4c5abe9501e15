"""Train and compare changes of the recipe that no setting offers: ``python -m benchmarks.variants [NAME ...]``.

Takes the settings of training, and trains each variant on the same batches. Prints the held-out loss of the trained
early exit E and of the last exit, and their agreement. `VARIANTS` has the names; without a NAME, all are trained.

    python -m benchmarks.variants plain recipe \\
        --early_exit.curriculum fixed --early_exit.exits 3 --early_exit.distillation kl

The training loop is simple: one device, no checkpoints, and the logits of both exits in memory at once. So
``train.accumulate``, ``train.remat``, ``train.loss_chunk`` and ``layer_dropout.form`` have no effect. A variant that
helps can become a setting.
"""

import dataclasses
import itertools
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import common
from benchmarks.recipes import HELD_OUT_BATCHES, make_tokenizer, run_config, study_of
from layerskip_jax.checks import require
from layerskip_jax.command_line import make_parser, parse_config
from layerskip_jax.config import Config
from layerskip_jax.config_dict import saved_settings
from layerskip_jax.data.batch import Batch
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.pipeline import OpenSplit, make_batches
from layerskip_jax.data.sources import open_splits
from layerskip_jax.errors import run_command
from layerskip_jax.model import Block, Transformer, negative_log_likelihood, run_layers, unembed
from layerskip_jax.presets import without_layerskip
from layerskip_jax.recipe.distillation import LOSSES, DistillationLoss, SelfDistillation, argmax_cross_entropy
from layerskip_jax.recipe.fused_exit_loss import FusedSettings, block_function, block_with_dropout
from layerskip_jax.recipe.layer_dropout import DropoutMask
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.training.optimizer import make_optimizer


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs from the recipe of the config."""

    plain: bool = False
    """Only the last exit has a loss, and layer dropout is off."""
    exit_gain: bool = False
    """Multiply the hidden state at exit E by D trained numbers before the final norm."""
    frozen_head: bool = False
    """The loss of exit E has no gradient for the final norm and the head."""
    start: float = 0.0
    """In this share of the steps, from the first, only the last exit has a loss, and no exit teaches another. Layer
    dropout stays on."""
    exit_block: bool = False
    """Exit E reads a block of its own, which follows the first E - 1 blocks, so that a draft still runs E blocks. The
    loss of exit E trains that block alone (Balcony, arXiv 2503.05005), so the rest is the plain model."""


VARIANTS = {
    "plain": Variant(plain=True),
    "recipe": Variant(),
    "exit_gain": Variant(exit_gain=True),
    "frozen_head": Variant(frozen_head=True),
    "late_exit": Variant(start=1 / 3),
    "exit_block": Variant(plain=True, exit_block=True, frozen_head=True),
}


@flax.struct.dataclass
class Extra:
    """Parameters in addition to the model's. Every variant holds both; those that it does not use get no gradient."""

    gain_D: nnx.Param
    blocks: Block  # the one block of exit E; muon recognizes the matrices of blocks by this name

    @classmethod
    def create(cls, config: Config) -> "Extra":
        gain_D = nnx.Param(jnp.ones(config.model.dim), axes=("embed",))
        return cls(gain_D, Block(config.model, rngs=nnx.Rngs(config.train.seed + 1)))


def taught(
    loss: DistillationLoss, batch: Batch, logits_BTV: jax.Array, teacher_BTV: jax.Array, share: jax.Array
) -> jax.Array:
    """Return `SelfDistillation` of logits that are computed already, summed over counted positions [nats]."""
    teacher = jax.lax.stop_gradient(teacher_BTV), share
    return SelfDistillation(loss)(lambda logits: logits, logits_BTV, batch.targets_BT, batch.mask_BT, teacher)


class State(NamedTuple):
    step: jax.Array
    parameters: tuple[Transformer, Extra]
    opt_states: tuple[Any, Any]
    """Model and extra parameters have an optimizer each, so that each gradient is clipped by its own norm."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A variant and the config whose recipe it changes; static under jit."""

    variant: Variant
    config: Config

    @property
    def exit_layer(self) -> int:
        return self.config.trained_draft_exit

    @property
    def recipe(self) -> Recipe:
        return Recipe.from_config(without_layerskip(self.config) if self.variant.plain else self.config)

    def logits(
        self, parameters: tuple[Transformer, Extra], batch: Batch, dropout_mask: DropoutMask | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Return the logits of exit E and of the last exit, ``[B, T, V]`` each."""
        model, extra = parameters
        run_block = block_with_dropout(model, batch, FusedSettings(self.config.train.loss_chunk), dropout_mask)

        def block_fn(block: Block, x_BTD: jax.Array, mask: DropoutMask | None) -> tuple[jax.Array, jax.Array]:
            x_BTD = run_block(block, x_BTD, mask)
            return x_BTD, x_BTD

        last_x_BTD, x_LBTD = run_layers(model.blocks, model.embed(batch.inputs_BT), block_fn, dropout_mask)
        x_BTD, head = x_LBTD[self.exit_layer - 1], model.head()
        if self.variant.exit_block:
            x_BTD = jax.lax.stop_gradient(x_LBTD[self.exit_layer - 2])
            x_BTD += block_function(model)(extra.blocks, x_BTD, batch.segments_BT)
        if self.variant.exit_gain:
            x_BTD *= extra.gain_D[...].astype(x_BTD.dtype)[None, None]
        if self.variant.frozen_head:
            head = jax.lax.stop_gradient(head)
        return unembed(model.config, head, x_BTD), model.unembed(last_x_BTD)

    def objective(self, parameters: tuple[Transformer, Extra], batch: Batch, step: jax.Array) -> jax.Array:
        """``J = w_E J_E + w_L J_L`` per token, with the losses of `layerskip_jax.recipe.distillation`."""
        recipe, train, early = self.recipe, self.config.train, self.config.early_exit
        key = jax.random.fold_in(jax.random.key(train.seed), step)
        dropout_mask = recipe.sample_dropout(key, recipe.drop_rates(step), train.batch_size, shards=1)
        logits_BTV, last_logits_BTV = self.logits(parameters, batch, dropout_mask)
        weight_L = recipe.exit_weights(step)
        weight, last_weight, a = weight_L[self.exit_layer - 1], weight_L[-1], recipe.agreement_share(step, train.steps)
        if self.variant.exit_block:  # only this loss trains the block, so it needs no weight
            weight = 1.0
        begun = step >= self.variant.start * train.steps
        weight, last_weight, a = jnp.where(begun, jnp.stack([weight, last_weight, a]), jnp.array([0, 1, 0]))
        m = jnp.float32(early.distillation_weight)
        exit_loss = taught(LOSSES[early.distillation], batch, logits_BTV, last_logits_BTV, m)
        last_loss = taught(argmax_cross_entropy, batch, last_logits_BTV, logits_BTV, a)
        return (weight * exit_loss + last_weight * last_loss) / jnp.maximum(jnp.sum(batch.mask_BT), 1)

    def init(self) -> State:
        parameters = Transformer(self.config.model, rngs=nnx.Rngs(self.config.train.seed)), Extra.create(self.config)
        model_state, extra_state = map(make_optimizer(self.config).init, parameters)
        return State(jnp.zeros((), jnp.int32), parameters, (model_state, extra_state))

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def step(self, state: State, batch: Batch) -> tuple[State, jax.Array]:
        """Run one optimizer step; return the new state and the objective."""
        value, gradients = jax.value_and_grad(self.objective)(state.parameters, batch, state.step)
        new = []
        for parameters, gradient, opt_state in zip(state.parameters, gradients, state.opt_states, strict=True):
            updates, opt_state = make_optimizer(self.config).update(gradient, opt_state, parameters)
            new.append((optax.apply_updates(parameters, updates), opt_state))
        (model, model_state), (extra, extra_state) = new
        return State(state.step + 1, (model, extra), (model_state, extra_state)), value

    @partial(jax.jit, static_argnums=0)
    def scores(self, parameters: tuple[Transformer, Extra], batch: Batch) -> jax.Array:
        """Return sums over counted positions: the cross-entropy of exit E and of the last exit, agreement, and 1."""
        logits = self.logits(parameters, batch)
        exit_loss_BT, last_loss_BT = (negative_log_likelihood(each_BTV, batch.targets_BT) for each_BTV in logits)
        exit_next_BT, last_next_BT = (jnp.argmax(each_BTV, axis=-1) for each_BTV in logits)
        columns = exit_loss_BT, last_loss_BT, exit_next_BT == last_next_BT, jnp.ones_like(exit_loss_BT)
        return jnp.sum(jnp.stack([column * batch.mask_BT for column in columns]), axis=(1, 2))


class Result(NamedTuple):
    """Means over held-out tokens; losses in nats."""

    exit_loss: float
    last_loss: float
    agreement: float


def to_batch(arrays: dict[str, np.ndarray]) -> Batch:
    return Batch(*(arrays[name] for name in Batch._fields))


def train_variant(run: Run, training: OpenSplit, held_out: list[Batch]) -> Result:
    """Train on the documents of ``training``, and measure on ``held_out``."""
    state, steps = run.init(), run.config.train.steps
    size, seed = run.config.train.batch_size, run.config.train.seed
    train_split = run.config.data.train_split
    batches = iter(make_batches(run.config, train_split, batch_size=size, seed=seed, opened=training))
    for done in range(1, steps + 1):
        state, objective = run.step(state, to_batch(next(batches)))
        if done % max(steps // 20, 1) == 0:
            print(f"step {done}/{steps}  objective {float(objective):.3f}", flush=True)
    *sums, count = np.sum([run.scores(state.parameters, batch) for batch in held_out], axis=0, dtype=np.float64)
    return Result(*(float(total / count) for total in sums))


def table(results: dict[str, Result]) -> str:
    """Return the results as a Markdown table; the last exit of ``exit_block`` is that of ``plain``."""
    plain = results.get("plain", results.get("exit_block"))
    rows = []
    for name, result in results.items():
        cost = f"{100 * (result.last_loss / plain.last_loss - 1):+.1f} %" if plain else ""
        losses = f"{result.exit_loss:.3f}", f"{result.last_loss:.3f}"
        rows.append([name, *losses, cost, f"{100 * result.agreement:.1f} %"])
    return common.markdown_table(["variant", "exit E: loss", "last exit: loss", "against plain", "agreement"], rows)


def parse(argv: list[str]) -> tuple[Config, list[str], Path | None]:
    """Return the config, the names of the variants, and the file for JSON."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"variants to train: {', '.join(VARIANTS)}")
    common.add_json_option(parser)
    config, options = parse_config(parser, ["--config", "configs/evidence.py", *argv])
    names = list(dict.fromkeys(options.names or VARIANTS))
    unknown = sorted(set(names) - set(VARIANTS))
    require(not unknown, f"no variant is called {', '.join(unknown)}: choose from {', '.join(VARIANTS)}")
    early = config.early_exit
    require(
        len(early.trained_exits) == 1 and early.distillation != "none",
        "the variants need one early exit with a teacher, such as "
        "--early_exit.curriculum fixed --early_exit.exits 3 --early_exit.distillation kl",
    )
    require("exit_block" not in names or early.trained_exits != (1,), "exit_block needs early_exit.exits of at least 2")
    ignored = {"train.init_from": config.train.init_from, "train.skip_spikes": config.train.skip_spikes}
    for name, value in (ignored | {"data.mixture": config.data.mixture}).items():
        require(not value, f"benchmarks.variants does not read {name}: remove it")
    return run_config(config, "variants", config.train.seed), names, options.json


def main(argv: list[str] | None = None) -> None:
    config, names, file = parse(sys.argv[1:] if argv is None else argv)
    about = common.header()
    make_tokenizer(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    tokenizer.check_vocabulary(config.model.vocab_size)
    training, validation = (OpenSplit(documents, tokenizer) for documents in open_splits(config.data))
    split, size = config.data.validation_split, config.train.batch_size
    batches = make_batches(config, split, batch_size=size, opened=validation, in_order=True)
    held_out = [to_batch(batch) for batch in itertools.islice(batches, HELD_OUT_BATCHES)]
    require(any(batch.mask_BT.any() for batch in held_out), "the held-out text has no token with a loss")
    print(f"{study_of(config)}, exit {config.trained_draft_exit}")
    results: dict[str, Result] = {}
    for name in names:
        print(name)
        results[name] = train_variant(Run(VARIANTS[name], config), training, held_out)
        settings = {"study": study_of(config), "exit": config.trained_draft_exit, "settings": saved_settings(config)}
        variants = {name: result._asdict() for name, result in results.items()}
        common.write_json(file, about, settings | {"variants": variants})
    print(table(results))


if __name__ == "__main__":
    run_command(main)
