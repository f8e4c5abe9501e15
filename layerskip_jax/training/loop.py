"""The training loop: from a config to a trained, evaluated and saved model. Read it from top to bottom."""

import contextlib
import functools
from collections.abc import Callable
from functools import partial

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from layerskip_jax.checkpoint.reading import initial_model
from layerskip_jax.checkpoint.run_folder import checkpoint_folder, checkpoint_steps
from layerskip_jax.checks import require
from layerskip_jax.config import Config, TrainConfig
from layerskip_jax.config_dict import saved_settings
from layerskip_jax.data.corpus import Corpus, identify_corpus
from layerskip_jax.data.documents import Documents
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.pipeline import local_batches, to_devices
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
    began = steady_time()
    mesh = make_mesh(config)
    trainer = Trainer(config, recipe or Recipe.from_config(config), mesh)
    trainer.recipe.check()

    with StopRequest(mesh) as stop, contextlib.ExitStack() as stack:
        profiler = stack.enter_context(Profiler(config.train))  # first: SIGUSR1 would end a process without a handler
        tokenizer, data, held_out, corpus, corpus_lines = _open_data(config, mesh)
        position = DataPosition(data, local_rows(batch_sharding(mesh), config.train.batch_size), corpus)
        checkpoints = _open_checkpoints(config, tokenizer, stack)
        state, first, start = _restore_or_init(trainer, checkpoints, position, tokenizer)
        goodput = Goodput(read_records(config.train.run_dir), first, since=began)
        progress = stack.enter_context(Progress(config, trainer.recipe, first, goodput, peak_flops()))
        bad_steps = BadSteps(config, checkpoints.latest)
        progress.log("\n".join([opening_line(config, mesh, trainer.recipe, start), *corpus_lines]))
        step_fn = trainer.compile_step() if first < config.train.steps else trainer.step

        def report_step(done: int, metrics: StepMetrics, batch: dict[str, np.ndarray]) -> None:
            metrics = jax.device_get(metrics)
            progress.after_step(done, metrics)
            bad_steps.after_step(done, metrics, batch)
            checkpoints.check(done)

        pending: tuple[StepMetrics, dict[str, np.ndarray]] | None = None
        for done in range(first + 1, config.train.steps + 1):
            profiler.before_step(done, state)
            with progress.during("data"):
                batch = next(data)
            state, metrics = step_fn(state, to_devices(batch, mesh))
            if pending is not None:  # the device computes this step while the host reports the previous one
                report_step(done - 1, *pending)
            pending = metrics, batch
            stopped = stop.agreed() if done < config.train.steps else 0
            evaluates, saves, samples = _due(config.train, done, bool(stopped))
            if evaluates or saves or samples:
                report_step(done, *pending)  # before saving, so that no bad state is saved
                pending = None
            if evaluates:
                with progress.during("evaluating"):
                    progress.after_evaluation(done, losses := component_losses(state.model, held_out(), config, mesh))
                    on_evaluation(done, state.model, held_out(), losses[""])
            last = bool(stopped) or done == config.train.steps
            # After bad steps the parameters may be bad too: do not push out the good checkpoint.
            if saves and (last or not bad_steps.in_a_row):
                with progress.during("saving"):
                    checkpoints.save(state, position, last)
                progress.after_save(done)
            if samples:
                with progress.during("sampling"):
                    progress.after_sample(done, _sample(config, state.model, tokenizer, mesh))
            if stopped:
                raise Interrupted(stopped, f"stopped after step {done}, which is saved; restart to resume")
    return state


def _open_data(
    config: Config, mesh: Mesh
) -> tuple[Tokenizer, grain.DatasetIterator, Callable[[], HostBatches], Corpus, list[str]]:
    """Open the tokenizer, an iterator of the training data, and the validation data; identify and describe the corpus.

    The third result reads the held-out batches at its first call, which all processes make together. Raises `UserError`
    unless all processes have the same settings and files.
    """

    def open_files() -> tuple[Tokenizer, tuple[Documents, Documents]]:
        resumes = bool(checkpoint_steps(checkpoint_folder(config)))
        if not resumes:
            config.early_exit.check_trained()
        tokenizer = load_tokenizer(config.data.tokenizer)
        # The vocabulary of a Llama can be padded. A resumed run ignores `init_from`, so it need not be given again.
        tokenizer.check_vocabulary(config.model.vocab_size, padded=bool(config.train.init_from) or resumes)
        if config.train.sample_every:  # now, not at the first sample
            prompt = encode(tokenizer, config.decode_settings, config.train.sample_prompt)
            require(bool(prompt), "train.sample_prompt has no token: set it to a text, or train.sample_every to 0")
        return tokenizer, open_splits(config.data)

    def read() -> tuple[grain.DatasetIterator, Callable[[], HostBatches], Corpus, list[str]]:
        data = iter(local_batches(config, config.data.train_split, mesh, documents=splits[0]))
        held_out = local_batches(config, config.data.validation_split, mesh, in_order=True, documents=splits[1])
        read_once = functools.cache(partial(held_out_batches, held_out, config))
        return data, read_once, *identify_corpus(config, tokenizer, *splits)

    tokenizer, splits = agree("settings", open_files, lambda _: saved_settings(config))
    return tokenizer, *agree("tokenizer and corpus", read, lambda found: (tokenizer.fingerprint(), *found[2:]))


def _open_checkpoints(config: Config, tokenizer: Tokenizer, stack: contextlib.ExitStack) -> Checkpoints:
    agree("run folder", partial(make_run_folder, config))
    checkpoints = stack.enter_context(Checkpoints(config))
    agree("tokenizer", partial(checkpoints.check_tokenizer, tokenizer))
    checkpoints.save_tokenizer(tokenizer)
    return checkpoints


def _restore_or_init(
    trainer: Trainer, checkpoints: Checkpoints, position: DataPosition, tokenizer: Tokenizer
) -> tuple[TrainState, int, str]:
    """Return the state to start from, its step, and a description of where it comes from.

    In this order: the newest checkpoint of the run, the weights of ``train.init_from``, random initialization.
    """
    config, abstract = trainer.config, trainer.abstract_state()
    state = checkpoints.restore(abstract, position)
    if state is not None:
        return state, int(state.step), checkpoints.resumed
    if config.train.init_from:
        load = agree("initial weights", partial(initial_model, config, tokenizer, abstract.model))
        return trainer.init(load()), 0, f"from {config.train.init_from}"
    return trainer.init(), 0, "from scratch"


def _due(train: TrainConfig, done: int, stopped: bool) -> tuple[bool, bool, bool]:
    """Return whether to evaluate, to save and to sample after step ``done``."""

    def every(steps: int) -> bool:
        return done % steps == 0 or done == train.steps

    sample = train.sample_every > 0 and done % train.sample_every == 0
    return not stopped and every(train.evaluate_every), stopped or every(train.checkpoint_every), not stopped and sample


def _sample(config: Config, model: Transformer, tokenizer: Tokenizer, mesh: Mesh) -> str:
    """Generate a sample from the sharded model; a collective of all processes."""
    with jax.set_mesh(mesh):
        generator = TextGenerator(model.unstacked(), tokenizer, config.decode_settings)
        return generator.generate([config.train.sample_prompt]).completions[0].text
