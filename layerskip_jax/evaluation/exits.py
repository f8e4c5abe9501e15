"""What every exit says of text: its loss on any source, its next tokens, and how often they are the last exit's."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.command_line import apply_overrides
from layerskip_jax.config import Config, LayerDropoutConfig, MeshConfig
from layerskip_jax.data.batch import Batch
from layerskip_jax.data.pipeline import local_batches, to_devices
from layerskip_jax.data.sources import open_documents
from layerskip_jax.distributed import together
from layerskip_jax.errors import UserError
from layerskip_jax.model import Block, Transformer, run_layers
from layerskip_jax.recipe.fused_exit_loss import exit_losses
from layerskip_jax.sharding import make_mesh, shardings_of

POSITIONS_AT_ONCE = 64
"""So many positions of each sequence are unembedded at once: [batch, length, vocab] is never held."""


@dataclasses.dataclass(frozen=True)
class ExitQuality:
    """How good the exits 1..L are on held-out text."""

    loss_L: np.ndarray  # mean cross-entropy [nats a token]
    agreement_L: np.ndarray  # tokens at which an exit's likeliest is the last exit's: 1 at the end

    @property
    def perplexity_L(self) -> np.ndarray:
        return np.exp(self.loss_L)

    def as_dict(self) -> dict[str, list[float]]:
        """Return what was measured, for JSON."""
        named = {"held_out_loss": self.loss_L, "perplexity": self.perplexity_L, "agreement": self.agreement_L}
        return {f"{name}_by_exit": values.tolist() for name, values in named.items()}


@partial(jax.jit, static_argnames=("mesh", "chunk"))
def summed_losses(model: Transformer, batch: Batch, mesh: Mesh, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Return every exit's summed cross-entropy ``loss_L`` on ``batch`` and the number of tokens it sums over."""
    losses = exit_losses(model, batch, jnp.ones(model.config.num_layers), chunk=chunk, train=False)
    whole = NamedSharding(mesh, PartitionSpec())  # so that every process can read them
    return jax.lax.with_sharding_constraint((losses.loss_L, jnp.sum(batch.mask_BT)), whole)


def evaluate(model: Transformer, config: Config, mesh: Mesh) -> np.ndarray:
    """Return ``loss_L``: the mean cross-entropy of every exit on held-out text [nats a token].

    Every call reads the same first ``train.evaluate_batches`` batches of the validation split. All processes of a run
    call it together. Raises `UserError` if no token of them counts.
    """
    batches = local_batches(config, config.data.validation_split, mesh, epochs=1)
    total_L, tokens = np.zeros(config.model.num_layers), 0.0

    def read() -> list[dict[str, np.ndarray]]:
        return list(itertools.islice(batches, config.train.evaluate_batches))

    with jax.set_mesh(mesh):
        # Read first: a process with fewer batches than the others would leave them waiting for its next one.
        for batch in together("number of held-out batches", read, len):
            summed = summed_losses(model, to_devices(batch, mesh), mesh, config.train.loss_chunk)
            loss_L, count = jax.device_get(summed)
            total_L, tokens = total_L + loss_L, tokens + float(count)
    if not tokens:
        raise UserError(
            f"no token of the first train.evaluate_batches {config.train.evaluate_batches} held-out batches counts: "
            f"data.sequence_length {config.data.sequence_length} must be longer than their prompts (data.prompt_key)"
        )
    return total_L / tokens


def over_positions(read: Callable[..., Any], x_BTD: jax.Array, *labels_BT: jax.Array) -> Any:
    """Return ``read(x_BD, *labels_B)`` of every position, ``[B, T]``, a few positions at a time."""
    along_T = [jnp.moveaxis(array, 1, 0) for array in (x_BTD, *labels_BT)]
    result = jax.lax.map(lambda position: read(*position), along_T, batch_size=POSITIONS_AT_ONCE)
    return jax.tree.map(lambda array: jnp.moveaxis(array, 0, 1), result)


