"""Measure the speed and memory of decoding: ``python -m benchmarks.decoding [PART ...] [--json FILE]``.

Random Llama-shaped models in float32, prompts of 64 tokens, greedy. ``tail`` scales what the blocks after the exit add
to the residual stream, and so sets the acceptance. Alternatives run in turn; figures are medians over ``--repeats``.
``memory`` runs nothing, so ``--repeats`` does not affect it:

    cost        speedup of self-speculation against the cost model, with and without reuse of the exit queries
    verify      time of a pass over 2 to 8 positions against one position
    max_length  tokens/s with a cache of 4,096 positions against a cache of 512
    memory      temporary memory of the compiled loop against the KVQ cache
    batch       tokens/s by batch size, plain and self-speculative (and a plot, with --plot FILE)
    length      10,000 tokens: time per token at the end, against a new loop that starts at the same position
    ynnpack     tokens/s without YNNPACK against tokens/s with it
    int8        int8 weights against float32 weights (needs qwix)
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import MODELS, add_json_option, called_in_turn, header, model_with_tail, write_json
from layerskip_jax import compiler_options
from layerskip_jax.cache import LayerCache
from layerskip_jax.command_line import positive
from layerskip_jax.config import ModelConfig
from layerskip_jax.decoding.adaptive import AdaptiveSpeculative
from layerskip_jax.decoding.adaptive_policy import Adaptive
from layerskip_jax.decoding.cost import (
    head_share,
    measured_bandwidth,
    predicted_speedup,
    round_cost,
    weight_bytes,
)
from layerskip_jax.decoding.engine import begin, generate, program_options, rounds_program, run_rounds
from layerskip_jax.decoding.policies import ConfidenceStop, Fixed
from layerskip_jax.decoding.prompt_lookup import PromptLookup
from layerskip_jax.decoding.quantization import quantized
from layerskip_jax.decoding.request import Generation
from layerskip_jax.decoding.rounds import Autoregressive, SelfSpeculative, Strategy
from layerskip_jax.decoding.sampling import Greedy
from layerskip_jax.decoding.state import KVQCache
from layerskip_jax.errors import run_command
from layerskip_jax.model import Transformer, empty_cache, weight_count

PLAIN = Autoregressive(Greedy())
Row = dict[str, Any]


def speculative(exit_layer: int, draft_length: int) -> SelfSpeculative:
    return SelfSpeculative(Greedy(), Fixed(exit_layer, draft_length))


@dataclasses.dataclass(frozen=True)
class WithoutQueries(SelfSpeculative):
    """The ablation: verification runs all blocks from the embeddings, and does not use the exit queries.

    Without exit queries, the last draft would not have to run through the early blocks while drafting. It still does
    here; `one_pass_more` corrects for it.
    """

    def verify(self, model, state, cache, drafts, key):
        token_B, start_B = state.last_token()
        token_BQ = jnp.concatenate([token_B[:, None], drafts.tokens_Bd], axis=1)
        position = model.rotary_tables(start_B[:, None] + jnp.arange(self.draft_length + 1)[None])
        x_BQD, layers = model.run_cached(model.embed(token_BQ), position, cache.layers, 0, self.exits[0])
        return super().verify(model, state, KVQCache(layers, [x_BQD]), drafts, key)


def random_prompts(config: ModelConfig, rows: int = 1, length: int = 64) -> list[list[int]]:
    return np.random.default_rng(0).integers(0, config.vocab_size, (rows, length)).tolist()


def speed(runs: list[Generation]) -> float:
    return statistics.median(run.tokens_per_second for run in runs)


def ratio(ours: list[Generation], theirs: list[Generation]) -> float:
    return statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in zip(ours, theirs, strict=True))


def cost(name: str, repeats: int) -> list[Row]:
    config, bandwidth, rows = MODELS[name], measured_bandwidth(), []
    for exit_layer in (config.num_layers // 4, config.num_layers // 2):
        model = model_with_tail(config, exit_layer, 0.02).unstacked()
        strategies: dict[str, Strategy] = {"plain": PLAIN}
        for d in (4, 8, 12):
            strategies[f"{d}"] = speculative(exit_layer, d)
            strategies[f"{d} without queries"] = WithoutQueries(Greedy(), Fixed(exit_layer, d))
        prompts = random_prompts(config)
        runs = called_in_turn({k: partial(generate, model, prompts, 128, s) for k, s in strategies.items()}, repeats)
        plain_limit = bandwidth / (weight_count(config) * weight_bytes(config))
        for d in (4, 8, 12):
            ours, without = runs[f"{d}"], runs[f"{d} without queries"]
            one = ours[0]
            drafted = one.drafted_per_round
            predicted = predicted_speedup(config, exit_layer, drafted, one.tokens_per_round)
            rows.append(
                {
                    "part": "cost", "model": name, "exit": exit_layer, "draft_length": d,
                    "acceptance": one.acceptance, "tokens_per_round": one.tokens_per_round,
                    "plain_tokens_per_second": speed(runs["plain"]),
                    "plain_of_memory_limit": speed(runs["plain"]) / plain_limit,
                    "speedup": ratio(ours, runs["plain"]), "predicted": predicted,
                    "measured/predicted": ratio(ours, runs["plain"]) / predicted, "bar": 0.9,
                    "with/without_queries": ratio(ours, without) / one_pass_more(config, exit_layer, drafted),
                    "identical": all(r.tokens == runs["plain"][0].tokens for r in [*ours, *without]),
                }
            )  # fmt: skip
    return rows


VERIFY_BARS: dict[str, float | None] = {"narrow": 1.4, "small": 1.2, "medium": None, "large": 1.2}
"""The most that a pass over four positions may cost [plain passes]."""


def verify(name: str, repeats: int) -> list[Row]:
    """Time a compiled loop of passes through all blocks and the head, after 64 positions."""
    config, passes, prompt = MODELS[name], 32, 64
    model = model_with_tail(config, 4, 0.02).unstacked()
    widths = (1, 2, 3, 4, 5, 8)
    layers = empty_cache(config, 1, prompt + passes + max(widths))

    @partial(jax.jit, static_argnames="width", compiler_options=program_options(config))
    def run(model: Transformer, layers: list[LayerCache], width: int) -> jax.Array:
        def one(index: jax.Array, carry: tuple[jax.Array, list[LayerCache]]) -> tuple[jax.Array, list[LayerCache]]:
            tokens_BW, layers = carry
            position = model.rotary_tables(prompt + index + jnp.arange(width)[None])
            x_BWD, layers = model.run_cached(model.embed(tokens_BW), position, layers, 0, config.num_layers)
            return jnp.argmax(model.unembed(x_BWD), -1).astype(jnp.int32), layers

        return jax.lax.fori_loop(0, passes, one, (jnp.ones((1, width), jnp.int32), layers))[0]

    def seconds(width: int) -> float:
        began = time.perf_counter()
        run(model, layers, width).block_until_ready()
        return (time.perf_counter() - began) / passes

    runs = called_in_turn({f"{width}": partial(seconds, width) for width in widths}, repeats)
    return [
        {"part": "verify", "model": name, "positions": width, "ms": 1e3 * statistics.median(runs[f"{width}"]),
         "of_plain": statistics.median(a / b for a, b in zip(runs[f"{width}"], runs["1"], strict=True)),
         "bar": VERIFY_BARS[name] if width == 4 else None}
        for width in widths
    ]  # fmt: skip


def one_pass_more(config: ModelConfig, exit_layer: int, drafted: float) -> float:
    """Return a round's cost with one more pass of the early blocks, without the head, over its cost without that pass.

    `WithoutQueries` runs this pass needlessly, so the measured gain of reuse is divided by this ratio.
    """
    cost = round_cost(config, exit_layer, drafted)
    return (round_cost(config, exit_layer, drafted + 1) - head_share(config)) / cost


def max_length(name: str, repeats: int) -> list[Row]:
    config, rows = MODELS[name], []
    model = model_with_tail(config, 4, 0.02).unstacked()
    prompts = random_prompts(config)
    for way, strategy in {"plain": PLAIN, "speculative": speculative(4, 6)}.items():
        runs = called_in_turn(
            {n: partial(generate, model, prompts, 256, strategy, max_length=int(n)) for n in ("512", "4096")},
            repeats,
        )
        same = runs["512"][0].tokens == runs["4096"][0].tokens
        rows.append(
            {"part": "max_length", "model": name, "way": way, "tokens_per_second_512": speed(runs["512"]),
             "tokens_per_second_4096": speed(runs["4096"]), "ratio": ratio(runs["4096"], runs["512"]), "bar": 0.9,
             "identical": same}
        )  # fmt: skip
    return rows


def memory(name: str, repeats: int) -> list[Row]:
    config, rows = MODELS[name], []
    model = model_with_tail(config, 4, 0.02).unstacked()
    strategies: dict[str, Strategy] = {
        "plain": PLAIN,
        "fixed": speculative(4, 6),
        "confidence": AdaptiveSpeculative(Greedy(), ConfidenceStop(4, 6)),
        "adaptive": AdaptiveSpeculative(Greedy(), Adaptive((2, 4, 6), 6)),
        "prompt_lookup": PromptLookup(Greedy(), 6),
    }
    for way, strategy in strategies.items():
        state = begin(model, random_prompts(config), 256, strategy, max_length=1024)
        analysis = rounds_program(config).lower(strategy, model, state, jnp.int32(0)).compile().memory_analysis()
        cache = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache))
        rows.append(
            {"part": "memory", "model": name, "way": way, "cache_MiB": cache / 2**20,
             "temporary_MiB": analysis.temp_size_in_bytes / 2**20, "ratio": analysis.temp_size_in_bytes / cache,
             "bar": 1.1}
        )  # fmt: skip
    return rows


def batch(name: str, repeats: int) -> list[Row]:
    config, rows = MODELS[name], []
    model = model_with_tail(config, 4, 0.02).unstacked()
    sizes = (1, 2, 4, 8, 16)
    prompts = random_prompts(config, max(sizes))
    alone = [generate(model, [prompt], 64, PLAIN, max_length=128).tokens[0] for prompt in prompts]
    strategies: dict[str, Strategy] = {"plain": PLAIN, "speculative": speculative(4, 4)}
    ways = {
        f"{way} {n}": partial(generate, model, prompts[:n], 64, strategy, max_length=128)
        for way, strategy in strategies.items()
        for n in sizes
    }
    runs = called_in_turn(ways, repeats)
    for way in strategies:
        for n in sizes:
            mine = runs[f"{way} {n}"]
            rows.append(
                {"part": "batch", "model": name, "way": way, "rows": n, "tokens_per_second": speed(mine),
                 "of_one_row": ratio(mine, runs[f"{way} 1"]), "of_plain": ratio(mine, runs[f"plain {n}"]),
                 "bar": 4.0 if n == 8 else None, "identical": mine[0].tokens == alone[:n]}
            )  # fmt: skip
    return rows


def length(name: str, repeats: int, new_tokens: int = 10_000) -> list[Row]:
    """Time the last tenth of the positions after 9,000 rounds, and the same positions in a new loop."""
    config = MODELS[name]
    model = model_with_tail(config, 4, 0.02).unstacked()
    tenth, prompt = new_tokens // 10, random_prompts(config)[0]
    total = len(prompt) + new_tokens

    def timed(prompt: list[int], new: int, skip: int) -> tuple[float, list[int]]:
        """Return the seconds per token, without the first ``skip`` new tokens, and all known tokens."""
        state = begin(model, [prompt], new, PLAIN, max_length=total)
        state = jax.block_until_ready(run_rounds(PLAIN, model, state, jnp.int32(skip)))
        began = time.perf_counter()
        state = jax.block_until_ready(run_rounds(PLAIN, model, state, jnp.int32(new)))
        return (time.perf_counter() - began) / (new - skip), state.tokens_BS[0, : len(prompt) + new].tolist()

    _, text = timed(prompt, new_tokens, new_tokens - tenth)  # also compiles
    parts = {
        "first": partial(timed, prompt, tenth, 1),
        "last": partial(timed, prompt, new_tokens, new_tokens - tenth),
        "fresh": partial(timed, text[: total - tenth], tenth, 1),
    }
    runs = called_in_turn(parts, repeats, warm_up=0)
    first, last, fresh = (statistics.median(seconds for seconds, _ in runs[part]) for part in parts)
    ratios = [ours / theirs for (ours, _), (theirs, _) in zip(runs["last"], runs["fresh"], strict=True)]
    # The additional keys and values that attention reads at the end, at the memory bandwidth.
    per_position = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    growth = per_position * (new_tokens - tenth) / measured_bandwidth()
    return [
        {"part": "length", "model": name, "ms_first_tenth": 1e3 * first, "ms_last_tenth": 1e3 * last,
         "ms_fresh_loop_at_last_tenth": 1e3 * fresh, "last/fresh": statistics.median(ratios), "bar": 1.1,
         "ms_growth_by_bandwidth": 1e3 * growth, "last/(first + growth)": last / (first + growth),
         "identical": all(again == text for _, again in runs["fresh"])}
    ]  # fmt: skip


def ynnpack(name: str, repeats: int) -> list[Row]:
    """Decode with and without YNNPACK, whatever `compiler_options.YNNPACK_LIMIT` says about a model of this size."""
    config, rows = MODELS[name], []
    exit_layer = config.num_layers // 4
    model = model_with_tail(config, exit_layer, 0.02).unstacked()

    def run(limit: float, prompts: list[list[int]], strategy: Strategy) -> Generation:
        with mock.patch.object(compiler_options, "YNNPACK_LIMIT", limit):
            return generate(model, prompts, 64, strategy)

    limits = {"with": float("inf"), "without": 0.0}
    strategies = {"plain": PLAIN, "d = 4": speculative(exit_layer, 4), "d = 8": speculative(exit_layer, 8)}
    for size in (1, 8):
        prompts = random_prompts(config, size)
        for way, strategy in strategies.items():
            runs = called_in_turn({k: partial(run, limit, prompts, strategy) for k, limit in limits.items()}, repeats)
            rows.append(
                {"part": "ynnpack", "model": name, "weights_MB": weight_count(config) * weight_bytes(config) / 1e6,
                 "rows": size, "way": way, "tokens_per_second_with": speed(runs["with"]),
                 "tokens_per_second_without": speed(runs["without"]),
                 "without/with": ratio(runs["without"], runs["with"]),
                 "identical": runs["with"][0].tokens == runs["without"][0].tokens}
            )  # fmt: skip
    return rows


def int8(name: str, repeats: int) -> list[Row]:
    config, rows = MODELS[name], []
    full = model_with_tail(config, 4, 0.02).unstacked()
    small = quantized(full)
    models = {"full": full, "int8": small}
    for way, strategy in {"plain": PLAIN, "speculative": speculative(4, 6)}.items():
        runs = called_in_turn(
            {k: partial(generate, m, random_prompts(config), 128, strategy) for k, m in models.items()}, repeats
        )
        sizes = {k: sum(leaf.nbytes for leaf in jax.tree.leaves(m)) for k, m in models.items()}
        rows.append(
            {"part": "int8", "model": name, "way": way, "full_tokens_per_second": speed(runs["full"]),
             "int8_tokens_per_second": speed(runs["int8"]), "ratio": ratio(runs["int8"], runs["full"]),
             "weights_ratio": sizes["int8"] / sizes["full"]}
        )  # fmt: skip
    return rows


PARTS: dict[str, Callable[[str, int], list[Row]]] = {
    "cost": cost, "verify": verify, "max_length": max_length, "memory": memory, "batch": batch, "length": length,
    "ynnpack": ynnpack, "int8": int8,
}  # fmt: skip


def show(rows: list[Row]) -> None:
    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)

    names = [name for name in rows[0] if name != "part"]
    cells = [names, *([cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    print(f"\n{rows[0]['part']}")
    for line in cells:
        print("  " + "  ".join(f"{text:>{width}}" for text, width in zip(line, widths, strict=True)), flush=True)


def plot_batch(rows: list[Row], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for way in ("plain", "speculative"):
        mine = [row for row in rows if row["way"] == way]
        axis.plot([row["rows"] for row in mine], [row["tokens_per_second"] for row in mine], marker="o", label=way)
    axis.set(
        xscale="log", yscale="log", xlabel="batch size [rows]", ylabel="tokens/s, all rows", title=rows[0]["model"]
    )
    axis.legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all but int8)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["small", "large"])
    parser.add_argument("--repeats", type=positive, default=3)
    add_json_option(parser)
    parser.add_argument("--plot", type=Path, help="PNG file for the plot of the batch part")
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"unknown part {unknown.pop()!r}; the parts are {', '.join(PARTS)}")
    about, results = header(), []
    for part in options.parts or [part for part in PARTS if part != "int8"]:
        for name in options.models:
            rows = PARTS[part](name, options.repeats)
            show(rows)
            results += rows
            if part == "batch" and options.plot:
                plot_batch(rows, options.plot.with_stem(f"{options.plot.stem}_{name}"))
    write_json(options.json, about, results)


if __name__ == "__main__":
    run_command(main)
