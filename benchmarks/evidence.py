"""Test LayerSkip's claims at small scale: ``python -m benchmarks.evidence [--prose FOLDER] [--group.setting V ...]``.

Trains the variants of ``--config`` (the paper's four and three more) on the same tokens in the same order, measures
their exits, steps and decoding side by side, and writes the tables and plots of docs/results/evidence.md. A second call
resumes: it neither trains nor measures again what is stored.

    <train.run_dir>/<study>/<variant>-<seed>      the runs
    <train.run_dir>/<study>/measured              their measurements

The study is code, prose (``--prose``) or widths (``--widths``: each variant at each width of the model, as tuned@128).
docs/results/<study>.json holds all numbers of the page. ``--published`` starts from such a file, to add a variant
without training the others.
"""

import argparse
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from benchmarks import common
from benchmarks.adaptive import candidates, compare, greedy_drafts, prompts_of_kinds
from benchmarks.decoding import WithoutQueries, one_pass_more, ratio, speed
from benchmarks.evidence_page import fastest_fixed, write_page
from benchmarks.step_cost import time_steps
from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.checkpoint.run_folder import find_checkpoint, json_sha256, read_checksums
from layerskip_jax.checks import require
from layerskip_jax.command_line import make_parser, parse_config, positive
from layerskip_jax.commands.plots import read_metrics
from layerskip_jax.commands.prompts import read_prompts
from layerskip_jax.commands.sweep import measure
from layerskip_jax.config import Config, DecodeConfig
from layerskip_jax.config_dict import apply_overrides
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.sentencepiece_tokenizer import train_tokenizer
from layerskip_jax.data.sources import open_documents
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.decoding.engine import generate
from layerskip_jax.decoding.policies import Fixed
from layerskip_jax.decoding.rounds import Autoregressive, SelfSpeculative
from layerskip_jax.decoding.sampling import Greedy
from layerskip_jax.errors import run_command
from layerskip_jax.evaluation.exits import checkpoint_quality
from layerskip_jax.model import Transformer
from layerskip_jax.training.loop import train

NO_EXITS = {"early_exit.curriculum": "none"}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": NO_EXITS | {"layer_dropout.p_max": 0.0},
    "dropout": NO_EXITS,
    "exits": {"layer_dropout.p_max": 0.0},
    "layerskip": {},  # both: the paper's recipe
    "tuned": {"early_exit.always_last": False, "early_exit.e_scale": 1.0},  # one exit per step, with the whole weight
    "all_exits": {"early_exit.curriculum": "all"},
    "decaying": {
        "layer_dropout.p_max": 0.6,
        "layer_dropout.layer_scale": "linear",
        "layer_dropout.time_scale": "decaying",
        "layer_dropout.rescale": True,
    },
}
Measured = dict[str, Any]


def study_config(config: Config, prose: str | None, widths: list[int]) -> Config:
    """Return the config of a study, with its corpus and its folder of runs."""
    folder = f"{config.train.run_dir}/{'widths' if widths else 'prose' if prose else 'code'}"
    changes: dict[str, Any] = {"data.tokenizer": f"{folder}/tokenizer.model", "train.run_dir": folder}
    return apply_overrides(config, changes | ({"data.source": "text", "data.path": prose} if prose else {}))


