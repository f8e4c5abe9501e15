"""What a round costs, and what it does not depend on: ``python benchmarks/decoding.py [PART ...] [--json]``.

Random Llama-shaped models in float32, prompt 64, greedy; how often drafts are accepted is set by scaling what the
blocks after the exit add (``tail``). Parts, each measured side by side in turn, medians of ``--repeats``:

    cost        self-speculation against plain decoding and against the cost model, with and without the exit queries
    max_length  tokens/s with a cache of 4,096 positions against one of 512
    memory      temporary memory of the compiled loop against the KVQ cache
    batch       tokens/s against batch size, plain and self-speculative (and a picture, with --plot FILE)
    length      10,000 tokens: time of a token at the end against the same positions in a loop that starts there
    int8        int8 weights against float32 ones (wants qwix)
"""

import argparse
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layerskip_jax.config import ModelConfig
from layerskip_jax.decoding.cost import (
    head_share,
    measured_bandwidth,
    predicted_speedup,
    round_cost,
    weight_bytes,
    weight_count,
)
from layerskip_jax.decoding.engine import generate, run_rounds, start
from layerskip_jax.decoding.policies import Adaptive, ConfidenceStop, Fixed
from layerskip_jax.decoding.prompt_lookup import PromptLookup
from layerskip_jax.decoding.quantization import quantized
from layerskip_jax.decoding.request import Generation
from layerskip_jax.decoding.rounds import Autoregressive, Round, SelfSpeculative
from layerskip_jax.decoding.sampling import Greedy
from layerskip_jax.model import Transformer

MODELS = {
    "small": ModelConfig(12, 256, 4, 4, 688, 4096, compute_dtype="float32"),
    "large": ModelConfig(16, 768, 12, 12, 2048, 32000, compute_dtype="float32"),
}
PLAIN = Autoregressive(Greedy())
Row = dict[str, Any]


def speculative(exit_layer: int, draft_length: int) -> SelfSpeculative:
    return SelfSpeculative(Greedy(), Fixed(exit_layer, draft_length))


@dataclasses.dataclass(frozen=True)
class WithoutQueries(SelfSpeculative):
    """The ablation: verification starts from the embeddings again, through all blocks; the exit queries are unused.

    The draft then need not take its last token through the early blocks, but here it does; `cost` corrects for it.
    """

    def _verify(self, model, state, plan, key, position, draft_Bd, evidence, drafted_B, before):
        token_B, _ = state.last_token()
        token_BW = jnp.concatenate([token_B[:, None], draft_Bd], axis=1)[:, : position.index_BT.shape[1]]
        cache, first = before[0], self.exits[0]
        x_BWD, layers = model.run_cached(model.embed(token_BW), position, cache.layers, 0, first)
        cache = dataclasses.replace(cache, layers=layers, exit_query_BQD=[x_BWD])
        return super()._verify(model, state, plan, key, position, draft_Bd, evidence, drafted_B, (cache, before[1]))


def with_tail(config: ModelConfig, exit_layer: int, tail: float) -> Transformer:
    model = Transformer(config, rngs=nnx.Rngs(0))
    scale_L = jnp.where(jnp.arange(config.num_layers) < exit_layer, 1.0, tail)
    model.blocks.output_NHD[...] *= scale_L[:, None, None, None]
    model.blocks.down_FD[...] *= scale_L[:, None, None]
    return model.unstacked()


def prompts_of(config: ModelConfig, rows: int = 1, length: int = 64) -> list[list[int]]:
    return np.random.default_rng(0).integers(0, config.vocab_size, (rows, length)).tolist()


def in_turn(ways: dict[str, Callable[[], Generation]], repeats: int) -> dict[str, list[Generation]]:
    """Call each way in turn, ``repeats`` times after a first turn that compiles."""
    runs: dict[str, list[Generation]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            runs[name].append(way())
    return {name: generations[1:] for name, generations in runs.items()}


def speed(runs: list[Generation]) -> float:
    return statistics.median(run.tokens_per_second for run in runs)


def ratio(ours: list[Generation], theirs: list[Generation]) -> float:
    return statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in zip(ours, theirs, strict=True))


