"""The training loop: from a config to a trained, evaluated and saved model. Read it from top to bottom."""

import contextlib
import signal
import time
from functools import partial

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from layerskip_jax.checkpoint.reading import initial_model
from layerskip_jax.config import Config, experiment
from layerskip_jax.data.documents import digest_of
from layerskip_jax.data.load_tokenizer import fingerprint, load_tokenizer
from layerskip_jax.data.pipeline import local_batches, to_devices
from layerskip_jax.data.position import Position
from layerskip_jax.data.sources import open_documents
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.decoding.text import TextGenerator
from layerskip_jax.distributed import StopRequest, own_rows, together
from layerskip_jax.errors import Interrupted
from layerskip_jax.evaluation.exits import evaluate
from layerskip_jax.model import Transformer
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.sharding import batch_sharding, make_mesh
from layerskip_jax.training.bad_steps import BadSteps
from layerskip_jax.training.checkpoints import Checkpoints, make_run_folder
from layerskip_jax.training.monitoring.goodput import Goodput
from layerskip_jax.training.monitoring.metrics import read_records
from layerskip_jax.training.monitoring.progress import Progress, opening_line
from layerskip_jax.training.monitoring.watch import Profiler
from layerskip_jax.training.step import StepMetrics, Trainer, TrainState


def train(config: Config, recipe: Recipe | None = None) -> TrainState:
    """Train as ``config`` says, from the newest checkpoint in its run folder if there is one; return the last state.

    ``recipe`` replaces the functions that the config names, for research variants. Every process of a run calls it
    alike. Raises `UserError` for what the user can mend: a corpus, a tokenizer, a mesh or a checkpoint that does not
    fit, or steps that are not finite; and `Interrupted` after SIGTERM or SIGINT, when the step is done and saved.
    """
    began = time.time()
    mesh = make_mesh(config)
    rows = own_rows(batch_sharding(mesh), config.train.batch_size)
    recipe = recipe or Recipe.from_config(config)
    recipe.check()
    trainer = Trainer(config, recipe, mesh)

    with jax.set_mesh(mesh), StopRequest(mesh) as stop, contextlib.ExitStack() as stack:
        tokenizer, data = together("settings", partial(_open, config, mesh), lambda _: experiment(config))
        if jax.process_count() > 1:
            together("tokenizer and corpus", partial(_read, config), lambda said: said)
        together("run folder", partial(make_run_folder, config))
        checkpoints = stack.enter_context(Checkpoints(config))
        together("tokenizer", partial(checkpoints.check_tokenizer, tokenizer))
        checkpoints.keep_tokenizer(tokenizer)
        position = Position(data, rows)
        state, start = checkpoints.restore(trainer.abstract_state(), position), "from scratch"
        if state is None and config.train.init_from:
            check = partial(initial_model, config, tokenizer, trainer.abstract_state().model)
            state, first = trainer.init(together("initial weights", check)()), 0
            start = f"from {config.train.init_from}"
        elif state is None:
            state, first = trainer.init(), 0
        else:
            first = int(state.step)
            start = "; ".join([f"resuming after step {first}", *checkpoints.changes(first)])
        goodput = Goodput(read_records(config.train.run_dir), first, since=began)
        progress = stack.enter_context(Progress(config, first, goodput))
        profiler = stack.enter_context(Profiler(config.train))
        bad_steps = BadSteps(config, checkpoints)
        progress.say(opening_line(config, mesh, start))
        advance = trainer.compile_step() if first < config.train.steps else trainer.step

        def look_at(done: int, metrics: StepMetrics, batch: dict[str, np.ndarray]) -> None:
            metrics = jax.device_get(metrics)
            progress.after_step(done, metrics)
            bad_steps.after_step(done, metrics, batch)
            checkpoints.check()

        pending: tuple[StepMetrics, dict[str, np.ndarray]] | None = None
        for step in range(first, config.train.steps):
            profiler.before_step(step + 1, state)
            with progress.during("data"):
                batch = next(data)
            state, metrics = advance(state, to_devices(batch, mesh))
            # The device works on this step while the host looks at the one before.
            if pending is not None:
                look_at(step, *pending)
            pending, done = (metrics, batch), step + 1

            stopped = stop.agreed() if done < config.train.steps else 0
            evaluates = not stopped and _due(done, config.train.evaluate_every, config.train.steps)
            saves = stopped or _due(done, config.train.checkpoint_every, config.train.steps)
            samples = not stopped and config.train.sample_every and done % config.train.sample_every == 0
            if evaluates or saves or samples:
                look_at(done, *pending)  # before saving, so that no bad state is saved
                pending = None
                # What makes steps bad may lie in the parameters: the good checkpoint is not pushed out by them.
                saves = saves and (stopped or done == config.train.steps or not bad_steps.in_a_row)
            if evaluates:
                with progress.during("evaluating"):
                    progress.after_evaluation(done, evaluate(state.model, config, mesh))
            if saves:
                with progress.during("saving"):
                    checkpoints.save(state, position, last=bool(stopped) or done == config.train.steps)
                progress.after_save(done)
            if samples:
                with progress.during("sampling"):
                    progress.after_sample(done, _sample(config, state.model, tokenizer))
            if stopped:
                name = signal.Signals(stopped).name
                raise Interrupted(
                    stopped, f"{name}: ended after step {done}, which is saved; started again, it goes on"
                )
    return state


def _read(config: Config) -> dict[str, str]:
    """Return what tells a tokenizer and the splits of a corpus from others."""
    splits = (config.data.train_split, config.data.validation_split)
    return {"tokenizer": fingerprint(config.data.tokenizer)} | {
        split: digest_of(open_documents(config.data, split)) for split in splits
    }


def _open(config: Config, mesh: Mesh) -> tuple[Tokenizer, grain.DatasetIterator]:
    tokenizer = load_tokenizer(config.data.tokenizer)
    tokenizer.check_vocabulary(config.model.vocab_size, padded=bool(config.train.init_from))
    data = iter(local_batches(config, config.data.train_split, mesh))
    local_batches(config, config.data.validation_split, mesh, epochs=1)  # what cannot be read is said now, not later
    return tokenizer, data


def _due(done: int, every: int, last: int) -> bool:
    return done % every == 0 or done == last


def _sample(config: Config, model: Transformer, tokenizer: Tokenizer) -> str:
    """Return the sample, which all processes generate together: each from its own part of the model."""
    generator = TextGenerator(model.unstacked(), tokenizer, config.decode)
    return generator.generate([config.train.sample_prompt]).completions[0].text
