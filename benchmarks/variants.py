"""Changes of the recipe that no setting offers, trained and compared: ``python -m benchmarks.variants [NAME ...]``.

Takes the settings of training, and trains each variant on the same batches. Prints the held-out loss of the exit that
drafts and of the last exit, and their agreement. `VARIANTS` has the names; without a NAME, all are trained.

    python -m benchmarks.variants plain recipe exit_gain
    python -m benchmarks.variants plain recipe --optimizer.name muon --json muon.json

The loop is the plain form of training: one device, no checkpoints, and the logits of both exits exist at once. A
variant that pays can then become a setting of training.
"""

import argparse
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
from benchmarks.recipes import HELD_OUT_BATCHES, study_of
from layerskip_jax.checks import require
from layerskip_jax.command_line import make_parser, parse_config
from layerskip_jax.config import Config
from layerskip_jax.data.batch import Batch
from layerskip_jax.data.pipeline import local_batches, to_devices
from layerskip_jax.data.sentencepiece_tokenizer import train_tokenizer
from layerskip_jax.data.sources import open_documents
from layerskip_jax.errors import run_command
from layerskip_jax.model import Block, Transformer, run_layers, unembed
from layerskip_jax.presets import without_layerskip
from layerskip_jax.recipe.distillation import LOSSES, argmax_cross_entropy
from layerskip_jax.recipe.early_exit import negative_log_likelihood
from layerskip_jax.recipe.layer_dropout import DropoutMask, apply_masked
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.sharding import auto_mesh
from layerskip_jax.training.optimizer import make_optimizer

DEFAULTS = [
    *("--config", "configs/evidence.py", "--train.steps", "1465", "--optimizer.learning_rate", "2e-3"),
    *("--early_exit.curriculum", "fixed", "--early_exit.exits", "3", "--early_exit.exit_weights", "0.5"),
    *("--early_exit.distillation", "kl", "--early_exit.agreement_weight", "0.1"),
    *("--data.tokenizer", "runs/variants/tokenizer.model"),
]
"""The options unless ``--config`` is given: 3.0M tokens with the recipe of docs/results/recipes.md."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs from the recipe of the config."""

    plain: bool = False
    """Train the last exit alone."""
    exit_gain: bool = False
    """Multiply the hidden state at exit E by D trained numbers in front of the shared head."""
    head_learns_from_exit: bool = True
    """Whether the loss of exit E has a gradient for the final norm and the head."""
    start: float = 0.0
    """Share of the steps that train the last exit alone, before exit E has a loss and teaches."""
    exit_block: bool = False
    """Exit E is a trained block after E - 1 blocks, so that a draft still costs E blocks. No gradient of its loss
    reaches the model (Balcony, arXiv 2503.05005): the last exit is that of the plain model."""


VARIANTS = {
    "plain": Variant(plain=True),
    "recipe": Variant(),
    "exit_gain": Variant(exit_gain=True),
    "frozen_head": Variant(head_learns_from_exit=False),
    "late_exit": Variant(start=1 / 3),
    "exit_block": Variant(plain=True, exit_block=True, head_learns_from_exit=False),
}


@flax.struct.dataclass
class Extra:
    """Parameters that the model does not have. Each variant has both, and trains those that it uses."""

    gain_D: nnx.Param
    block: Block

    @classmethod
    def create(cls, config: Config) -> "Extra":
        block = Block(config.model, rngs=nnx.Rngs(config.train.seed + 1))
        return cls(nnx.Param(jnp.ones(config.model.dim), axes=("embed",)), block)