def cost(name: str, repeats: int) -> list[Row]:
    config, bandwidth, rows = MODELS[name], measured_bandwidth(), []
    for exit_layer in (config.num_layers // 4, config.num_layers // 2):
        model = with_tail(config, exit_layer, 0.02)
        steps: dict[str, Round] = {"plain": PLAIN}
        for d in (4, 8, 12):
            steps[f"{d}"] = speculative(exit_layer, d)
            steps[f"{d} without queries"] = WithoutQueries(Greedy(), Fixed(exit_layer, d))
        runs = in_turn({k: partial(generate, model, prompts_of(config), 128, s) for k, s in steps.items()}, repeats)
        plain_limit = bandwidth / (weight_count(config) * weight_bytes(config))
        for d in (4, 8, 12):
            ours, without = runs[f"{d}"], runs[f"{d} without queries"]
            one = ours[0]
            predicted = predicted_speedup(config, exit_layer, one.drafted / one.rounds, one.tokens_per_round)
            drafted = one.drafted / one.rounds
            rows.append(
                {
                    "part": "cost", "model": name, "exit": exit_layer, "draft_length": d,
                    "acceptance": one.acceptance, "tokens_per_round": one.tokens_per_round,
                    "plain_tokens_per_second": speed(runs["plain"]),
                    "plain_of_memory_limit": speed(runs["plain"]) / plain_limit,
                    "speedup": ratio(ours, runs["plain"]), "predicted": predicted,
                    "measured/predicted": ratio(ours, runs["plain"]) / predicted, "bar": 0.85,
                    "with/without_queries": ratio(ours, without) / one_pass_more(config, exit_layer, drafted),
                    "identical": all(r.tokens == runs["plain"][0].tokens for r in [*ours, *without]),
                }
            )  # fmt: skip
    return rows


def one_pass_more(config: ModelConfig, exit_layer: int, drafted: float) -> float:
    """Return what a round of `WithoutQueries` costs by bytes: its last draft goes through the early blocks as well.

    What reuse brings is measured beyond that pass, which has no head.
    """
    cost = round_cost(config, exit_layer, drafted)
    return (round_cost(config, exit_layer, drafted + 1) - head_share(config)) / cost


def max_length(name: str, repeats: int) -> list[Row]:
    config, rows = MODELS[name], []
    model = with_tail(config, 4, 0.02)
    prompts = prompts_of(config)
    for way, step in {"plain": PLAIN, "speculative": speculative(4, 6)}.items():
        runs = in_turn(
            {n: partial(generate, model, prompts, 256, step, max_length=int(n)) for n in ("512", "4096")},
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
    model = with_tail(config, 4, 0.02)
    steps: dict[str, Round] = {
        "plain": PLAIN,
        "fixed": speculative(4, 6),
        "confidence": SelfSpeculative(Greedy(), ConfidenceStop(4, 6)),
        "adaptive": SelfSpeculative(Greedy(), Adaptive(4, 6, (2, 4, 6))),
        "prompt_lookup": PromptLookup(Greedy(), 6),
    }
    for way, step in steps.items():
        state = start(model, prompts_of(config), 256, step, max_length=1024)
        analysis = run_rounds.lower(step, model, state, jnp.int32(0)).compile().memory_analysis()
        cache = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache))
        rows.append(
            {"part": "memory", "model": name, "way": way, "cache_MiB": cache / 2**20,
             "temporary_MiB": analysis.temp_size_in_bytes / 2**20, "ratio": analysis.temp_size_in_bytes / cache,
             "bar": 1.1}
        )  # fmt: skip
    return rows


def batch(name: str, repeats: int) -> list[Row]:
    config, rows = MODELS[name], []
    model = with_tail(config, 4, 0.02)
    sizes = (1, 2, 4, 8, 16)
    everyone = prompts_of(config, max(sizes))
    alone = [generate(model, [prompt], 64, PLAIN, max_length=128).tokens[0] for prompt in everyone]
    steps: dict[str, Round] = {"plain": PLAIN, "speculative": speculative(4, 4)}
    ways = {
        f"{way} {n}": partial(generate, model, everyone[:n], 64, step, max_length=128)
        for way, step in steps.items()
        for n in sizes
    }
    runs = in_turn(ways, repeats)
    for way in steps:
        for n in sizes:
            mine = runs[f"{way} {n}"]
            rows.append(
                {"part": "batch", "model": name, "way": way, "rows": n, "tokens_per_second": speed(mine),
                 "of_one_row": ratio(mine, runs[f"{way} 1"]), "of_plain": ratio(mine, runs[f"plain {n}"]),
                 "bar": 4.0 if n == 8 else None, "identical": mine[0].tokens == alone[:n]}
            )  # fmt: skip
    return rows


