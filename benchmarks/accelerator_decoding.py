"""The parts of `benchmarks.accelerator` about generation: with random weights, and with a model trained on the spot."""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.accelerator_sizes import Bench, Measured, Sizes
from layerskip_jax.config import (
    Config,
    DataConfig,
    EarlyExitConfig,
    LayerDropoutConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from layerskip_jax.decoding.cost import predicted_speedup, weight_bytes, weight_count
from layerskip_jax.decoding.engine import generate, run_rounds, start
from layerskip_jax.decoding.policies import Fixed
from layerskip_jax.decoding.request import Generation
from layerskip_jax.decoding.rounds import Autoregressive, Round, SelfSpeculative
from layerskip_jax.decoding.sampling import Greedy
from layerskip_jax.decoding.state import DecodeState
from layerskip_jax.model import Transformer
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.sharding import make_mesh
from layerskip_jax.training.step import Trainer

ACCEPTANCES = (0.6, 0.8, 1.0)
"""Shares of the drafted tokens that are accepted, forced in ``decoding``."""
PLAIN = Autoregressive(Greedy())
PROMPT = 64  # tokens
STEPS = 100_000  # more than any run of ``trained`` takes
EVERLASTING = jnp.iinfo(jnp.int32).max  # rounds


@dataclasses.dataclass(frozen=True)
class Refusing(Greedy):
    """Accept at most ``most`` drafts in a round; the token after them is the full model's, as always."""

    most: jax.Array

    def verify(self, logits_BQV, draft_Bd, evidence, drafted_B, key):
        return super().verify(logits_BQV, draft_Bd, evidence, jnp.minimum(drafted_B, self.most), key)


@dataclasses.dataclass(frozen=True)
class Forced(SelfSpeculative):
    """Self-speculation that accepts a given share of its drafts.

    With `successor_model` every draft is right. So that a share is accepted, the sampler refuses the last drafts of a
    round as if they were wrong. A round drafts and verifies as many positions as without this, and every token is the
    full model's. The share is the state's ``memory``, so one compiled program serves all shares. All rows of a batch
    accept alike and end together.
    """

    def start(self, model: ModelConfig) -> jax.Array:
        return jnp.float32(1.0)

    def __call__(self, model: Transformer, state: DecodeState) -> DecodeState:
        def accepted_in_all(rounds: jax.Array) -> jax.Array:
            # 3.6 drafts a round, say, are 3, 7, 10, 14 after so many rounds. The addend is for rounding, as in 5 x 3.6.
            return jnp.floor(rounds * (state.memory * self.draft_length) + 1e-3).astype(jnp.int32)

        rounds = state.statistics.rounds
        most = accepted_in_all(rounds + 1) - accepted_in_all(rounds)
        return SelfSpeculative(Refusing(most), self.policy)(model, state)


def successor_model(config: ModelConfig) -> Transformer:
    """Return a random `unstacked` model whose every exit predicts token v + 1 after token v, by a wide margin.

    The head's column of v + 1 is the embedding of v, and embeddings outweigh what the blocks add. So rounding changes
    no token on any device. What a pass costs does not depend on it.
    """
    one_block = dataclasses.replace(config, num_layers=1)
    blocks = []
    for key in jax.random.split(jax.random.key(0), config.num_layers):
        # One program for all blocks: that of a whole model takes minutes to compile on a TPU.
        model = _successor_part(one_block, key)
        blocks.append(model.blocks[0])
    model.blocks, model.config = nnx.List(blocks), config
    return model


@partial(jax.jit, static_argnums=0)
def _successor_part(config: ModelConfig, key: jax.Array) -> Transformer:
    """Return such a model of one block."""
    model = Transformer(config, rngs=nnx.Rngs(key))
    embedding_VD = model.embedding_VD[...]
    model.head_DV[...] = jnp.roll(embedding_VD, 1, axis=0).T
    model.embedding_VD[...] = embedding_VD * (64 * config.dim**0.5)
    return model.unstacked()


def generated(model: Transformer, prompts: list[list[int]], way: Round, sizes: Sizes, share: float = 1.0) -> Generation:
    """Generate with a cache of ``sizes.cache`` positions, and time the rounds. ``share`` is for `Forced`."""
    state = start(model, prompts, sizes.new_tokens, way, max_length=sizes.cache - way.draft_length - 1)
    state = dataclasses.replace(state, memory=jax.tree.map(lambda _: jnp.float32(share), state.memory))
    state = jax.block_until_ready(run_rounds(way, model, state, jnp.int32(0)))  # compiles, and runs no round
    began = time.perf_counter()
    state = jax.block_until_ready(run_rounds(way, model, state, jnp.int32(EVERLASTING)))
    seconds = time.perf_counter() - began
    exits = way.exits or (model.config.num_layers,)
    return Generation.of(state, prompts, exits, seconds=seconds, prefill_seconds=0.0)


def decoding(rows: int, bench: Bench) -> Measured:
    """Time plain decoding beside the memory's limit, and self-speculation beside plain decoding and the cost model."""
    sizes, config = bench.sizes, bench.sizes.decoder
    model = successor_model(config)
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (rows, PROMPT)).tolist()
    forced = Forced(Greedy(), Fixed(sizes.exit_layer, sizes.draft_length))
    plain: list[Generation] = []
    runs: dict[float, list[Generation]] = {share: [] for share in ACCEPTANCES}
    for _ in range(1 + sizes.repeats):  # the first turn is to warm up
        plain.append(generated(model, prompts, PLAIN, sizes))
        for share, generations in runs.items():
            generations.append(generated(model, prompts, forced, sizes, share))
    right = [[(row[-1] + i) % config.vocab_size for i in range(1, sizes.new_tokens + 1)] for row in prompts]
    speed, bandwidth = median_speed(plain[1:]), bench.rate("bandwidth")
    bytes_read = weight_count(config) * weight_bytes(config)  # in a pass, for all rows
    limit = rows * bandwidth / bytes_read if bandwidth else None
    return {
        "shape": dataclasses.asdict(config), "rows": rows, "cache": sizes.cache, "prompt": PROMPT,
        "new_tokens": sizes.new_tokens, "exit_layer": sizes.exit_layer, "draft_length": sizes.draft_length,
        "weight_bytes": bytes_read, "plain_tokens_per_second": speed, "limit_tokens_per_second": limit,
        "of_limit": speed / limit if limit else None, "right": all(one.tokens == right for one in plain),
        "speculative": [
            {"forced": share} | compared(config, sizes.exit_layer, ours[1:], plain[1:]) for share, ours in runs.items()
        ],
    }  # fmt: skip


