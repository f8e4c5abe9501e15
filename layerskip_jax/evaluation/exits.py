"""Quality of every exit on held-out text: loss, predicted tokens, and agreement with the last exit."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerskip_jax.checkpoint.reading import ModelFolder, load_model, warn_beyond_context
from layerskip_jax.checks import require
from layerskip_jax.config import Config
from layerskip_jax.config_dict import apply_overrides
from layerskip_jax.data.batch import Batch
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.pipeline import OpenSplit, local_batches, to_devices
from layerskip_jax.data.sources import check_place, open_documents
from layerskip_jax.distributed import agree
from layerskip_jax.errors import UserError
from layerskip_jax.mixture import mixture_shares
from layerskip_jax.model import Transformer, negative_log_likelihood
from layerskip_jax.recipe.fused_exit_loss import chunked_exit_losses
from layerskip_jax.sharding import auto_mesh, named_shardings

HostBatches = list[dict[str, np.ndarray]]
"""Batches on the host, with the rows of this process."""

ROWS_AT_ONCE = 8
"""The most sequences that `exit_quality` evaluates at once on a device."""

POSITIONS_AT_ONCE = 64
"""Positions of each sequence unembedded at once, so that logits [batch, length, vocab] are never materialized."""


@dataclasses.dataclass(frozen=True)
class ExitQuality:
    """Quality of the exits 1..L on held-out text."""

    loss_L: np.ndarray  # mean cross-entropy [nats/token]
    agreement_L: np.ndarray  # fraction of tokens whose argmax is that of the last exit; 1 at the last

    @property
    def perplexity_L(self) -> np.ndarray:
        return np.exp(self.loss_L)

    def as_dict(self) -> dict[str, list[float]]:
        """Return the numbers, for JSON."""
        named = {"held_out_loss": self.loss_L, "perplexity": self.perplexity_L, "agreement": self.agreement_L}
        return {f"{name}_by_exit": values.tolist() for name, values in named.items()}


@partial(jax.jit, static_argnames=("mesh", "chunk"))
def summed_losses(model: Transformer, batch: Batch, mesh: Mesh, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Return the summed cross-entropy of every exit, ``loss_L``, on ``batch``, and the number of tokens it sums."""
    loss_L = chunked_exit_losses(model, batch, chunk=chunk)
    replicated = NamedSharding(mesh, PartitionSpec())  # every process reads them
    return jax.lax.with_sharding_constraint((loss_L, jnp.sum(batch.mask_BT)), replicated)


def held_out_batches(held_out: Iterable[dict[str, np.ndarray]], config: Config) -> HostBatches:
    """Return the first ``train.evaluate_batches`` batches of ``held_out``, the validation split.

    Each process gets its own rows. With ``data.mixture``, return that many batches of every component. All processes
    of a run call it together.
    """

    def read() -> HostBatches:
        return list(itertools.islice(held_out, config.train.evaluate_batches * len(config.data.components)))

    # Read all before the first collective: a process with fewer batches would leave the others waiting for its next.
    return agree("number of held-out batches", read, len)


def component_losses(model: Transformer, batches: HostBatches, config: Config, mesh: Mesh) -> dict[str, np.ndarray]:
    """Return ``loss_L``, the mean cross-entropy of every exit [nats/token] on the ``batches`` of `held_out_batches`.

    The result has an entry for each component of ``data.mixture``, and under ``""`` their mean by their shares. All
    processes of a run call it together. Raises `UserError` if no token of these batches counts.
    """

    def summed(batch: dict[str, np.ndarray]) -> tuple[np.ndarray, float]:
        loss_L, count = jax.device_get(summed_losses(model, to_devices(batch, mesh), mesh, config.train.loss_chunk))
        return loss_L, float(count)

    with jax.set_mesh(mesh):
        return _means(summed, batches, config)