def length(name: str, repeats: int, new_tokens: int = 10_000) -> list[Row]:
    """Positions of the last tenth after 9,000 rounds, against the same positions in a loop that has just begun."""
    config = MODELS[name]
    model = with_tail(config, 4, 0.02)
    tenth, prompt = new_tokens // 10, prompts_of(config)[0]
    total = len(prompt) + new_tokens

    def timed(prompt: list[int], new: int, skip: int) -> tuple[float, list[int]]:
        """Return the seconds a token of all new tokens but the first ``skip``, and all known tokens."""
        state = start(model, [prompt], new, PLAIN, max_length=total)
        state = jax.block_until_ready(run_rounds(PLAIN, model, state, jnp.int32(skip)))
        began = time.perf_counter()
        state = jax.block_until_ready(run_rounds(PLAIN, model, state, jnp.int32(new)))
        return (time.perf_counter() - began) / (new - skip), state.tokens_BS[0, : len(prompt) + new].tolist()

    timed(prompt, 2, 1)  # compiles
    _, text = timed(prompt, new_tokens - tenth, 1)  # all of it in one loop
    first, _ = timed(prompt, tenth, 1)
    last, text = timed(prompt, new_tokens, new_tokens - tenth)
    fresh, again = timed(text[: total - tenth], tenth, 1)
    # What attention has to read more: keys and values of the positions, at the bandwidth of the memory.
    per_position = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    growth = per_position * (new_tokens - tenth) / measured_bandwidth()
    return [
        {"part": "length", "model": name, "ms_first_tenth": 1e3 * first, "ms_last_tenth": 1e3 * last,
         "ms_fresh_loop_at_last_tenth": 1e3 * fresh, "last/fresh": last / fresh, "bar": 1.1,
         "ms_growth_by_bandwidth": 1e3 * growth, "last/(first + growth)": last / (first + growth),
         "identical": again == text}
    ]  # fmt: skip


def int8(name: str, repeats: int) -> list[Row]:
    config, rows = MODELS[name], []
    full = with_tail(config, 4, 0.02)
    small = quantized(full)
    models = {"full": full, "int8": small}
    for way, step in {"plain": PLAIN, "speculative": speculative(4, 6)}.items():
        runs = in_turn({k: partial(generate, m, prompts_of(config), 128, step) for k, m in models.items()}, repeats)
        bytes_of = {k: sum(leaf.nbytes for leaf in jax.tree.leaves(m)) for k, m in models.items()}
        rows.append(
            {"part": "int8", "model": name, "way": way, "full_tokens_per_second": speed(runs["full"]),
             "int8_tokens_per_second": speed(runs["int8"]), "ratio": ratio(runs["int8"], runs["full"]),
             "weights_ratio": bytes_of["int8"] / bytes_of["full"]}
        )  # fmt: skip
    return rows


PARTS: dict[str, Callable[[str, int], list[Row]]] = {
    "cost": cost, "max_length": max_length, "memory": memory, "batch": batch, "length": length, "int8": int8,
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
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all but int8)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON lines only")
    parser.add_argument("--plot", type=Path, help="PNG file for the picture of the batch part")
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no part {unknown.pop()!r}; they are {', '.join(PARTS)}")
    if not options.json:
        print(f"jax {jax.__version__}, flax {flax.__version__}, Python {platform.python_version()}")
        print(f"{jax.device_count()} {jax.devices()[0].device_kind}, {platform.machine()}; {options.repeats} repeats")
    for part in options.parts or [part for part in PARTS if part != "int8"]:
        for name in options.models:
            rows = PARTS[part](name, options.repeats)
            print("\n".join(map(json.dumps, rows))) if options.json else show(rows)
            if part == "batch" and options.plot:
                plot_batch(rows, options.plot.with_stem(f"{options.plot.stem}_{name}"))


if __name__ == "__main__":
    main()
