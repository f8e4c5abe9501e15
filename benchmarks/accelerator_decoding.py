"""The generation parts of `benchmarks.accelerator`: with random weights, and with a model that it trains first."""

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
from layerskip_jax.decoding.cost import predicted_speedup, weight_bytes
from layerskip_jax.decoding.engine import begin, generate, run_rounds
from layerskip_jax.decoding.policies import Fixed
from layerskip_jax.decoding.request import Generation
from layerskip_jax.decoding.rounds import Autoregressive, SelfSpeculative, Strategy
from layerskip_jax.decoding.sampling import Greedy
from layerskip_jax.decoding.state import DecodeState
from layerskip_jax.model import Transformer, weight_count
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.sharding import make_mesh
from layerskip_jax.training.step import Trainer

ACCEPTANCES = (0.6, 0.8, 1.0)
"""Acceptances that `decoding` forces."""
PLAIN = Autoregressive(Greedy())
PROMPT = 64  # tokens
STEPS = 100_000  # more than any run of `trained` reaches
ALL_ROUNDS = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True)
class Refusing(Greedy):
    """Accept at most ``most`` drafts per round. The token after them is still the full model's."""

    most: jax.Array

    def verify(self, logits_BQV, drafts, key):
        return super().verify(logits_BQV, drafts._replace(count_B=jnp.minimum(drafts.count_B, self.most)), key)


@dataclasses.dataclass(frozen=True)
class Forced(SelfSpeculative):
    """Self-speculation that accepts a given share of its drafts.

    With `successor_model` every draft is right. To accept only a share, the sampler rejects the last drafts of a round
    as if they were wrong. A round still drafts and verifies as many positions, and every token is still the full
    model's. The share is the policy state, so one compiled program serves all shares. All rows of a batch accept
    equally many drafts and end together.
    """

    def init_policy_state(self, model: ModelConfig) -> jax.Array:
        return jnp.float32(1.0)

    def __call__(self, model: Transformer, state: DecodeState) -> DecodeState:
        def total_accepted(rounds: jax.Array) -> jax.Array:
            # For example, 3.6 drafts per round give totals of 3, 7, 10, 14. The 1e-3 absorbs rounding, as in 5 x 3.6.
            return jnp.floor(rounds * (state.policy_state * self.draft_length) + 1e-3).astype(jnp.int32)

        rounds = state.statistics.rounds
        most = total_accepted(rounds + 1) - total_accepted(rounds)
        return SelfSpeculative(Refusing(most), self.policy)(model, state)


def successor_model(config: ModelConfig) -> Transformer:
    """Return a random `unstacked` model in which every exit predicts token v + 1 after token v, by a wide margin.

    The head's column of v + 1 is the embedding of v, and embeddings outweigh what the blocks add. So rounding changes
    no token on any device. The cost of a pass is that of any other model.
    """
    one_block = dataclasses.replace(config, num_layers=1)
    blocks = []
    for key in jax.random.split(jax.random.key(0), config.num_layers):
        # One program for all blocks, since a whole model takes minutes to compile on a TPU.
        model = _successor_part(one_block, key)
        blocks.append(model.blocks[0])
    model.blocks, model.config = nnx.List(blocks), config
    return model


@partial(jax.jit, static_argnums=0)
def _successor_part(config: ModelConfig, key: jax.Array) -> Transformer:
    """Return a `successor_model` of one block."""
    model = Transformer(config, rngs=nnx.Rngs(key))
    embedding_VD = model.embedding_VD[...]
    model.head_DV[...] = jnp.roll(embedding_VD, 1, axis=0).T
    model.embedding_VD[...] = embedding_VD * (64 * config.dim**0.5)
    return model.unstacked()


def timed_generation(
    model: Transformer, prompts: list[list[int]], strategy: Strategy, sizes: Sizes, share: float = 1.0
) -> Generation:
    """Generate with a cache of ``sizes.cache`` positions, and time the rounds. ``share`` is for `Forced`."""
    state = begin(model, prompts, sizes.new_tokens, strategy, max_length=sizes.cache - strategy.draft_length - 1)
    policy_state = jax.tree.map(lambda _: jnp.float32(share), state.policy_state)
    state = dataclasses.replace(state, policy_state=policy_state)
    state = jax.block_until_ready(run_rounds(strategy, model, state, jnp.int32(0)))  # compiles, but runs no round
    began = time.perf_counter()
    state = jax.block_until_ready(run_rounds(strategy, model, state, jnp.int32(ALL_ROUNDS)))
    seconds = time.perf_counter() - began
    exits = strategy.exits or (model.config.num_layers,)
    return Generation.from_state(state, prompts, exits, seconds=seconds, prefill_seconds=0.0)


def decoding(rows: int, bench: Bench) -> Measured:
    """Compare plain decoding with the memory bandwidth, and self-speculation with plain decoding and the cost model."""
    sizes, config = bench.sizes, bench.sizes.decoder
    model = successor_model(config)
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (rows, PROMPT)).tolist()
    forced = Forced(Greedy(), Fixed(sizes.exit_layer, sizes.draft_length))
    plain: list[Generation] = []
    runs: dict[float, list[Generation]] = {share: [] for share in ACCEPTANCES}
    for _ in range(1 + sizes.repeats):  # the first repeat is the warm-up
        plain.append(timed_generation(model, prompts, PLAIN, sizes))
        for share, generations in runs.items():
            generations.append(timed_generation(model, prompts, forced, sizes, share))
    right = [[(row[-1] + i) % config.vocab_size for i in range(1, sizes.new_tokens + 1)] for row in prompts]
    speed, bandwidth = median_speed(plain[1:]), bench.rate("bandwidth")
    bytes_read = weight_count(config) * weight_bytes(config)  # per pass, for all rows together
    limit = rows * bandwidth / bytes_read if bandwidth else None
    return {
        "shape": dataclasses.asdict(config), "rows": rows, "cache": sizes.cache, "prompt": PROMPT,
        "new_tokens": sizes.new_tokens, "exit_layer": sizes.exit_layer, "draft_length": sizes.draft_length,
        "weight_bytes": bytes_read, "plain_tokens_per_second": speed, "limit_tokens_per_second": limit,
        "of_limit": speed / limit if limit else None, "right": all(one.tokens == right for one in plain),
        "speculative": [
            {"forced": share} | comparison(config, sizes.exit_layer, ours[1:], plain[1:])
            for share, ours in runs.items()
        ],
    }  # fmt: skip