def _means(
    summed: Callable[[dict[str, np.ndarray]], tuple[np.ndarray, float]],
    batches: HostBatches,
    config: Config,
) -> dict[str, np.ndarray]:
    """Return ``mean_L`` per token for each component of ``data.mixture``; the mean by their shares is under ``""``.

    ``summed(batch)`` returns a sum over the unmasked tokens of a batch for each exit, and the number of these tokens.
    The sum may have leading axes. Raises `UserError` if a component has no unmasked token.
    """
    shares = mixture_shares(config.data.mixture)
    totals = dict.fromkeys(shares, (np.zeros(config.model.num_layers), 0.0))
    for batch in batches:
        name = list(shares)[int(batch.get("component", 0))]
        (total_L, tokens), (sum_L, count) = totals[name], summed(batch)
        totals[name] = total_L + sum_L, tokens + count
    for name, (_, tokens) in totals.items():
        if not tokens:
            raise UserError(
                f"the first {config.train.evaluate_batches} held-out batches (train.evaluate_batches) "
                f"{f'of {name} ' * bool(name)}have no token with a loss: data.sequence_length "
                f"{config.data.sequence_length} must be longer than their prompts (data.prompt_key)"
            )
    means = {name: total_L / tokens for name, (total_L, tokens) in totals.items()}
    return means | {"": np.sum([shares[name] * mean_L for name, mean_L in means.items()], axis=0)}


def over_positions(read: Callable[..., Any], x_BTD: jax.Array, *labels_BT: jax.Array) -> Any:
    """Map ``read(x_BD, *labels_B)`` over positions, `POSITIONS_AT_ONCE` at a time; the results are ``[B, T]``."""
    along_T = [jnp.moveaxis(array, 1, 0) for array in (x_BTD, *labels_BT)]
    result = jax.lax.map(lambda position: read(*position), along_T, batch_size=POSITIONS_AT_ONCE)
    return jax.tree.map(lambda array: jnp.moveaxis(array, 0, 1), result)


