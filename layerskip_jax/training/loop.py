"""The training loop: from a config to a trained, evaluated and saved model. Read it from top to bottom."""

import contextlib
import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from layerskip_jax.checkpoint.reading import initial_model
from layerskip_jax.checkpoint.run_folder import checkpoint_folder, newest_step
from layerskip_jax.checks import require
from layerskip_jax.config import Config, TrainConfig
from layerskip_jax.config_dict import saved_settings
from layerskip_jax.data.corpus import identify_corpus
from layerskip_jax.data.documents import Documents
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.pipeline import OpenSplit, local_batches, to_devices
from layerskip_jax.data.position import DataPosition
from layerskip_jax.data.sources import open_splits
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.decoding.text import TextGenerator, encode
from layerskip_jax.distributed import StopRequest, agree, local_rows
from layerskip_jax.errors import Interrupted
from layerskip_jax.evaluation.exits import HostBatches, component_losses, held_out_batches
from layerskip_jax.model import Transformer
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.sharding import batch_sharding, make_mesh
from layerskip_jax.training.bad_steps import BadSteps
from layerskip_jax.training.checkpoints import Checkpoints, make_run_folder
from layerskip_jax.training.monitoring.flops import peak_flops
from layerskip_jax.training.monitoring.goodput import Goodput, steady_time
from layerskip_jax.training.monitoring.metrics import read_records
from layerskip_jax.training.monitoring.progress import Progress, opening_line
from layerskip_jax.training.monitoring.watch import Profiler
from layerskip_jax.training.step import StepMetrics, Trainer, TrainState

OnEvaluation = Callable[[int, Transformer, HostBatches, np.ndarray], None]
"""Called as ``(step, model, held_out_batches, loss_L)`` after each evaluation; an exception ends the run."""


def train(config: Config, recipe: Recipe | None = None, on_evaluation: OnEvaluation = lambda *_: None) -> TrainState:
    """Train until ``config.train.steps``, from the newest checkpoint in the run folder if any; return the last state.

    ``recipe`` replaces the functions that the config names. Every process of a run calls `train`. Raises `UserError`
    if a corpus, tokenizer, mesh or checkpoint does not fit, or after too many bad steps in a row
    (`layerskip_jax.training.bad_steps`); `Interrupted` after SIGTERM or SIGINT, once the current step is saved.
    """
    began, mesh = steady_time(), make_mesh(config)
    trainer = Trainer(config, recipe or Recipe.from_config(config), mesh)
    with StopRequest(mesh) as stop, contextlib.ExitStack() as stack:
        profiler = stack.enter_context(Profiler(config.train))  # first: SIGUSR1 would end a process without a handler
        data = _open_data(config, trainer.recipe, mesh)
        checkpoints = _open_checkpoints(config, data.tokenizer, stack)
        state, first, start = _restore_or_init(trainer, checkpoints, data)
        goodput = Goodput(read_records(config.train.run_dir), first, since=began)
        progress = stack.enter_context(Progress(config, trainer.recipe, first, goodput, peak_flops()))
        bad_steps = BadSteps(config, checkpoints.latest)
        progress.log("\n".join([opening_line(config, mesh, trainer.recipe, start), *data.corpus_lines]))
        if first >= config.train.steps:
            return state
        step_fn = trainer.compile_step()

        def report_step(done: int, metrics: StepMetrics, batch: dict[str, np.ndarray]) -> None:
            metrics = jax.device_get(metrics)
            progress.after_step(done, metrics)
            bad_steps.after_step(done, metrics, batch)
            checkpoints.check(done)

        pending: tuple[StepMetrics, dict[str, np.ndarray]] | None = None
        for done in range(first + 1, config.train.steps + 1):
            profiler.before_step(done, state)
            with progress.during("data"):
                batch = next(data.batches)
            state, metrics = step_fn(state, to_devices(batch, mesh))
            if pending is not None:  # the device computes this step while the host reports the previous one
                report_step(done - 1, *pending)
            pending = metrics, batch
            stopped = stop.agreed() if done < config.train.steps else 0
            evaluates, saves, samples = _due(config.train, done, bool(stopped))
            if evaluates or saves or samples:
                report_step(done, *pending)  # before saving, which depends on whether this step was bad
                pending = None
            if evaluates:
                with progress.during("evaluating"):
                    losses = component_losses(state.model, data.held_out(), config, mesh)
                    progress.after_evaluation(done, losses)
                    on_evaluation(done, state.model, data.held_out(), losses[""])  # "": the whole split
            last = bool(stopped) or done == config.train.steps
            # A bad step is not applied, but parameters that an earlier step ruined can cause one. Do not save them: the
            # new checkpoint could delete the last good one.
            if saves and (last or not bad_steps.in_a_row):
                with progress.during("saving"):
                    checkpoints.save(state, data.position, last)
                progress.after_save(done)
            if samples:
                with progress.during("sampling"):
                    progress.after_sample(done, _sample(config, state.model, data.tokenizer, mesh))
            if stopped:
                raise Interrupted(stopped, f"stopped after step {done}, which is saved; restart to resume")
    return state