@jax.jit
def exit_predictions(model: Transformer, tokens_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Return ``next_LBT``: the likeliest next token of every exit after every position, as ``g(x_{l+1})`` gives it."""
    position = model.positions(jnp.arange(tokens_BT.shape[1])[None])

    def likeliest(x_BD: jax.Array) -> jax.Array:
        return jnp.argmax(model.unembed(x_BD[:, None])[:, 0], axis=-1)

    def step(block: Block, x_BTD: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        x_BTD = x_BTD + block(x_BTD, position, segments_BT)[0]
        return x_BTD, over_positions(likeliest, x_BTD)

    inputs = None if isinstance(model.blocks, Block) else [None] * model.config.num_layers
    _, next_LBT = run_layers(model.blocks, model.embed(tokens_BT), step, inputs)
    return jnp.asarray(next_LBT)


@jax.jit
def agreeing(model: Transformer, tokens_BT: jax.Array, segments_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Return ``count_L``: the counted positions at which each exit predicts what the last exit predicts.

    Divided by the count, this is the acceptance of a first draft from that exit under greedy decoding, if texts are
    like these: no draft policy gets more out of it.
    """
    next_LBT = exit_predictions(model, tokens_BT, segments_BT)
    return jnp.sum((next_LBT == next_LBT[-1:]) * mask_BT[None], axis=(1, 2))


def exit_quality(model: Transformer, config: Config) -> ExitQuality:
    """Measure every exit on the first ``train.evaluate_batches`` batches of the validation split of ``config``."""
    # Evaluation drops, accumulates and splits nothing: what training's settings ask of the devices is not asked here.
    train = dataclasses.replace(config.train, accumulate=1)
    config = dataclasses.replace(config, mesh=MeshConfig(), layer_dropout=LayerDropoutConfig(), train=train)
    mesh = make_mesh(config, jax.devices()[: math.gcd(train.batch_size, jax.device_count())])
    model = jax.device_put(model, shardings_of(model, model, mesh))
    loss_L = evaluate(model, config, mesh)
    agreed_L, tokens = np.zeros(config.model.num_layers), 0.0
    batches = local_batches(config, config.data.validation_split, mesh, epochs=1)
    with jax.set_mesh(mesh):
        for batch in itertools.islice(batches, config.train.evaluate_batches):
            on_mesh = to_devices(batch, mesh)
            agreed_L += np.asarray(agreeing(model, on_mesh.inputs_BT, on_mesh.segments_BT, on_mesh.mask_BT))
            tokens += batch["mask_BT"].sum()
    return ExitQuality(loss_L, agreed_L / tokens)


def quality_of_checkpoint(checkpoint: str, batches: int, data: dict[str, Any] | None = None) -> ExitQuality:
    """Measure a checkpoint on its own held-out split, or where the ``DataConfig`` fields of ``data`` say otherwise.

    Raises `UserError` where there is no checkpoint or no such text; no corpus is prepared for it.
    """
    model, config, tokenizer = load_model(checkpoint)
    overrides = {"data.tokenizer": str(tokenizer), "data.workers": 0, "train.evaluate_batches": batches}
    config = apply_overrides(config, overrides | {f"data.{name}": value for name, value in (data or {}).items()})
    open_documents(config.data, config.data.validation_split, prepare=False)  # a checkpoint's config writes nothing
    return exit_quality(model, config)


@partial(jax.jit, static_argnames="exit_layer")
def token_scores(
    model: Transformer, tokens_BT: jax.Array, targets_BT: jax.Array, exit_layer: int
) -> tuple[jax.Array, jax.Array]:
    """Return ``log p(target)`` at one exit of an `unstacked` model [nats], and whether the target is its likeliest.

    Both are ``[B, T]``; every row is one document, from its beginning.
    """
    early = model.first_layers(exit_layer)
    position, segments_BT = early.positions(jnp.arange(tokens_BT.shape[1])[None]), jnp.ones_like(tokens_BT)

    def step(block: Block, x_BTD: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x_BTD + block(x_BTD, position, segments_BT)[0], None

    def score(x_BD: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_p_BV = jax.nn.log_softmax(early.unembed(x_BD[:, None])[:, 0], axis=-1)
        picked_B = jnp.take_along_axis(log_p_BV, target_B[:, None], axis=-1)[:, 0]
        return picked_B, jnp.argmax(log_p_BV, axis=-1) == target_B

    x_BTD, _ = run_layers(early.blocks, early.embed(tokens_BT), step, [None] * exit_layer)
    return over_positions(score, x_BTD, targets_BT)