def width_settings(dim: int) -> dict[str, Any]:
    heads = max(2, dim // 64)
    return {"model.dim": dim, "model.num_heads": heads, "model.num_kv_heads": heads, "model.ffn_dim": 11 * dim // 4}


def variant_config(config: Config, name: str, seed: int) -> Config:
    """Return the config of a variant such as ``tuned``, or of a variant at a width such as ``tuned@128``."""
    folder = f"{config.train.run_dir}/{name}-{seed}"
    recipe, _, width = name.partition("@")
    changes = VARIANTS[recipe] | (width_settings(int(width)) if width else {})
    return apply_overrides(config, changes | {"train.seed": seed, "train.run_dir": folder})


def is_trained(config: Config) -> bool:
    folder = Path(config.train.run_dir) / "checkpoints" / str(config.train.steps)
    return folder.is_dir()


def held_out_losses(run: str, layers: int) -> dict[str, list[float]]:
    """Return ``{step: held-out loss of every exit}`` of the evaluations during training."""
    metrics = read_metrics(run)
    exits = [metrics[f"validation/exit_loss/{exit_layer}"] for exit_layer in range(1, layers + 1)]
    return {str(step): [points[step] for points in exits] for step in exits[0]}


def quality(run: str, config: Config) -> Measured:
    training_seconds = read_metrics(run)["run/seconds/training"]
    return checkpoint_quality(run, batches=64).as_dict() | {
        "held_out_loss": held_out_losses(run, config.model.num_layers),
        "tokens": config.train.steps * config.train.batch_size * config.data.sequence_length,
        "seconds": training_seconds[max(training_seconds)],
        "arrays": json_sha256(read_checksums(find_checkpoint(run))["arrays"]),
    }


def decoder(run: str) -> tuple[Transformer, Tokenizer, DecodeConfig]:
    model, config, tokenizer = load_model(run, unstacked=True)
    return model, load_tokenizer(str(tokenizer)), greedy_drafts(config.decode_settings)


def decoding(run: str, config: Config, repeats: int) -> Measured:
    """Time all pairs of exit and draft length, and the policies, on every kind of prompt of the corpus."""
    model, tokenizer, base = decoder(run)
    code = config.data.source == "python_stdlib"
    kinds = prompts_of_kinds(config, 4) if code else {"prose": read_prompts(None, None, 8, config)}
    prompts = {kind: [tokenizer.encode_prompt(text) for text in texts] for kind, texts in kinds.items()}
    comparison = compare(model, prompts, base, candidates(config), repeats)
    names = ["plain", *comparison.names]
    is_fixed = [0 < place <= comparison.fixed for place in range(len(names))]
    rows = {
        kind: [
            dataclasses.asdict(m) | {"name": name, "predicted": m.predicted_speedup if fixed else None}
            for name, m, fixed in zip(names, measured, is_fixed, strict=True)
        ]
        for kind, measured in comparison.measured.items()
    }
    return {"ways": rows, "summary": list(comparison.summary()), "overhead": comparison.overhead}


def best_fixed(measured: Measured, kind: str) -> tuple[int, int]:
    best = fastest_fixed(measured["ways"][kind])["settings"]
    return best["exit_layer"], best["draft_length"]


def reuse_and_temperature(run: str, config: Config, exit_layer: int, length: int, repeats: int) -> Measured:
    """Time one setting with and without reusing the exit queries, and at several temperatures."""
    model, tokenizer, base = decoder(run)
    prompts = [tokenizer.encode_prompt(text) for text in read_prompts(None, None, 8, config)]
    strategies = {
        "plain": Autoregressive(Greedy()),
        "with": SelfSpeculative(Greedy(), Fixed(exit_layer, length)),
        "without": WithoutQueries(Greedy(), Fixed(exit_layer, length)),
    }
    runs = common.called_in_turn(
        {name: partial(generate, model, prompts[:1], base.max_new_tokens, s) for name, s in strategies.items()},
        repeats,
    )
    reused = ratio(runs["with"], runs["without"]) / one_pass_more(config.model, exit_layer, length)
    reuse = {"tokens_per_second": speed(runs["with"]), "with/without": reused}
    rows = []
    for temperature in (0.0, 0.3, 0.6, 1.0):
        way = dataclasses.replace(base, exit_layer=exit_layer, draft_length=length, temperature=temperature)
        _, m = measure(model, prompts[:4], [way], repeats)
        rows.append({"temperature": temperature, "acceptance": m.acceptance, "speedup": m.speedup})
    return {"exit_layer": exit_layer, "draft_length": length, "reuse": reuse, "temperature": rows}


def step_times(config: Config) -> Measured:
    """Time the steps of all variants in turn, at the middle of training."""
    configs = {name: variant_config(config, name, 0) for name in VARIANTS}
    configs["decaying_skipping"] = apply_overrides(configs["decaying"], {"layer_dropout.form": "skipping"})
    timings, _ = time_steps(configs, turns=2 * (config.model.num_layers - 1), first=config.train.steps // 2)
    tokens = config.train.batch_size * config.data.sequence_length
    return {
        name: {"of_plain": timings.ratio(name, "plain"), "tokens_per_second": tokens / timings.median(name)}
        for name in configs
    }


class Results:
    """A folder with one JSON file per part. A part is measured once, and stored before the next one starts."""

    def __init__(self, folder: Path):
        self.folder = folder

    def add_published(self, published: Path) -> None:
        """Store the parts of a page's JSON that this folder lacks."""
        for name, part in json.loads(published.read_text()).items():
            if not self.has(name):
                self._keep(name, part)

    def has(self, name: str) -> bool:
        return (self.folder / f"{name}.json").exists()

    def _keep(self, name: str, part: dict[str, Any]) -> None:
        common.replace_text(self.folder / f"{name}.json", json.dumps(part, indent=1))

    def once(self, name: str, measure_it: Callable[[], Measured]) -> Measured:
        """Return a part; measure and store it if this folder lacks it."""
        if not self.has(name):
            print(f"measuring {name}", flush=True)
            began = time.time()
            measured = measure_it()
            machine = f"{common.machine()}, Python {platform.python_version()}, jax {jax.__version__}"
            about = {"commit": common.short_commit(), "machine": machine, "seconds": time.time() - began}
            self._keep(name, {"measured": measured, "about": about})
        return json.loads((self.folder / f"{name}.json").read_text())["measured"]

    def parts(self) -> dict[str, Any]:
        files = sorted(self.folder.rglob("*.json"), key=lambda file: file.stat().st_mtime)
        return {str(file.relative_to(self.folder).with_suffix("")): json.loads(file.read_text()) for file in files}


def quality_part(run: Config) -> str:
    return f"quality/{Path(run.train.run_dir).name}"


def train_all(
    config: Config, results: Results, variants: list[str], seeds: list[int], again: str | None
) -> list[Config]:
    """Train the runs that are neither trained nor measured; return the configs of all runs."""
    if not Path(config.data.tokenizer).exists():
        documents = open_documents(config.data, config.data.train_split)
        train_tokenizer(documents, config.data.tokenizer, config.model.vocab_size)
    runs = [variant_config(config, name, seed) for seed in seeds for name in variants]
    if again:
        first = variant_config(config, again, seeds[0])
        runs.append(apply_overrides(first, {"train.run_dir": f"{first.train.run_dir}-again"}))
    for run in runs:
        if not is_trained(run) and not results.has(quality_part(run)):
            print(f"training {run.train.run_dir}", flush=True)
            train(run)
    return runs


def measure_all(
    config: Config, results: Results, runs: list[Config], decoded: list[str], seed: int, repeats: int
) -> dict[str, Any]:
    """Measure the missing parts, and the decoding of the variants ``decoded``; return all parts by name."""
    for run in runs:
        results.once(quality_part(run), partial(quality, run.train.run_dir, run))
    for name in decoded:
        run = variant_config(config, name, seed)
        ways = results.once(f"decoding/{name}", partial(decoding, run.train.run_dir, run, repeats))
        setting = best_fixed(ways, next(iter(ways["ways"])))
        results.once(f"more/{name}", partial(reuse_and_temperature, run.train.run_dir, run, *setting, repeats))
    if not any("@" in Path(run.train.run_dir).name for run in runs):  # steps of different widths are not comparable
        results.once("steps", partial(step_times, config))
    return results.parts()


def parse(argv: list[str]) -> tuple[Config, argparse.Namespace]:
    """Return the config and the options of a command line. Raises `UserError` if it is invalid."""
    parser = make_parser(__doc__ or "")
    study = parser.add_mutually_exclusive_group()
    study.add_argument("--prose", metavar="FOLDER", help="train on these text files instead of Python code")
    study.add_argument(
        "--widths", type=int, nargs="+", default=[], metavar="DIM", help="train each variant at these widths"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="variants to train (default: all)"
    )
    parser.add_argument(
        "--decoded", nargs="+", choices=VARIANTS, help="variants whose decoding is timed (default: all)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of each variant (default: 0)")
    parser.add_argument(
        "--repeats", type=positive, default=3, help="timed repeats of each decoding strategy (default: 3)"
    )
    parser.add_argument("--again", choices=VARIANTS, help="train this variant twice, to compare the runs bit for bit")
    parser.add_argument(
        "--no_measuring", action="store_true", help="only train, for example several variants in parallel"
    )
    parser.add_argument(
        "--published",
        type=Path,
        metavar="FILE",
        help="JSON of a page: do not train or measure again what it contains",
    )
    page = Path("docs/results/evidence.md")
    parser.add_argument("--page", type=Path, default=page, help=f"the page whose tables are updated (default: {page})")
    config, options = parse_config(parser, ["--config", "configs/evidence.py", *argv])
    untrained = [name for name in options.decoded or () if name not in options.variants]
    require(not untrained, f"--decoded must be among --variants, and {', '.join(untrained)} is not")
    return config, options


def main() -> None:
    config, options = parse(sys.argv[1:])
    common.header()
    study = study_config(config, options.prose, options.widths)
    variants = [f"{name}@{dim}" for dim in options.widths for name in options.variants] or options.variants
    results = Results(Path(study.train.run_dir) / "measured")
    if options.published:
        results.add_published(options.published)
    runs = train_all(study, results, variants, options.seeds, options.again)
    if options.no_measuring:
        return
    decoded = [name for name in variants if name.partition("@")[0] in (options.decoded or VARIANTS)]
    parts = measure_all(study, results, runs, decoded, options.seeds[0], options.repeats)
    for path in write_page(options.page, Path(study.train.run_dir).name, study, parts):
        print(path)


if __name__ == "__main__":
    run_command(main)
