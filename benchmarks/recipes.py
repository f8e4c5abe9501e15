"""Measure recipes for the leaderboard: ``python -m benchmarks.recipes NAME [--config FILE] [--group.setting VALUE]``.

Trains the recipe once for each seed, measures its exits and what speculation gains from it, and adds the rows to
docs/results/recipes.json and docs/results/recipes.md. NAME is your name for the recipe; ``plain`` trains without layer
dropout and early exits, and the other rows of the same model, corpus and tokens are compared with it. Run it first.

    python -m benchmarks.recipes plain
    python -m benchmarks.recipes fixed --early_exit.curriculum fixed --early_exit.exits 3 --early_exit.exit_weights 0.5

A run that was stopped resumes. A seed is skipped if the page's .json file has a row of the same NAME, seed, corpus,
model size and number of tokens, even if other settings have changed; ``--again`` measures it again. A run that was
trained with other settings is neither resumed nor measured.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.step_cost import time_steps
from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.checkpoint.run_folder import checkpoint_folder, checkpoint_steps, find_checkpoint, read_config
from layerskip_jax.command_line import make_parser, parse_config
from layerskip_jax.commands.prompts import read_prompts
from layerskip_jax.commands.sweep import Measurement, measure
from layerskip_jax.config import Config, DecodeConfig
from layerskip_jax.config_dict import apply_overrides, changed_settings, saved_settings
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.sentencepiece_tokenizer import train_tokenizer
from layerskip_jax.data.sources import open_documents
from layerskip_jax.decoding.configure import configure, resolve_exit_layer
from layerskip_jax.decoding.engine import generate
from layerskip_jax.errors import UserError, run_command
from layerskip_jax.evaluation.exits import checkpoint_quality
from layerskip_jax.locations import locate
from layerskip_jax.presets import without_layerskip
from layerskip_jax.training.loop import train

SAMPLED = {"temperature": 0.8, "top_p": 0.95}
HELD_OUT_BATCHES, PROMPTS, NEW_TOKENS = 64, 8, 256
DRAFT_LENGTHS = (2, 4, 8)
ACCEPTANCE_LENGTH = 4
"""The draft length, one of `DRAFT_LENGTHS`, at which the acceptance is reported."""

TRAINED = {"model", "data", "optimizer", "layer_dropout", "early_exit"}
TRAINED |= {"train.batch_size", "train.init_from", "train.skip_spikes", "train.steps"}
"""Settings, and groups of them, that must be the same when a run resumes or is measured again."""
NOT_TRAINED = {"data.workers", "data.data_dir", "data.tokenizer"}
"""Settings in these groups that may differ. Training itself compares the tokenizer."""

ROWS_BELOW = "<!-- python -m benchmarks.recipes writes below this line -->"

Row = dict[str, Any]


def study_of(config: Config) -> str:
    """Return the name of what the rows of a table share: corpus, layers x width, and trained tokens."""
    tokens = config.train.steps * config.train.batch_size * config.data.sequence_length
    data = config.data
    source = "+".join(data.mixture) or Path(data.path).name or data.name or data.source
    return f"{source.replace('/', '_')} {config.model.num_layers}x{config.model.dim} {tokens / 1e6:.3g}M"


def run_config(config: Config, name: str, seed: int) -> Config:
    """Return the config of one run, in a folder of its own below ``train.run_dir``."""
    folder = f"{config.train.run_dir}/{study_of(config).replace(' ', '-')}"
    settings = {
        "train.seed": seed,
        "train.run_dir": f"{folder}/{name}-{seed}",
        "data.tokenizer": f"{folder}/tokenizer.model",
    }
    config = apply_overrides(config, settings)
    return without_layerskip(config) if name == "plain" else config


def check_corpus(config: Config) -> Path:
    """Return the file that holds the path of a study's corpus.

    Raises `UserError` if that is another path than ``config``'s: the name of a study has only the last part of a path.
    """
    file, mine = Path(config.data.tokenizer).with_name("corpus.txt"), str(locate(config.data.path))
    if file.exists() and (stored := file.read_text()) != mine:
        raise UserError(f"{file.parent} was made for {stored}, not for {mine}: rename one of the two")
    return file


def make_tokenizer(config: Config) -> None:
    """Train the tokenizer of a study on its corpus, unless it exists."""
    corpus = check_corpus(config)
    if not Path(config.data.tokenizer).exists():
        documents = open_documents(config.data, config.data.train_split)
        train_tokenizer(documents, config.data.tokenizer, config.model.vocab_size)
    common.replace_text(corpus, str(locate(config.data.path)))  # last: the corpus can be read


def repeated_share(tokens: Sequence[int], length: int = 8) -> float:
    """Return the share of the tokens that repeat, as in a loop: they are in an n-gram that occurred before.

    >>> repeated_share([1, 2, 3, 1, 2, 3, 1], length=3)
    0.5714285714285714
    """
    seen: set[tuple[int, ...]] = set()
    repeated = [False] * len(tokens)
    for start in range(len(tokens) - length + 1):
        gram = tuple(tokens[start : start + length])
        if gram in seen:
            repeated[start : start + length] = [True] * length
        seen.add(gram)
    return sum(repeated) / len(tokens) if tokens else 0.0


def generation(run: str, sampled: bool) -> Row:
    """Measure speculation on held-out prompts: at the draft exit, and the fastest pair of exit and draft length."""
    model, config, tokenizer_path = load_model(run, unstacked=True)
    tokenizer, layers = load_tokenizer(str(tokenizer_path)), config.model.num_layers
    texts = read_prompts(None, None, PROMPTS, config)
    prompts = [tokenizer.encode_prompt(text) for text in texts]
    draft_exit = resolve_exit_layer(config.decode_settings, layers)
    base = DecodeConfig(ignore_eos=True, max_new_tokens=NEW_TOKENS)
    base = dataclasses.replace(base, **(SAMPLED if sampled else {}))
    exits = sorted({max(1, layers // 8), max(1, layers // 4), draft_exit})
    pairs = [dataclasses.replace(base, exit_layer=e, draft_length=d) for e in exits for d in DRAFT_LENGTHS]
    measured = measure(model, prompts, pairs, repeats=1)[1:]
    drafted = next(m for m in measured if pair_of(m) == [draft_exit, ACCEPTANCE_LENGTH])
    by_bytes = max(measured, key=lambda m: m.predicted_speedup)
    best = max(measured, key=lambda m: m.speedup)
    # Time the fastest pair again: the largest of several noisy speedups is too large.
    fastest = measure(model, prompts, [dataclasses.replace(base, **best.settings)], repeats=3)[1]
    plain_model, plain = configure(dataclasses.replace(base, mode="autoregressive"), model)
    new = [generate(plain_model, [p], NEW_TOKENS, plain, seed=base.seed).tokens[0] for p in prompts]
    return {
        "acceptance": drafted.acceptance,
        "loops": statistics.mean(repeated_share(tokens) for tokens in new),
        "by_bytes": by_bytes.predicted_speedup,
        "by_bytes_settings": pair_of(by_bytes),
        "speedup": fastest.speedup,
        "speedup_settings": pair_of(fastest),
        "identical": None if sampled else all(m.identical for m in measured),
    }


def pair_of(measured: Measurement) -> list[int]:
    return [measured.settings["exit_layer"], measured.settings["draft_length"]]


def step_cost(config: Config) -> Row:
    """Return time and temporary memory of a step, relative to the plain step; medians of pairs in turn."""
    configs = {"plain": without_layerskip(config), "recipe": config}
    timings, memory = time_steps(configs, turns=12, first=config.train.steps // 2)
    return {"step_time": timings.ratio("recipe", "plain"), "step_memory": memory["recipe"] / memory["plain"]}


def check_unchanged(config: Config) -> None:
    """Raise `UserError` if the run of ``config`` has been trained with other settings than ``config``'s."""
    run = config.train.run_dir
    if not checkpoint_steps(checkpoint_folder(config)):
        return
    changed = changed_settings(config, base=read_config(find_checkpoint(run)))
    names = [name for name in changed if {name, name.split(".")[0]} & TRAINED and name not in NOT_TRAINED]
    if names:
        raise UserError(f"{run} was trained with another {names[0]}: remove it, or set another --train.run_dir")


