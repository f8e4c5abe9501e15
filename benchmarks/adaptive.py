"""Compare the adaptive policy with fixed settings on three kinds of prompt: ``python -m benchmarks.adaptive RUN``.

RUN is the run folder of a model of Python code (``make quickstart``). The kinds are code (beginnings of held-out
documents), prose (docstrings of the documents) and tables (literals in a regular pattern). For each kind, all pairs of
exit and draft length, the adaptive policy over the trained exits, alone and with lookups, the confidence policy and
prompt lookup are timed in turn, and their texts compared with those of plain decoding. The last rows are of early exit
by confidence, which is lossy: how often its next token is the full model's, and its speedup.
"""

import argparse
import ast
import dataclasses
import json
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.common import add_json_option, header, write_json
from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.command_line import positive
from layerskip_jax.commands.sweep import Measurement, adaptive_config, measure, measured_overhead
from layerskip_jax.config import Config, DecodeConfig
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.sources import open_documents
from layerskip_jax.decoding.configure import configure
from layerskip_jax.decoding.cost import Overhead
from layerskip_jax.decoding.engine import generate
from layerskip_jax.errors import UserError, run_command
from layerskip_jax.model import Transformer

LENGTHS = (2, 4, 6, 8)
TABLES = [
    "".join(f"    {key!r}: {value},\n" for key, value in zip("abcdefghij", range(start, start + 10)))
    for start in (1, 20, 300, 4000)
] + ["".join(f"{name}_{i} = {i}\n" for i in range(8)) for name in ("ERROR", "x", "FLAG", "OP")]