class _Data(NamedTuple):
    """The data of a run."""

    tokenizer: Tokenizer
    batches: grain.DatasetIterator
    held_out: Callable[[], HostBatches]
    """Reads the held-out batches at the first call, which all processes make together."""
    position: DataPosition
    """The position of ``batches``, and the corpus that it counts."""
    corpus_lines: list[str]


def _open_data(config: Config, recipe: Recipe, mesh: Mesh) -> _Data:
    """Check the recipe, open the tokenizer and the corpus, and check the settings that depend on them.

    Raises `UserError` unless all processes have the same settings and files.
    """

    def open_files() -> tuple[Tokenizer, tuple[Documents, Documents]]:
        resumes = newest_step(checkpoint_folder(config)) is not None
        if not resumes:
            config.early_exit.check_trained()
        recipe.check()
        tokenizer = load_tokenizer(config.data.tokenizer)
        # The vocabulary of a Llama can be padded. A resumed run ignores `init_from`, so it need not be given again.
        tokenizer.check_vocabulary(config.model.vocab_size, padded=bool(config.train.init_from) or resumes)
        if config.train.sample_every:  # now, not at the first sample
            prompt = encode(tokenizer, config.decode_settings, config.train.sample_prompt)
            require(bool(prompt), "train.sample_prompt has no token: set it to a text, or train.sample_every to 0")
        return tokenizer, open_splits(config.data)

    def read() -> _Data:
        training, validation = (OpenSplit(documents, tokenizer) for documents in splits)
        batches = iter(local_batches(config, config.data.train_split, mesh, opened=training))
        held_out = local_batches(config, config.data.validation_split, mesh, in_order=True, opened=validation)
        read_once = functools.cache(partial(held_out_batches, held_out, config))
        corpus, lines = identify_corpus(config, tokenizer, *splits)
        position = DataPosition(batches, local_rows(batch_sharding(mesh), config.train.batch_size), corpus)
        return _Data(tokenizer, batches, read_once, position, lines)

    tokenizer, splits = agree("settings", open_files, lambda _: saved_settings(config))
    same = lambda data: (tokenizer.fingerprint(), data.position.corpus, data.corpus_lines)  # noqa: E731
    return agree("tokenizer and corpus", read, same)


def _open_checkpoints(config: Config, tokenizer: Tokenizer, stack: contextlib.ExitStack) -> Checkpoints:
    agree("run folder", partial(make_run_folder, config))
    checkpoints = stack.enter_context(Checkpoints(config))
    agree("tokenizer", partial(checkpoints.check_tokenizer, tokenizer))
    checkpoints.save_tokenizer(tokenizer)
    return checkpoints


def _restore_or_init(trainer: Trainer, checkpoints: Checkpoints, data: _Data) -> tuple[TrainState, int, str]:
    """Return the state to start from, its step, and a description of where it comes from.

    In this order: the newest checkpoint of the run, the weights of ``train.init_from``, random initialization.
    """
    config, abstract = trainer.config, trainer.abstract_state()
    state = checkpoints.restore(abstract, data.position)
    if state is not None:
        return state, int(state.step), checkpoints.resumed
    if config.train.init_from:
        load = agree("initial weights", partial(initial_model, config, data.tokenizer, abstract.model))
        return trainer.init(load()), 0, f"from {config.train.init_from}"
    return trainer.init(), 0, "from scratch"


def _due(train: TrainConfig, done: int, stopped: bool) -> tuple[bool, bool, bool]:
    """Return whether to evaluate, to save and to sample after step ``done``."""

    def every(steps: int) -> bool:
        return done % steps == 0 or done == train.steps

    evaluates = not stopped and every(train.evaluate_every)
    saves = stopped or every(train.checkpoint_every)
    samples = not stopped and train.sample_every > 0 and done % train.sample_every == 0
    return evaluates, saves, samples


def _sample(config: Config, model: Transformer, tokenizer: Tokenizer, mesh: Mesh) -> str:
    """Generate a sample from the sharded model; a collective of all processes."""
    with jax.set_mesh(mesh):
        generator = TextGenerator(model.unstacked(), tokenizer, config.decode_settings)
        return generator.generate([config.train.sample_prompt]).completions[0].text
