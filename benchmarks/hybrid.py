"""Compare drafts from an exit, lookups and both: ``python -m benchmarks.hybrid RUN [RUN ...] [--temperature 0.8]``.

RUN is the run folder of a trained model. The prompts are beginnings of held-out documents; for a model of Python code,
also docstrings and tables (`benchmarks.adaptive`). All ways decode the same prompts, in turn. For each kind of prompt
and each way, prints the speedup over plain decoding (by the bytes of the weights, and measured), the tokens per round
and the acceptance.
"""

import argparse
import dataclasses
from collections.abc import Sequence

from benchmarks.adaptive import greedy_drafts, prompts_of_kinds
from benchmarks.common import header
from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.command_line import positive
from layerskip_jax.commands.prompts import read_prompts
from layerskip_jax.commands.sweep import measure
from layerskip_jax.config import Config, DecodeConfig
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.decoding.configure import resolve_exit_layer
from layerskip_jax.errors import run_command
from layerskip_jax.model import Transformer

LOOKUP_LENGTH = 8


def kinds_of_prompts(config: Config, per_kind: int) -> dict[str, list[str]]:
    """Return the prompts of each kind that the model's corpus offers."""
    if config.data.source == "python_stdlib":
        return prompts_of_kinds(config, per_kind)
    return {"held-out": read_prompts(None, None, per_kind, config)}


def ways(base: DecodeConfig) -> dict[str, DecodeConfig]:
    """Return the settings to compare with plain decoding."""
    exits = {d: dataclasses.replace(base, draft_length=d) for d in (2, 4)}
    hybrids = {d: dataclasses.replace(config, lookup_length=LOOKUP_LENGTH) for d, config in exits.items()}
    return {
        **{f"exit, d = {d}": config for d, config in exits.items()},
        "lookup": dataclasses.replace(base, mode="prompt_lookup", draft_length=LOOKUP_LENGTH),
        **{f"hybrid, d = {d}": config for d, config in hybrids.items()},
    }


def compare(model: Transformer, prompts: Sequence[Sequence[int]], base: DecodeConfig, repeats: int) -> None:
    """Time every way in turn, print a line for each, and the gain of the best hybrid over the best other way."""
    configs = ways(base)
    measured = dict(zip(configs, measure(model, prompts, list(configs.values()), repeats)[1:], strict=True))
    for name, m in measured.items():
        print(
            f"  {name:14} {m.predicted_speedup:5.2f}x {m.speedup:5.2f}x {m.tokens_per_round:5.2f} {m.acceptance:6.1%}"
            + ("  texts DIFFER" if m.identical is False else "")
        )
    speedups = {name: m.predicted_speedup for name, m in measured.items()}
    hybrid = max(speedup for name, speedup in speedups.items() if name.startswith("hybrid"))
    single = max(1.0, *(speedup for name, speedup in speedups.items() if not name.startswith("hybrid")))
    print(f"  best hybrid / best of exit, lookup and plain, by bytes: {hybrid / single:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of each kind (default: 4)")
    parser.add_argument("--new_tokens", type=int, default=128, help="new tokens for each prompt (default: 128)")
    parser.add_argument("--repeats", type=positive, default=3, help="timed runs of each way (default: 3)")
    parser.add_argument("--temperature", type=float, default=0.0, help="sample with this temperature and top-p 0.95")
    options = parser.parse_args()
    header()
    for run in options.runs:
        model, config, tokenizer_path = load_model(run, unstacked=True)
        tokenizer = load_tokenizer(str(tokenizer_path))
        base = dataclasses.replace(
            greedy_drafts(config.decode_settings),
            max_new_tokens=options.new_tokens,
            temperature=options.temperature,
            top_p=0.95 if options.temperature else 1.0,
        )
        exit_layer = resolve_exit_layer(base, config.model.num_layers)
        for kind, texts in kinds_of_prompts(config, options.prompts).items():
            prompts = [tokenizer.encode_prompt(text) for text in texts]
            print(f"{run}, {kind}, exit {exit_layer}: way, by bytes, measured, tokens a round, acceptance")
            compare(model, prompts, base, options.repeats)


if __name__ == "__main__":
    run_command(main)