def median_speed(runs: list[Generation]) -> float:
    return statistics.median(run.tokens_per_second for run in runs)


def comparison(config: ModelConfig, exit_layer: int, ours: list[Generation], plain: list[Generation]) -> Measured:
    """Compare a strategy with plain decoding in the same repeats, and with the cost model."""
    one = ours[0]
    return {
        "acceptance": one.acceptance, "tokens_per_round": one.tokens_per_round, "tokens_per_second": median_speed(ours),
        "speedup": statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in zip(ours, plain)),
        "predicted": predicted_speedup(config, exit_layer, one.drafted_per_round, one.tokens_per_round),
        "identical": all(run.tokens == plain[0].tokens for run in ours),
        "same_tokens": statistics.mean(same_share(run, plain[0]) for run in ours),
    }  # fmt: skip


def same_share(ours: Generation, plain: Generation) -> float:
    """Return the share of tokens before the first difference, over all rows."""
    pairs = [(np.array(a), np.array(b)) for a, b in zip(ours.tokens, plain.tokens, strict=True)]
    same = [np.cumprod(a[: len(b)] == b[: len(a)]).sum() for a, b in pairs]
    return float(sum(same) / sum(len(b) for _, b in pairs))


def trained_config(sizes: Sizes, folder: str) -> Config:
    """Return the config of `trained`: the loss of one exit per step, in rotation.

    This is the recipe ``tuned`` of docs/results/evidence.md, but with constant layer dropout: the run ends when its
    time is up, so no schedule may depend on the number of steps.
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
            shuffle_window=1,  # documents are already shuffled, and without a window all batches take the same time
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50, final_fraction=1.0),
        train=TrainConfig(
            steps=STEPS, batch_size=sizes.trained_rows, loss_chunk=min(128, sizes.trained_length), evaluate_batches=8
        ),
    )


def trained(bench: Bench) -> Measured:
    """Train a small model for up to 40 % of the time left; measure its exits, and speculation on held-out prompts."""
    # Imported here and in `train_for`, so that the other parts do not need the data libraries.
    from layerskip_jax.commands.prompts import read_prompts
    from layerskip_jax.data.sentencepiece_tokenizer import train_tokenizer
    from layerskip_jax.data.sources import open_documents
    from layerskip_jax.evaluation.exits import exit_quality

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = trained_config(bench.sizes, folder)
        documents = open_documents(config.data, config.data.train_split)
        tokenizer = train_tokenizer(documents, config.data.tokenizer, config.model.vocab_size, sample_bytes=2_000_000)
        sample = [tokenizer.encode_prompt(str(documents[i])) for i in range(0, len(documents), 10)]
        corpus = round(statistics.mean(map(len, sample)) * len(documents))
        prepared = time.perf_counter() - began
        # The rest is for compiling the step, the evaluation of the exits, and decoding.
        seconds = min(0.4 * bench.left(), bench.sizes.trained_seconds)
        model, about = train_for(config, seconds, most_tokens=bench.sizes.trained_epochs * corpus)
        quality = exit_quality(model, config).as_dict()
        prompts = [tokenizer.encode_prompt(text)[:PROMPT] for text in read_prompts(None, None, 4, config)]
    model = jax.jit(Transformer.unstacked)(jax.device_put(model, jax.local_devices()[0]))
    return {
        "shape": dataclasses.asdict(config.model), "corpus_tokens": corpus, "preparing_seconds": prepared, **about,
        **quality, "prompts": len(prompts), "new_tokens": bench.sizes.new_tokens,
        "speculative": list(speculation_speeds(model, prompts, bench)),
    }  # fmt: skip


def train_for(config: Config, seconds: float, most_tokens: int) -> tuple[Transformer, Measured]:
    """Train for ``seconds`` after compilation, on at most ``most_tokens``; return the model and the measurements.

    The host prepares the next batch while the device runs the previous step.
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


def speculation_speeds(model: Transformer, prompts: list[list[int]], bench: Bench) -> Iterator[Measured]:
    """Time each setting and plain decoding in turn, one prompt at a time; stop when the time runs short."""
    new_tokens, took = bench.sizes.new_tokens, 0.0
    for exit_layer, draft_length in bench.sizes.speculation:
        if bench.left() < took:
            return
        began = time.monotonic()
        strategy = SelfSpeculative(Greedy(), Fixed(exit_layer, draft_length))
        plain, ours = [], []
        for _ in range(1 + bench.sizes.repeats):  # the first repeat is the warm-up
            plain.append(Generation.total([generate(model, [prompt], new_tokens, PLAIN) for prompt in prompts]))
            ours.append(Generation.total([generate(model, [prompt], new_tokens, strategy) for prompt in prompts]))
        took = time.monotonic() - began
        yield {
            "exit_layer": exit_layer, "draft_length": draft_length,
            "plain_tokens_per_second": median_speed(plain[1:]),
            **comparison(model.config, exit_layer, ours[1:], plain[1:]),
        }  # fmt: skip