def measured_row(config: Config, name: str) -> Row:
    """Train the run of ``config``, or resume it, and return its row."""
    check_unchanged(config)
    train(config)
    run = config.train.run_dir
    quality = checkpoint_quality(run, batches=HELD_OUT_BATCHES)
    return {
        "study": study_of(config),
        "name": name,
        "seed": config.train.seed,
        "early_exit": saved_settings(config)["early_exit"],
        "layer_dropout": saved_settings(config)["layer_dropout"],
        "exit": resolve_exit_layer(config.decode_settings, config.model.num_layers),
        "loss_by_exit": quality.loss_L.tolist(),
        "agreement_by_exit": quality.agreement_L.tolist(),
        "greedy": generation(run, sampled=False),
        "sampled": generation(run, sampled=True),
        **(step_cost(config) if name != "plain" else {"step_time": 1.0, "step_memory": 1.0}),
        "command": common.command(),
        "commit": common.short_commit(),
        "machine": common.machine(),
    }


def key_of(row: Row) -> tuple[str, str, int]:
    return row["study"], row["name"], row["seed"]


def mean_and_spread(values: Iterable[float], form: str) -> str:
    """Format the mean, with half the distance between the extremes if there are several values."""
    values = list(values)
    spread = f" ± {(max(values) - min(values)) / 2:{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def distinct(values: Iterable[Any]) -> str:
    """Return the different values in their order, as text."""
    return ", ".join(dict.fromkeys(map(str, values)))