def median_speed(runs: list[Generation]) -> float:
    return statistics.median(run.tokens_per_second for run in runs)


def compared(config: ModelConfig, exit_layer: int, ours: list[Generation], plain: list[Generation]) -> Measured:
    """Return what a way to decode gives, beside plain decoding of the same turns and beside the cost model."""
    one = ours[0]
    drafted = one.drafted / sum(one.accepted_histogram)  # in a round of a row
    return {
        "acceptance": one.acceptance, "tokens_per_round": one.tokens_per_round, "tokens_per_second": median_speed(ours),
        "speedup": statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in zip(ours, plain)),
        "predicted": predicted_speedup(config, exit_layer, drafted, one.tokens_per_round),
        "identical": all(run.tokens == plain[0].tokens for run in ours),
        "same_tokens": statistics.mean(same_tokens(run, plain[0]) for run in ours),
    }  # fmt: skip


def same_tokens(ours: Generation, plain: Generation) -> float:
    """Return the share of the tokens before the first that differs, over all rows."""
    pairs = [(np.array(a), np.array(b)) for a, b in zip(ours.tokens, plain.tokens, strict=True)]
    same = [np.cumprod(a[: len(b)] == b[: len(a)]).sum() for a, b in pairs]
    return float(sum(same) / sum(len(b) for _, b in pairs))


def config_of_trained(sizes: Sizes, folder: str) -> Config:
    """Return the run of ``trained``: a loss at one exit a step, whole, in turn, as in configs/quickstart.py.

    It ends when time is up, at a step that is not known beforehand: so no schedule depends on the number of steps.
    """
    layers = sizes.trained.num_layers
    return Config(
        model=sizes.trained,
        layer_dropout=LayerDropoutConfig(p_max=0.1, time_scale="constant"),
        early_exit=EarlyExitConfig("rotational", layers - 1, e_scale=1.0, always_last=False),
        data=DataConfig(
            source="python_stdlib",
            data_dir=f"{folder}/data",
            tokenizer=f"{folder}/tokenizer.model",
            sequence_length=sizes.trained_length,
            shuffle_window=1,  # documents are shuffled anyway, and without a window all batches take the same time
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50, final_fraction=1.0),
        train=TrainConfig(
            steps=STEPS, batch_size=sizes.trained_rows, loss_chunk=min(128, sizes.trained_length), evaluate_batches=8
        ),
    )