@jax.jit
def exit_predictions(model: Transformer, tokens_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Return ``next_LBT``: the argmax of the logits ``g(x_{l+1})`` of every exit at every position."""

    def argmax(x_BD: jax.Array) -> jax.Array:
        return jnp.argmax(model.unembed(x_BD[:, None])[:, 0], axis=-1)

    _, next_LBT = model.run_uncached(tokens_BT, segments_BT, partial(over_positions, argmax))
    return jnp.asarray(next_LBT)


@jax.jit
def exit_scores(model: Transformer, batch: Batch) -> jax.Array:
    """Return ``sums_2L`` of every exit over the unmasked positions of ``batch``: cross-entropy [nats], and agreement.

    The agreement counts the positions at which the exit predicts the same token as the last exit. As a fraction, this
    estimates the acceptance of the first draft of a round from that exit, for greedy decoding of similar text.
    """

    def read(x_BD: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_B1V = model.unembed(x_BD[:, None])
        return negative_log_likelihood(logits_B1V, target_B[:, None])[:, 0], jnp.argmax(logits_B1V[:, 0], axis=-1)

    def at_exit(x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        return over_positions(read, x_BTD, batch.targets_BT)

    _, (loss_LBT, next_LBT) = model.run_uncached(batch.inputs_BT, batch.segments_BT, at_exit)
    return jnp.sum(jnp.stack([loss_LBT, next_LBT == next_LBT[-1:]]) * batch.mask_BT[None, None], axis=(2, 3))


def exit_quality(model: Transformer, config: Config, batches: HostBatches | None = None) -> ExitQuality:
    """Measure every exit on the first ``train.evaluate_batches`` batches of the validation split.

    ``model`` is stacked. The sequences of a batch are sharded over gcd(batch_size, devices) devices. If ``batches`` is
    given, they are used as they are, and nothing is read. Otherwise the corpus must be prepared already. Only for a run
    of one process.
    """
    devices = jax.devices()[: math.gcd(config.train.batch_size, jax.device_count())]
    mesh = auto_mesh(np.reshape(devices, (-1, 1, 1, 1)))
    model = jax.device_put(model, named_shardings(model, model, mesh))
    if batches is None:
        small, split = with_small_batches(config, len(devices)), config.data.validation_split
        documents = open_documents(config.data, split, prepare=False)  # a checkpoint's config must not write files
        opened = OpenSplit(documents, load_tokenizer(config.data.tokenizer))
        batches = held_out_batches(local_batches(small, split, mesh, in_order=True, opened=opened), small)

    def summed(batch: dict[str, np.ndarray]) -> tuple[np.ndarray, float]:
        return np.asarray(exit_scores(model, to_devices(batch, mesh)), np.float64), float(batch["mask_BT"].sum())

    with jax.set_mesh(mesh):
        return ExitQuality(*_means(summed, batches, config)[""])


def with_small_batches(config: Config, devices: int) -> Config:
    """Return ``config`` with the same held-out sequences in more and smaller batches.

    A batch of training is made for all chips of a slice, and evaluation may have one chip.
    """
    per_device = config.train.batch_size // devices
    rows = devices * max(n for n in range(1, ROWS_AT_ONCE + 1) if per_device % n == 0)
    batches = config.train.evaluate_batches * (config.train.batch_size // rows)
    train = dataclasses.replace(config.train, batch_size=rows, evaluate_batches=batches, accumulate=1)
    return dataclasses.replace(config, train=train)


def checkpoint_quality(
    checkpoint: str | ModelFolder,
    batches: int,
    data: dict[str, Any] | None = None,
    loaded: tuple[Transformer, Config, epath.Path] | None = None,
) -> ExitQuality:
    """Measure a checkpoint on its own held-out split, with the `DataConfig` fields in ``data`` replaced.

    ``loaded`` is what `load_model` has returned for it, if it has been read already. Raises `UserError` if the
    checkpoint or the text does not exist.
    """
    require(batches >= 1, f"batches must be at least 1, not {batches}")
    model, own, tokenizer = loaded or load_model(checkpoint)
    overrides = {"data.tokenizer": str(tokenizer), "data.workers": 0, "train.evaluate_batches": batches}
    data = data or {}
    if data.get("mixture"):  # it replaces the run's corpus, and a corpus replaces the run's mixture
        data = {"name": "", "path": ""} | data
    elif data.get("source", own.data.source) != own.data.source:  # it does not read the run's name or path
        data = {"mixture": (), "name": "", "path": ""} | data
    elif data.keys() & {"source", "name", "path"}:
        data = {"mixture": ()} | data
    if "sequence_length" in data:  # has no effect here, but `Config` requires that ``loss_chunk`` divides it
        overrides["train.loss_chunk"] = data["sequence_length"]
    config = apply_overrides(own, overrides | {f"data.{name}": value for name, value in data.items()})
    if data.keys() & {"source", "name", "path"}:
        check_place(config.data)
    warn_beyond_context(own, config.data.sequence_length, f"{checkpoint}: data.sequence_length is")
    return exit_quality(model, config)


@partial(jax.jit, static_argnames="exit_layer")
def token_scores(
    model: Transformer, tokens_BT: jax.Array, targets_BT: jax.Array, exit_layer: int
) -> tuple[jax.Array, jax.Array]:
    """Return ``log p(target)`` [nats] at one exit of an unstacked model, and whether the target is the argmax.

    Both are ``[B, T]``. Every row is the beginning of one document.
    """
    early = model.first_layers(exit_layer)

    def score(x_BD: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_B1V = early.unembed(x_BD[:, None])
        loss_B1 = negative_log_likelihood(logits_B1V, target_B[:, None])
        return -loss_B1[:, 0], jnp.argmax(logits_B1V[:, 0], axis=-1) == target_B

    x_BTD, _ = early.run_uncached(tokens_BT, jnp.ones_like(tokens_BT))
    return over_positions(score, x_BTD, targets_BT)