class State(NamedTuple):
    step: jax.Array
    parameters: tuple[Transformer, Extra]
    opt_states: tuple[Any, Any]
    """Each of the two has an optimizer of its own, so that the gradients of one do not clip those of the other."""


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
        B, T = batch.inputs_BT.shape
        L = model.config.num_layers
        rotary = model.rotary_tables(jnp.arange(T)[None])
        mask = dropout_mask or DropoutMask(jnp.ones((L, B), bool), jnp.ones(L))

        def f(block: Block, x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
            return block(x_BTD, rotary, segments_BT)[0]

        def block_fn(block: Block, x_BTD: jax.Array, mask: DropoutMask) -> tuple[jax.Array, jax.Array]:
            x_BTD = apply_masked(f, block, (x_BTD, batch.segments_BT), *mask)
            return x_BTD, x_BTD

        last_x_BTD, x_LBTD = run_layers(model.blocks, model.embed(batch.inputs_BT), block_fn, mask)
        x_BTD, head = x_LBTD[self.exit_layer - 1], model.head()
        if self.variant.exit_block:
            x_BTD = jax.lax.stop_gradient(x_LBTD[self.exit_layer - 2])
            x_BTD += f(extra.block, x_BTD, batch.segments_BT)
        if self.variant.exit_gain:
            x_BTD *= extra.gain_D[...][None, None]
        if not self.variant.head_learns_from_exit:
            head = jax.lax.stop_gradient(head)
        return unembed(model.config, head, x_BTD), model.unembed(last_x_BTD)

    def objective(self, parameters: tuple[Transformer, Extra], batch: Batch, step: jax.Array) -> jax.Array:
        """``J = w_E J_e + w_L J_L`` per token, with the losses of `layerskip_jax.recipe.distillation`."""
        recipe, train, early = self.recipe, self.config.train, self.config.early_exit
        key = jax.random.fold_in(jax.random.key(train.seed), step)
        dropout_mask = recipe.sample_dropout(key, recipe.drop_rates(step), train.batch_size, shards=1)
        exit_logits_BTV, last_logits_BTV = self.logits(parameters, batch, dropout_mask)
        on = step >= self.variant.start * train.steps
        weight_L = recipe.exit_weights(step)
        exit_weight, last_weight = jnp.where(on, weight_L[self.exit_layer - 1], 0), jnp.where(on, weight_L[-1], 1)
        share = jnp.where(on & (not self.variant.plain), early.agreement_weight, 0)
        distilled_BT = LOSSES[early.distillation](exit_logits_BTV, jax.lax.stop_gradient(last_logits_BTV))
        agreement_BT = argmax_cross_entropy(last_logits_BTV, jax.lax.stop_gradient(exit_logits_BTV))
        exit_loss_BT, last_loss_BT = (
            taught * teacher_BT + (1 - taught) * negative_log_likelihood(logits_BTV, batch.targets_BT)
            for taught, teacher_BT, logits_BTV in (
                (early.distillation_weight, distilled_BT, exit_logits_BTV),
                (share, agreement_BT, last_logits_BTV),
            )
        )
        if self.variant.exit_block:  # no other loss trains its parameters
            exit_weight = 1.0
        total = jnp.sum((exit_weight * exit_loss_BT + last_weight * last_loss_BT) * batch.mask_BT)
        return total / jnp.sum(batch.mask_BT)

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


def train_variant(run: Run) -> Result:
    config, data = run.config, run.config.data
    mesh, steps = auto_mesh(np.reshape(jax.devices()[:1], (1, 1, 1, 1))), config.train.steps
    batches, held_out = (
        iter(local_batches(config, split, mesh, in_order=split == data.validation_split))
        for split in (data.train_split, data.validation_split)
    )
    state = run.init()
    for done in range(1, steps + 1):
        state, objective = run.step(state, to_devices(next(batches), mesh))
        if done % max(steps // 20, 1) == 0:
            print(f"step {done}/{steps}  objective {float(objective):.3f}", flush=True)
    measured = [
        run.scores(state.parameters, to_devices(batch, mesh)) for batch in itertools.islice(held_out, HELD_OUT_BATCHES)
    ]
    *sums, count = np.sum(measured, axis=0, dtype=np.float64)
    return Result(*(float(total / count) for total in sums))


def table(results: dict[str, Result]) -> str:
    """Return the results as a Markdown table; the last exit of ``exit_block`` is that of ``plain``."""
    plain = results.get("plain", results.get("exit_block"))
    lines = ["| variant | exit E: loss | last exit: loss | against plain | agreement |", "|---|---|---|---|---|"]
    for name, result in results.items():
        cost = f"{100 * (result.last_loss / plain.last_loss - 1):+.1f} %" if plain else ""
        lines.append(
            f"| {name} | {result.exit_loss:.3f} | {result.last_loss:.3f} | {cost} | {100 * result.agreement:.1f} % |"
        )
    return "\n".join(lines)


def parse(argv: list[str]) -> tuple[Config, argparse.Namespace]:
    parser = make_parser(__doc__ or "")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"variants to train: {', '.join(VARIANTS)}")
    common.add_json_option(parser)
    config, options = parse_config(parser, argv if "--config" in argv else [*DEFAULTS, *argv])
    unknown = sorted(set(options.names) - set(VARIANTS))
    require(not unknown, f"no variant is called {', '.join(unknown)}: choose from {', '.join(VARIANTS)}")
    early = config.early_exit
    needed = len(early.trained_exits) == 1 and early.distillation != "none"
    require(needed, "the variants need one early_exit.exits with a weight, and early_exit.distillation")
    require(config.trained_draft_exit > 1, "exit_block needs early_exit.exits of at least 2")
    return config, options


def main(argv: list[str] | None = None) -> None:
    config, options = parse(sys.argv[1:] if argv is None else argv)
    about = common.header()
    if not Path(config.data.tokenizer).exists():
        documents = open_documents(config.data, config.data.train_split)
        train_tokenizer(documents, config.data.tokenizer, config.model.vocab_size)
    print(study_of(config))
    results: dict[str, Result] = {}
    for name in options.names or VARIANTS:
        print(name)
        results[name] = train_variant(Run(VARIANTS[name], config))
        common.write_json(options.json, about, {name: result._asdict() for name, result in results.items()})
    print(table(results))


if __name__ == "__main__":
    run_command(main)