def table_line(rows: list[Row], plain: dict[int, Row]) -> list[str]:
    """Return the cells of a recipe: means over its seeds, each compared with the plain model of the same seed."""
    losses = [row["loss_by_exit"][-1] for row in rows]
    pairs = [(row["loss_by_exit"][-1], plain[row["seed"]]["loss_by_exit"][-1]) for row in rows if row["seed"] in plain]
    cost = mean_and_spread([100 * (loss / base - 1) for loss, base in pairs], "+.2f") + " %" if pairs else "-"
    at_exit = [100 * row["agreement_by_exit"][row["exit"] - 1] for row in rows]
    exits = distinct(row["exit"] for row in rows)
    cells = [rows[0]["name"], str(len(rows)), mean_and_spread(losses, ".3f"), cost, exits]
    cells.append(mean_and_spread(at_exit, ".1f") + " %")
    for mode in ("greedy", "sampled"):
        parts = [row[mode] for row in rows]
        accepted = [100 * part["acceptance"] for part in parts if not math.isnan(part["acceptance"])]
        cells.append(mean_and_spread(accepted, ".1f") + " %" if accepted else "-")
        cells.append(f"{100 * statistics.mean(part['loops'] for part in parts):.0f} %")
        settings = distinct("E={} d={}".format(*part["by_bytes_settings"]) for part in parts)
        cells.append(f"{mean_and_spread([part['by_bytes'] for part in parts], '.2f')}x ({settings})")
        cells.append(mean_and_spread([part["speedup"] for part in parts], ".2f") + "x")
    cells.append(f"{statistics.median(row['step_time'] for row in rows):.2f}x")
    cells.append(f"{max(row['step_memory'] for row in rows):.2f}x")
    return [*cells, distinct(row["commit"] for row in rows)]


HEAD = [
    "recipe", "seeds", "last exit: loss", "against plain", "E", "agreement at E",
    "greedy: accepted", "loops", "by bytes", "measured", "sampled: accepted", "loops", "by bytes", "measured",
    "step time", "memory", "commit",
]  # fmt: skip


def page(rows: list[Row]) -> str:
    """Return the tables of all studies, and the commands of their rows."""
    parts = []
    for study in sorted({row["study"] for row in rows}):
        of_study = [row for row in rows if row["study"] == study]
        plain = {row["seed"]: row for row in of_study if row["name"] == "plain"}
        recipes: dict[str, list[Row]] = {}
        for row in of_study:
            recipes.setdefault(row["name"], []).append(row)
        table = common.markdown_table(HEAD, [table_line(same, plain) for same in recipes.values()])
        commands = "\n".join(dict.fromkeys(f"    {row['command']}" for same in recipes.values() for row in same))
        machines = ", ".join(sorted({row["machine"] for row in of_study}))
        parts.append(f"## {study}\n\n{machines}\n\n{table}\n\n{commands}\n")
    return "\n".join(parts)


def write_page(markdown: Path, rows: list[Row]) -> None:
    """Write the rows to the page's .json file, and replace what follows `ROWS_BELOW` in the page."""
    common.replace_text(markdown.with_suffix(".json"), json.dumps(rows, indent=1) + "\n")
    text = markdown.read_text() if markdown.exists() else "# Recipes\n"
    common.replace_text(markdown, f"{text.partition(ROWS_BELOW)[0].rstrip()}\n\n{ROWS_BELOW}\n\n{page(rows)}")


def parse(argv: list[str]) -> tuple[Config, argparse.Namespace]:
    parser = make_parser(__doc__ or "")
    parser.add_argument("name", metavar="NAME", help="name of the recipe in the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds to train (default: 0)")
    parser.add_argument("--again", action="store_true", help="measure seeds again that are in the page")
    default = Path("docs/results/recipes.md")
    parser.add_argument("--page", type=Path, default=default, help=f"the page to update (default: {default})")
    config, options = parse_config(parser, ["--config", "configs/evidence.py", *argv])
    if not options.name.replace("_", "").replace("-", "").isalnum():
        raise UserError(f"NAME becomes a folder: use letters, digits, - and _, not {options.name!r}")
    return config, options


def main() -> None:
    config, options = parse(sys.argv[1:])
    common.header()
    stored = options.page.with_suffix(".json")
    rows = {key_of(row): row for row in (json.loads(stored.read_text()) if stored.exists() else [])}
    for seed in options.seeds:
        run = run_config(config, options.name, seed)
        check_corpus(run)
        key = (study_of(run), options.name, seed)
        if key in rows and not options.again:
            print(f"{' '.join(map(str, key))} is in {options.page}")
            continue
        make_tokenizer(run)
        rows[key] = measured_row(run, options.name)
        write_page(options.page, list(rows.values()))
    print(options.page)


if __name__ == "__main__":
    run_command(main)
