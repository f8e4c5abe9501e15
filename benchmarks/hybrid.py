"""Drafts from an exit, from lookups, and from both: ``python -m benchmarks.hybrid RUN [RUN ...] [--temperature 0.8]``.

RUN is the run folder of a trained model. The prompts are beginnings of held-out documents; for a model of Python code,
also docstrings and tables (`benchmarks.adaptive`). Each way decodes the same prompts, in turn. Prints for each kind of
prompt the speedup over plain decoding by the bytes of the weights and as measured, and the acceptance of each source.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.adaptive import prompts_of_kinds
from benchmarks.common import add_json_option, header, write_json
from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.commands.terminal import mean_round_cost
from layerskip_jax.config import Config, DecodeConfig
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.sources import open_documents
from layerskip_jax.decoding.configure import configure
from layerskip_jax.decoding.engine import generate
from layerskip_jax.decoding.request import Generation
from layerskip_jax.errors import run_command
from layerskip_jax.model import Transformer

LOOKUP_LENGTH = 8


def kinds_of_prompts(config: Config, per_kind: int) -> dict[str, list[str]]:
    """Return the prompts of each kind that the model's corpus offers."""
    if config.data.source == "python_stdlib":
        return prompts_of_kinds(config, per_kind)
    documents = open_documents(config.data, config.data.validation_split)
    texts = [str(documents[index]) for index in range(min(per_kind, len(documents)))]
    return {"held-out": [text[: min(200, len(text) // 2)] for text in texts]}


def ways(base: DecodeConfig) -> dict[str, DecodeConfig]:
    """Return the settings to compare, plain decoding first."""
    speculative = dataclasses.replace(base, mode="self_speculative", policy="fixed")
    return {
        "plain": dataclasses.replace(base, mode="autoregressive"),
        "exit, d = 2": dataclasses.replace(speculative, draft_length=2),
        "exit, d = 4": dataclasses.replace(speculative, draft_length=4),
        "lookup": dataclasses.replace(base, mode="prompt_lookup", draft_length=LOOKUP_LENGTH),
        "hybrid, d = 2": dataclasses.replace(speculative, draft_length=2, lookup_length=LOOKUP_LENGTH),
        "hybrid, d = 4": dataclasses.replace(speculative, draft_length=4, lookup_length=LOOKUP_LENGTH),
    }


def compare(
    model: Transformer, prompts: Sequence[Sequence[int]], base: DecodeConfig, repeats: int
) -> list[dict[str, Any]]:
    """Decode ``prompts`` in every way, ``repeats`` times in turn after one run to compile; return a row for each."""
    configs = ways(base)
    runs: dict[str, list[list[Generation]]] = {name: [] for name in configs}
    for _ in range(repeats + 1):
        for name, config in configs.items():
            decoder, strategy = configure(config, model)
            runs[name].append([generate(decoder, [p], base.max_new_tokens, strategy, seed=base.seed) for p in prompts])
    rows = []
    for name, config in configs.items():
        parts = runs[name][-1]
        rounds, tokens = sum(g.rounds for g in parts), sum(g.new_tokens for g in parts)
        seconds = [[sum(g.seconds for g in run) for run in runs[one][1:]] for one in ("plain", name)]
        drafts = {exit: sum(g.exit_drafts[exit] for g in parts) for exit in parts[0].exit_drafts}
        accepted = {exit: sum(g.exit_accepted[exit] for g in parts) for exit in drafts}
        same = [g.tokens for g in parts] == [g.tokens for g in runs["plain"][-1]]
        rows.append({
            "way": name,
            "by_bytes": tokens / rounds / mean_round_cost(parts, model.config, config),
            "measured": statistics.median(plain / own for plain, own in zip(*seconds, strict=True)),
            "tokens_per_round": tokens / rounds,
            "acceptance": {exit: accepted[exit] / n for exit, n in drafts.items() if n},
            "identical": None if base.temperature else same,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of each kind (default: 4)")
    parser.add_argument("--new_tokens", type=int, default=128, help="new tokens for each prompt (default: 128)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each way (default: 3)")
    parser.add_argument("--temperature", type=float, default=0.0, help="sample with this temperature and top-p 0.95")
    add_json_option(parser)
    options = parser.parse_args()
    about, results = header(), []
    for run in options.runs:
        model, config, tokenizer_path = load_model(run, unstacked=True)
        tokenizer = load_tokenizer(str(tokenizer_path))
        base = dataclasses.replace(
            config.decode_settings,
            max_new_tokens=options.new_tokens,
            temperature=options.temperature,
            top_p=0.95 if options.temperature else 1.0,
        )
        for kind, texts in kinds_of_prompts(config, options.prompts).items():
            prompts = [tokenizer.encode_prompt(text) for text in texts]
            rows = compare(model, prompts, base, options.repeats)
            results.append({"run": run, "kind": kind, "exit": base.exit_layer, "rows": rows})
            print(f"{run}, {kind}: way, by bytes, measured, tokens a round, acceptance of each exit (last: lookups)")
            for row in rows:
                rates = " ".join(f"{exit}: {rate:.0%}" for exit, rate in row["acceptance"].items())
                print(
                    f"  {row['way']:14} {row['by_bytes']:5.2f}x {row['measured']:5.2f}x {row['tokens_per_round']:5.2f}"
                    f"  {rates}" + ("  texts DIFFER" if row["identical"] is False else "")
                )
            best = {kind: max(r["by_bytes"] for r in rows if r["way"].startswith(kind)) for kind in ("exit", "lookup")}
            ours = max(r["by_bytes"] for r in rows if r["way"].startswith("hybrid"))
            print(f"  hybrid over the better of the two, by bytes: {ours / max(1.0, *best.values()):.2f}")
    write_json(options.json, about, results)


if __name__ == "__main__":
    run_command(main)