def trained(bench: Bench) -> Measured:
    """Train a small model for what is left of the time; measure its exits, and self-speculation on held-out prompts."""
    # Here and in `train_for`, so that the other parts can do without the libraries of data.
    from layerskip_jax.commands.prompts import read_prompts
    from layerskip_jax.data.sentencepiece_tokenizer import train_tokenizer
    from layerskip_jax.data.sources import open_documents
    from layerskip_jax.evaluation.exits import exit_quality

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = config_of_trained(bench.sizes, folder)
        documents = open_documents(config.data, config.data.train_split)
        tokenizer = train_tokenizer(documents, config.data.tokenizer, config.model.vocab_size, sample_bytes=2_000_000)
        sample = [tokenizer.encode_prompt(str(documents[i])) for i in range(0, len(documents), 10)]
        corpus = round(statistics.mean(map(len, sample)) * len(documents))
        prepared = time.perf_counter() - began
        # The rest is for compilation: of the step, of the exits' evaluation, and of decoding.
        seconds = min(0.4 * bench.left(), bench.sizes.trained_seconds)
        model, about = train_for(config, seconds, most_tokens=bench.sizes.trained_epochs * corpus)
        quality = exit_quality(model, config).as_dict()
        prompts = [tokenizer.encode_prompt(text)[:PROMPT] for text in read_prompts(None, None, 4, config)]
    model = jax.jit(Transformer.unstacked)(jax.device_put(model, jax.local_devices()[0]))
    return {
        "shape": dataclasses.asdict(config.model), "corpus_tokens": corpus, "preparing_seconds": prepared, **about,
        **quality, "prompts": len(prompts), "new_tokens": bench.sizes.new_tokens,
        "speculative": list(speculated(model, prompts, bench)),
    }  # fmt: skip


def train_for(config: Config, seconds: float, most_tokens: int) -> tuple[Transformer, Measured]:
    """Train for so many seconds after compilation, but on ``most_tokens`` at most; return the model, and how it went.

    The next batch is made while the device is at work on the step before.
    """
    from layerskip_jax.data.pipeline import local_batches, to_devices

    mesh, before, done = make_mesh(config, jax.local_devices()), None, 0
    batches = (to_devices(batch, mesh) for batch in local_batches(config, config.data.train_split, mesh))
    trainer = Trainer(config, Recipe.from_config(config), mesh)
    began = time.monotonic()
    step, state, batch = trainer.compile_step(), trainer.init(), next(batches)
    compiled = time.monotonic()
    tokens = config.train.batch_size * config.data.sequence_length
    while time.monotonic() < compiled + seconds and done * tokens < most_tokens:
        state, metrics = step(state, batch)
        batch = next(batches)
        jax.block_until_ready(before)
        before, done = metrics, done + 1
    jax.block_until_ready(before)
    took = time.monotonic() - compiled
    return state.model, {
        "steps": done, "batch_size": config.train.batch_size, "length": config.data.sequence_length, "seconds": took,
        "tokens_per_second": done * tokens / took, "compile_seconds": compiled - began,
    }  # fmt: skip


def speculated(model: Transformer, prompts: list[list[int]], bench: Bench) -> Iterator[Measured]:
    """Yield how fast each setting is, a prompt at a time, beside plain decoding in turn; stop when time is short."""
    new_tokens, took = bench.sizes.new_tokens, 0.0
    for exit_layer, draft_length in bench.sizes.speculation:
        if bench.left() < took:
            return
        began = time.monotonic()
        way = SelfSpeculative(Greedy(), Fixed(exit_layer, draft_length))
        plain, ours = [], []
        for _ in range(1 + bench.sizes.repeats):  # the first turn is to warm up
            plain.append(joined([generate(model, [prompt], new_tokens, PLAIN) for prompt in prompts]))
            ours.append(joined([generate(model, [prompt], new_tokens, way) for prompt in prompts]))
        took = time.monotonic() - began
        yield {
            "exit_layer": exit_layer, "draft_length": draft_length,
            "plain_tokens_per_second": median_speed(plain[1:]),
            **compared(model.config, exit_layer, ours[1:], plain[1:]),
        }  # fmt: skip


def joined(parts: list[Generation]) -> Generation:
    """Return several generations as one: the texts of all, and the sums of what was counted and timed."""
    return dataclasses.replace(
        parts[0],
        tokens=[row for part in parts for row in part.tokens],
        seconds=sum(part.seconds for part in parts),
        rounds=sum(part.rounds for part in parts),
        drafted=sum(part.drafted for part in parts),
        accepted=sum(part.accepted for part in parts),
        accepted_histogram=np.sum([part.accepted_histogram for part in parts], axis=0).tolist(),
    )