def prompts_of_kinds(config: Config, per_kind: int) -> dict[str, list[str]]:
    """Return prompts of each kind. Code and prose come from held-out documents."""
    documents = open_documents(config.data, config.data.validation_split)
    code, prose = [], []
    for index in range(len(documents)):
        text = str(documents[index])
        code.append(text[: min(200, len(text) // 2)])
        try:
            docstring = ast.get_docstring(ast.parse(text)) or ""
        except SyntaxError:
            continue
        if len(docstring) > 200:
            prose.append('"""' + docstring[:200])
    return {
        "code": code[:per_kind],
        "prose": prose[:per_kind],
        "tables": [f"TABLE = {{\n{t}" for t in TABLES[:per_kind]],
    }


def greedy_drafts(settings: DecodeConfig) -> DecodeConfig:
    """Return a run's settings for greedy drafts from one exit, without its lookups, choices and temperature."""
    changes = {"mode": "self_speculative", "policy": "fixed", "lookup_length": 0, "choices": 1, "temperature": 0.0}
    return dataclasses.replace(settings, **changes, ignore_eos=True)


def exit_curve(model: Transformer, prompts: list[list[int]], config: DecodeConfig, repeats: int) -> list[dict]:
    """Return the accuracy and the speed of exit by confidence for several thresholds.

    Accuracy: how often the next token is the full model's, at every eighth position of the full model's text.
    """
    rows = []
    plain = dataclasses.replace(config, mode="autoregressive")
    full = [generate(model, [p], config.max_new_tokens, configure(plain, model)[1]) for p in prompts]
    for threshold in (0.3, 0.5, 0.7, 0.9, 0.99):
        lossy = dataclasses.replace(config, mode="early_exit", exit_threshold=threshold)
        strategy = configure(lossy, model)[1]
        ratios = []
        for _ in range(repeats + 1):
            theirs = [generate(model, [p], config.max_new_tokens, configure(plain, model)[1]) for p in prompts]
            ours = [generate(model, [p], config.max_new_tokens, strategy) for p in prompts]
            ratios.append(sum(g.seconds for g in theirs) / sum(g.seconds for g in ours))
        longest = max(map(len, prompts)) + config.max_new_tokens
        same = [
            generate(model, [[*prompt, *text.tokens[0][:cut]]], 1, strategy, max_length=longest).tokens[0]
            == text.tokens[0][cut : cut + 1]
            for prompt, text in zip(prompts, full, strict=True)
            for cut in range(0, len(text.tokens[0]), 8)
        ]
        exits = {exit_layer: sum(g.exit_rounds[exit_layer] for g in ours) for exit_layer in ours[0].exit_rounds}
        rows.append(
            {"threshold": threshold, "same_next_token": sum(same) / len(same), "speedup": statistics.median(ratios[1:]),
             "exits": exits}
        )  # fmt: skip
    return rows


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Every decoding setting on every kind of prompt, relative to plain decoding."""

    names: list[str]  # of the settings after plain decoding; the first ``fixed`` have a fixed exit and length
    fixed: int
    overhead: Overhead
    measured: dict[str, list[Measurement]]  # kind -> plain decoding, then the settings

    @property
    def adaptive(self) -> list[str]:
        return [name for name in self.names if name.startswith("adaptive")]

    def speedups(self, kind: str) -> np.ndarray:
        return np.array([m.speedup for m in self.measured[kind][1:]])

    def summary(self) -> Iterator[dict[str, Any]]:
        """Yield a row per kind with the best fixed setting and the other policies, then a row for all kinds."""
        for kind, measured in self.measured.items():
            speedup, best = self.speedups(kind), int(np.argmax(self.speedups(kind)[: self.fixed]))
            others = dict(zip(self.names[self.fixed :], speedup[self.fixed :].tolist(), strict=True))
            yield {
                "kind": kind, "plain_tokens_per_second": measured[0].tokens_per_second,
                "best_fixed": self.names[best], "best_fixed_speedup": float(speedup[best]),
                "best_acceptance": measured[1 + best].acceptance, **others,
                **{f"{name}/best_fixed": others[name] / float(speedup[best]) for name in self.adaptive}, "bar": 1.0,
                "identical": all(m.identical for m in measured),
            }  # fmt: skip
        # One setting for all kinds: the total time, with each kind weighted to take plain decoding the same time.
        together = len(self.measured) / sum(1 / self.speedups(kind) for kind in self.measured)
        one = int(np.argmax(together[: self.fixed]))
        speedup = {name: float(together[self.names.index(name)]) for name in self.adaptive}
        yield {
            "one_fixed_for_all": self.names[one], "speedup": float(together[one]), **speedup,
            **{f"{name}/one_fixed": one_speedup / float(together[one]) for name, one_speedup in speedup.items()},
            "bar": 1.1,
        }  # fmt: skip


def compare(
    model: Transformer,
    prompts: dict[str, list[list[int]]],
    base: DecodeConfig,
    exits: Sequence[int],
    repeats: int,
    lookups: bool = False,
) -> Comparison:
    """Time all pairs of exit and length, and the other policies, in turn on each kind of prompt.

    With ``lookups``, the adaptive policy is also timed with lookups.

    The adaptive policy chooses among the exits of ``base``, or among ``exits`` if it has none.
    """
    fixed = [dataclasses.replace(base, exit_layer=e, draft_length=d) for e in exits for d in LENGTHS]
    # Measure this machine's overhead of speculation with the smallest and the largest exit on one kind.
    extremes = [config for config in fixed if config.exit_layer in (exits[0], exits[-1])]
    overhead = measured_overhead(model.config, measure(model, next(iter(prompts.values())), extremes, repeats)[1:])
    max_drafts = max(LENGTHS)
    adaptive = adaptive_config(base, base.exits or exits, max_drafts, overhead)
    second = exits[1] if len(exits) > 1 else exits[0]
    others = {
        "adaptive": adaptive,
        **({"adaptive_and_lookup": dataclasses.replace(adaptive, lookup_length=max_drafts)} if lookups else {}),
        "confidence": dataclasses.replace(base, policy="confidence", exit_layer=second, draft_length=max_drafts),
        "prompt_lookup": dataclasses.replace(base, mode="prompt_lookup", draft_length=max_drafts),
    }  # fmt: skip
    names = [f"E={c.exit_layer} d={c.draft_length}" for c in fixed] + list(others)
    configs = [*fixed, *others.values()]
    measured = {kind: measure(model, texts, configs, repeats) for kind, texts in prompts.items()}
    return Comparison(names, len(fixed), overhead, measured)


def candidates(config: Config) -> list[int]:
    """Return the candidate exits: L/8, 3L/16, L/4, 3L/8."""
    return sorted({max(1, config.model.num_layers * sixteenths // 16) for sixteenths in (2, 3, 4, 6)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of each kind")
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--exits", type=int, nargs="+", help="candidates (default: L/8, 3L/16, L/4, 3L/8)")
    add_json_option(parser)
    parser.add_argument("--no_curve", action="store_true", help="skip early exit by confidence")
    options = parser.parse_args()
    model, config, tokenizer_path = load_model(options.run, unstacked=True)
    if config.data.source != "python_stdlib":
        raise UserError(
            f"{options.run} was trained on {config.data.source}: this benchmark needs a model of Python code"
        )
    tokenizer = load_tokenizer(str(tokenizer_path))
    base = dataclasses.replace(greedy_drafts(config.decode_settings), max_new_tokens=options.new_tokens)
    kinds = prompts_of_kinds(config, options.prompts)
    tokens = {kind: [tokenizer.encode_prompt(text) for text in texts] for kind, texts in kinds.items()}
    about = header()
    print(f"{options.prompts} prompts of each kind, {options.new_tokens} tokens each")
    comparison = compare(model, tokens, base, options.exits or candidates(config), options.repeats, lookups=True)
    rows = [{"overhead": comparison.overhead}, *comparison.summary()]
    if not options.no_curve:
        curve = exit_curve(model, tokens["code"], base, options.repeats)
        rows += [{"exit_by_confidence": point} for point in curve]
    for row in rows:
        print(json.dumps(row))
    write_json(options.json, about, rows)


if __name__ == "__main__":
    run_command(main)
