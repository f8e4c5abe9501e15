"""``layerskip search`` finds a recipe for a config by successive halving on a small proxy of it.

A trial trains the proxy with one recipe. After a ninth and after a third of the steps, it continues only if its score
is in the best third so far (`optuna.pruners.SuccessiveHalvingPruner`). The study is one SQLite file; a search that was
stopped resumes.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import sys
import time
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING

import jax
import numpy as np
from etils import epath

from layerskip_jax.command_line import (
    add_json,
    errors_in,
    make_parser,
    not_negative,
    number,
    parse_config,
    positive,
    run_file,
)
from layerskip_jax.commands.search_report import Result, format_recipe, write_result
from layerskip_jax.config import Config, MeshConfig
from layerskip_jax.config_dict import apply_overrides, saved_settings
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.decoding.configure import default_exit
from layerskip_jax.decoding.cost import best_speedup
from layerskip_jax.distributed import StopRequest
from layerskip_jax.errors import Interrupted, UserError
from layerskip_jax.evaluation.exits import ExitQuality, HostBatches, exit_quality
from layerskip_jax.locations import folder_lock
from layerskip_jax.model import Transformer
from layerskip_jax.presets import without_layerskip
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.sharding import make_mesh
from layerskip_jax.training.bad_steps import Diverged
from layerskip_jax.training.loop import OnEvaluation, train
from layerskip_jax.training.search_space import RECOMMENDED, Overrides, RecipeQuality, SearchSpace, default_space
from layerskip_jax.training.step import Trainer

if TYPE_CHECKING:
    import optuna

RUNGS = 9
"""Evaluations of a whole trial. The pruner can stop a trial after the first and after the third of them."""

MOST_INVALID = 20
"""Stop after this many refused recipes in a row: the search space then seems to have no valid point."""


def proxy_config(config: Config, width: int, steps: int) -> Config:
    """Return ``config`` with all its blocks at ``width``, trained for ``steps`` on sequences of at most 256 tokens.

    ``steps`` are rounded up to a multiple of `RUNGS`. Prompts with responses keep their sequence length.

    The number of blocks stays, because the exits refer to it. A narrower proxy starts from random weights, with the
    vocabulary of the tokenizer, even if the config starts from a checkpoint. A width of 0 keeps the model, its initial
    weights and the sequences.
    """
    evaluate_every = -(-steps // RUNGS)
    steps = evaluate_every * RUNGS
    decay = config.optimizer.decay_fraction if config.optimizer.schedule == "wsd" else 0.0
    settings: Overrides = {
        "train.steps": steps,
        "train.evaluate_every": evaluate_every,
        "train.checkpoint_every": evaluate_every,
        "train.sample_every": 0,
        "train.keep_every": 0,
        "train.profile_step": 0,
        "train.wandb_project": "",
        "optimizer.warmup_steps": min(config.optimizer.warmup_steps, steps // 10, int(steps * (1 - decay))),
    }
    if width:
        heads, devices = max(1, width // 64), jax.device_count()
        length = config.data.sequence_length if config.data.prompt_key else min(config.data.sequence_length, 256)
        settings |= {
            "model.dim": width,
            "model.num_heads": heads,
            "model.num_kv_heads": heads,
            "model.head_width": 0,
            "model.ffn_dim": 8 * -(-width * config.model.ffn_dim // (8 * config.model.dim)),
            "data.sequence_length": length,
            "train.batch_size": devices * -(-min(config.train.batch_size, 8) // devices),
            "train.accumulate": 1,
            "layer_dropout.row_groups": 1,  # a device may have a single row
            "train.loss_chunk": max(chunk for chunk in range(1, 65) if length % chunk == 0),
            "train.remat": "none",
        }
        if config.train.init_from:
            vocabulary = load_tokenizer(config.data.tokenizer).vocab_size
            settings |= {"train.init_from": "", "model.vocab_size": vocabulary}
        config = dataclasses.replace(config, mesh=MeshConfig())
    return apply_overrides(config, settings)


def check(config: Config) -> None:
    """Raise `UserError` for a recipe that no run can train. Later errors, such as a full disk, end the search."""
    config.early_exit.check_trained()
    recipe = Recipe.from_config(config)
    recipe.check()
    Trainer(config, recipe, make_mesh(config)).abstract_state()


class Search:
    """One study: the proxy, the plain model's losses, and the folder with the database and the runs of the trials."""

    def __init__(self, config: Config, options: argparse.Namespace, space: SearchSpace, stack: contextlib.ExitStack):
        """Open or create the study in ``options.folder``, which is locked until ``stack`` closes."""
        self.config, self.options, self.space = config, options, space
        self.folder = Path(options.folder)
        self._storage = f"sqlite:///{self.folder}/study.db"
        if "://" in options.folder or (self.folder.exists() and not self.folder.is_dir()):
            raise UserError(f"FOLDER must be a local folder, for the database of the study, not {options.folder}")
        self.proxy = proxy_config(config, options.width, options.steps)
        layers = config.model.num_layers
        self.exits = sorted(set(options.draft_exits or [default_exit(layers)]))
        if not 1 <= self.exits[0] <= self.exits[-1] < layers:
            raise UserError(f"--draft_exits must be in 1..{layers - 1}, not {' '.join(map(str, self.exits))}")
        load_tokenizer(config.data.tokenizer)  # before a folder is made
        self.study = self._open_study(stack)
        self.plain_loss: dict[int, float] = {}  # by step

    def _open_study(self, stack: contextlib.ExitStack) -> "optuna.Study":
        """Lock the folder, and open or create the database; raise `UserError` if it belongs to another config."""
        try:
            import optuna
        except ImportError as error:
            raise UserError("layerskip search needs optuna: pip install 'layerskip-jax[search]'") from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not stack.enter_context(folder_lock(epath.Path(self.folder), wait=False)):
            raise UserError(f"another layerskip search runs in {self.folder}: wait, or choose another FOLDER")
        study = self._create_study()
        if not study.user_attrs and (self.folder / "trials").exists():
            raise UserError(
                f"{self.folder}/trials belongs to a study that is gone: remove it, or choose another FOLDER"
            )
        # Through JSON, since the database returns lists for tuples.
        mine = json.loads(json.dumps({"proxy": saved_settings(self.proxy), "exits": self.exits}))
        mine["proxy"]["train"].pop("run_dir")
        if self.options.space:
            mine["space"] = hashlib.sha256(Path(self.options.space).read_bytes()).hexdigest()
        stored, trained = study.user_attrs.get("config", mine), {trial.state.name for trial in study.trials}
        if "space" in stored and "space" in mine and not trained & {"COMPLETE", "PRUNED"}:
            stored = {**stored, "space": mine["space"]}  # until a trial ends, the user may correct the file
        if stored != mine:
            raise UserError(f"{self.folder}/study.db belongs to another config or other options; choose another FOLDER")
        if study.user_attrs.get("config", mine) != mine:  # a corrected space: its trials have other settings
            study = self._start_over(study)
        study.set_user_attr("config", mine)
        # With the seed of the first start, a resumed search would draw its first recipes again.
        seed = (self.config.train.seed + len(study.trials)) % 2**32
        study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=8)
        for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # resume interrupted trials first
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params, user_attrs=trial.user_attrs)
        if not study.trials and self.space is default_space:
            study.enqueue_trial(RECOMMENDED | {"exit": self.exits[0]})
        return study

    def _create_study(self) -> "optuna.Study":
        import optuna

        try:
            return optuna.create_study(
                storage=self._storage,
                study_name="layerskip",
                direction="maximize",
                pruner=optuna.pruners.SuccessiveHalvingPruner(
                    min_resource=self.proxy.train.evaluate_every, reduction_factor=3
                ),
                load_if_exists=True,
            )
        except Exception as error:  # sqlalchemy has many kinds, and only optuna knows them
            raise UserError(f"{self.folder}/study.db cannot be opened as a study: {error}") from error

    def _start_over(self, study: "optuna.Study") -> "optuna.Study":
        """Return an empty study that keeps the losses of the plain model; removes the folders of the trials."""
        import optuna

        kept = study.user_attrs
        for trial in study.trials:
            folder = str(trial.user_attrs.get("folder", trial.number))
            shutil.rmtree(self.folder / "trials" / folder, ignore_errors=True)
        optuna.delete_study(study_name=study.study_name, storage=self._storage)
        study = self._create_study()
        for name, value in kept.items():
            study.set_user_attr(name, value)
        return study

    def train_plain(self) -> None:
        """Train the proxy without layer dropout and early exits, or read its stored losses."""
        stored = self.study.user_attrs.get("plain_loss", {})
        self.plain_loss = {int(step): loss for step, loss in stored.items()}
        if self.proxy.train.steps in self.plain_loss:
            return

        def record(step: int, model: Transformer, batches: HostBatches, loss_L: np.ndarray) -> None:
            self.plain_loss[step] = float(loss_L[-1])
            self.study.set_user_attr("plain_loss", self.plain_loss)

        self.train(without_layerskip(self.run_config({}, "plain")), record)
        self.report(f"plain: loss {self.plain_loss[self.proxy.train.steps]:.3f}")

    def report(self, line: str) -> None:
        """Print progress; with ``--json``, stdout is for the result."""
        print(line, file=sys.stderr if self.options.json else sys.stdout, flush=True)

    def run_config(self, overrides: Overrides, folder: str) -> Config:
        return apply_overrides(self.proxy, overrides | {"train.run_dir": str(self.folder / "trials" / folder)})

    def train(self, config: Config, on_evaluation: OnEvaluation) -> None:
        """Train a run whose messages go to ``log.txt`` in its folder."""
        run = Path(config.train.run_dir)
        run.mkdir(parents=True, exist_ok=True)
        with (run / "log.txt").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            train(config, on_evaluation=on_evaluation)

    def run_trial(self) -> bool:
        """Train one recipe of the space until it ends or is pruned; return whether its config was valid."""
        import optuna

        trial = self.study.ask()
        folder = str(trial.user_attrs.get("folder", trial.number))
        trial.set_user_attr("folder", folder)
        try:
            overrides = self.overrides(trial)
        except BaseException:  # an error in the user's file ends the search
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            raise
        try:
            config = self.run_config(overrides, folder)
            check(config)
        except UserError as error:
            trial.set_user_attr("error", str(error))
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            return False
        trial.set_user_attr("overrides", overrides)

        def judge(step: int, model: Transformer, batches: HostBatches, loss_L: np.ndarray) -> None:
            # Use the loss that training measured, as for the plain model.
            quality = dataclasses.replace(exit_quality(model, config, batches), loss_L=loss_L)
            measured = self.recipe_quality(config, step, quality)
            trial.report(measured.score(self.options.loss_tolerance), step)
            trial.set_user_attr("found", measured)
            if step < config.train.steps and trial.should_prune():
                raise optuna.TrialPruned

        ends = ""
        try:
            self.train(config, judge)
        except (optuna.TrialPruned, Diverged) as error:
            ends = "diverged, " if isinstance(error, Diverged) else "pruned, "
            shutil.rmtree(config.train.run_dir)
        # Read the stored value. If the trial was stopped after its last evaluation, the resumed run evaluates nothing,
        # so `judge` is not called.
        measured = RecipeQuality(*trial.user_attrs.get("found", RecipeQuality(math.inf, 0, 0)))
        if ends:
            self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            self.study.tell(trial, measured.score(self.options.loss_tolerance))
        self.report(f"trial {trial.number}: {ends}{format_recipe(measured, overrides)}")
        return True

    def overrides(self, trial: "optuna.Trial") -> Overrides:
        """Return the recipe that the space chooses; raises `UserError` for an error in the user's file."""
        if not self.options.space:
            return self.space(trial, self.proxy, self.exits)
        with errors_in(self.options.space, "search space"):
            overrides = self.space(trial, self.proxy, self.exits)
        if not isinstance(overrides, dict):
            raise UserError(f"the function of {self.options.space} returned a {type(overrides).__name__}, not a dict")
        return overrides

    def recipe_quality(self, config: Config, step: int, quality: ExitQuality) -> RecipeQuality:
        """Return the quality of the last exit and of the drafting exit."""
        exit_layer = config.trained_draft_exit or self.exits[0]
        agreement = float(quality.agreement_L[exit_layer - 1])
        increase = float(quality.loss_L[-1]) / self.plain_loss[step] - 1
        return RecipeQuality(increase, agreement, best_speedup(self.config.model, exit_layer, agreement))

    def results(self) -> list[Result]:
        """Return the recipes that trained to the end, the best score first."""
        import optuna

        trials = self.study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
        rows = [
            (RecipeQuality(*trial.user_attrs["found"]), trial.user_attrs["overrides"], trial.number) for trial in trials
        ]
        finite = [row for row in rows if math.isfinite(row[0].loss_increase)]
        return sorted(finite, key=lambda row: -row[0].score(self.options.loss_tolerance))


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(
        "Search for a recipe: exits, their weights, distillation, agreement, layer dropout and learning rate. Trains "
        "many small proxies of the config with successive halving, and writes the best recipe as a config file.",
        "search",
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder of the study; a study in it resumes")
    parser.add_argument("--trials", metavar="N", type=positive, default=30, help="recipes to try (default: 30)")
    parser.add_argument("--minutes", metavar="M", type=positive, help="start no trial after this time")
    parser.add_argument(
        "--steps", metavar="N", type=positive, default=450, help="steps of a whole trial (default: 450)"
    )
    parser.add_argument(
        "--width",
        metavar="D",
        type=not_negative,
        default=64,
        help="width of the proxy (default: 64); 0 keeps the config's",
    )
    parser.add_argument(
        "--draft_exits", metavar="E", type=positive, nargs="+", help="exits that may draft (default: L/4)"
    )
    parser.add_argument(
        "--loss_tolerance",
        metavar="X",
        type=number,
        default=0.005,
        help="accepted increase of the last exit's loss over the plain model's (default: 0.005)",
    )
    parser.add_argument(
        "--space", metavar="FILE", help="Python file with get_space() -> function, see docs/training.md"
    )
    add_json(parser, "one per recipe, the best first")
    config, options = parse_config(parser, argv)
    multiple = 2 * max(1, options.width // 64)  # heads of 64, with an even width for rotary positions
    if options.width % multiple:
        raise UserError(f"--width must be a multiple of {multiple}, or 0 for the config's own, not {options.width}")
    space = run_file(options.space, "get_space", FunctionType, "search space") if options.space else default_space
    with contextlib.ExitStack() as stack:
        search = Search(config, options, space, stack)
        run(search)
        write_result(search.results(), search.proxy, options)


def run(search: Search) -> None:
    """Train the plain model and then recipes, until ``--trials`` or ``--minutes`` end the search."""
    options, began, invalid = search.options, time.monotonic(), 0
    with StopRequest(make_mesh(search.proxy)) as stop:
        search.train_plain()
        while sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in search.study.trials) < options.trials:
            if stopped := stop.agreed():
                raise Interrupted(stopped, "the search stopped between two trials; restart to resume")
            if options.minutes and time.monotonic() - began > 60 * options.minutes:
                break
            invalid = 0 if search.run_trial() else invalid + 1
            if invalid == MOST_INVALID:
                error = search.study.trials[-1].user_attrs["error"]
                raise UserError(
                    f"the search space has no valid point: {invalid} recipes in a row were refused: {error}"
                )
