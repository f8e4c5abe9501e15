"""Save the checkpoints of a run asynchronously, delete old ones, and restore the newest intact one.

orbax saves model, optimizer, data position and config as one atomic checkpoint.
"""

import contextlib
import logging
from functools import partial
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath

from layerskip_jax.checkpoint.arrays import (
    DamagedCheckpoint,
    corrupted_array,
    named_arrays,
    prefix_names,
    read_arrays,
    summarize,
    with_arrays,
)
from layerskip_jax.checkpoint.digests import digests
from layerskip_jax.checkpoint.reading import differences
from layerskip_jax.checkpoint.run_folder import (
    CheckpointNames,
    checkpoint_folder,
    checkpoint_steps,
    json_sha256,
    newest_step,
    read_checksums,
    read_config,
    read_data_positions,
    sha256,
)
from layerskip_jax.config import Config
from layerskip_jax.config_dict import changed_settings, saved_settings
from layerskip_jax.data.corpus import resume_mixture
from layerskip_jax.data.load_tokenizer import find_tokenizer, load_tokenizer
from layerskip_jax.data.position import DataPosition
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.distributed import agree, first_message
from layerskip_jax.errors import UserError, warn
from layerskip_jax.locations import is_regular, write_file
from layerskip_jax.training.optimizer import learning_rate, schedule_count
from layerskip_jax.training.run_lock import RunLock
from layerskip_jax.training.step import TrainState


class _Once(logging.Filter):
    """Drops orbax's message "Waiting for previous save" after the first: with a slow bucket, every save repeats it."""

    passed = False

    def filter(self, record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith("Waiting for previous save"):
            return True
        first, self.passed = not self.passed, True
        return first


_once = _Once()


class Checkpoints:
    """The checkpoints of one run. The context manager locks the run folder; its exit waits for the last save."""

    def __init__(self, config: Config):
        self.folder = checkpoint_folder(config)
        self._config = config
        self._lock = RunLock(config)
        self._tokenizer_digests: dict[str, str] = {}
        self.resumed = ""
        """Describes the restored checkpoint, and the settings and data that changed after it."""

    def _open(self) -> ocp.CheckpointManager:
        logging.getLogger("absl").addFilter(_once)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._config.train.keep_checkpoints,
            keep_period=self._config.train.keep_every or None,
            create=True,
            step_name_format=CheckpointNames(),
            cleanup_tmp_directories=True,  # left by a killed process or a failed save
            lightweight_initialize=True,  # do not read checkpoints yet: they may be damaged
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        self._lock.acquire()
        try:
            self._manager = self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._close(kind)
        finally:
            self._lock.release()

    def _close(self, kind: type[BaseException] | None) -> None:
        if kind is not None and issubclass(kind, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            return  # another process is lost, and orbax would wait for it
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            if kind is None:
                self._handle_failed_save(error, last=True)
            else:
                warn(f"the last checkpoint could not be written: {summarize(error)}")
        finally:
            with contextlib.suppress(Exception):  # it may raise the same error again
                self._manager.close()

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise `UserError` if the run was started with another tokenizer; restore its stored files if they changed."""
        given, saved = tokenizer.digests(), self._saved_digests()
        if saved == given:
            self._restore_tokenizer(tokenizer)
            return
        path = find_tokenizer(self.folder)
        if path and not saved:
            saved = load_tokenizer(str(path)).digests()
        if saved in ({}, given):
            return
        remedy = "give the --data.tokenizer that it was trained with"
        if path and self._stores(saved):
            remedy = f"continue with --data.tokenizer {path}"
        raise UserError(
            f"the run {self._config.train.run_dir} was trained with another tokenizer than "
            f"{self._config.data.tokenizer}: {remedy}, or start a new --train.run_dir"
        )

    def _stores(self, digests: dict[str, str]) -> bool:
        """Return whether the tokenizer's files next to the checkpoints have these digests."""
        files = {self.folder / name: digest for name, digest in digests.items()}
        return all(is_regular(file) and sha256(file.read_bytes()) == digest for file, digest in files.items())

    def _saved_digests(self) -> dict[str, str]:
        """Return the digests of the tokenizer in the newest checkpoint; none without one, or if it is damaged."""
        newest = newest_step(self.folder)
        with contextlib.suppress(DamagedCheckpoint):  # `restore` reports it
            return {} if newest is None else read_checksums(self.folder / str(newest))["tokenizer"]
        return {}

    def _restore_tokenizer(self, tokenizer: Tokenizer) -> None:
        for name, content in tokenizer.files.items() if jax.process_index() == 0 else ():
            file = self.folder / name
            if is_regular(file) and file.read_bytes() != content:
                warn(f"{file} was changed after a save: it is replaced by {self._config.data.tokenizer}")
                write_file(file, content)

    def save_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Copy the tokenizer's files to the folder of the checkpoints, so that they need no others."""
        self._tokenizer_digests = tokenizer.digests()
        files = tokenizer.companions | tokenizer.files
        for name, content in files.items() if jax.process_index() == 0 else ():
            if not (self.folder / name).exists():
                write_file(self.folder / name, content)

    def save(self, state: TrainState, data: DataPosition, last: bool = False) -> None:
        """Save ``state`` as the checkpoint of step ``state.step``; returns as soon as the arrays are copied.

        ``train.failed_save`` decides whether a failure, now or later in the background, raises `UserError` or (with one
        process only) prints a warning. The ``last`` save blocks, and its failure always raises: no save follows.
        Raises `UserError` for a state that is not finite, and if another process has taken the run over.
        """
        self._lock.check(int(state.step), now=True)
        model, optimizer = named_arrays(state.model), named_arrays(_optimizer_item(state))
        sums, finite = digests({**prefix_names("model", model), **prefix_names("optimizer", optimizer)})
        if not finite:
            newest = self.latest()
            there = "there is no checkpoint"
            if newest is not None:
                there = f"the newest checkpoint in {self.folder} is of step {newest}"
            raise UserError(
                f"parameters or optimizer state are not finite after step {int(state.step)}, so they are not saved; "
                f"{there}: lower optimizer.learning_rate and restart"
            )
        config = saved_settings(self._config)
        checksums = {"arrays": sums, "config": json_sha256(config), "tokenizer": self._tokenizer_digests}
        try:
            self._manager.save(
                int(state.step),
                args=ocp.args.Composite(
                    model=ocp.args.StandardSave(model),
                    optimizer=ocp.args.StandardSave(optimizer),
                    # Orbax saves the items in alphabetical order. This one can raise an error immediately. Its name
                    # puts it first, so that no other item is then half written.
                    batches=grain.checkpoint.CheckpointSave(data),
                    config=ocp.args.JsonSave(config),
                    checksums=ocp.args.JsonSave(checksums),
                ),
            )
            if last:
                self._manager.wait_until_finished()
        except Exception as error:
            self._handle_failed_save(error, last)

    def check(self, done: int) -> None:
        """Raise or print failures of background saves since the last call, as ``train.failed_save`` says.

        Also raises `UserError` if another process has taken the run over; ``done`` is the last finished step.
        """
        self._lock.check(done)
        try:
            self._manager.check_for_errors()
        except Exception as error:
            self._handle_failed_save(error)

    def _handle_failed_save(self, error: Exception, last: bool = False) -> None:
        newest = self.latest()
        alone = jax.process_count() == 1  # other processes may not see the failure, and orbax would wait for them
        if alone:
            with contextlib.suppress(Exception):
                self._manager.close()
            with contextlib.suppress(Exception):  # the next start tries again
                self._remove_unfinished()
            self._manager = self._open()  # the old one would raise the same error at every later save
        earlier = "there is no earlier one" if newest is None else f"the newest complete one is of step {newest}"
        line = f"a checkpoint could not be written to {self.folder}: {summarize(error)}; {earlier}"
        if last:
            raise UserError(f"{line}; fix this and restart") from error
        if self._config.train.failed_save == "stop" or not alone:
            raise UserError(f"{line} (train.failed_save go_on lets a run of one process continue)") from error
        warn(f"{line}; the run continues and retries at the next checkpoint (train.failed_save)")

    def _remove_unfinished(self) -> None:
        """Remove what failed saves wrote. A new manager does too, but in a thread that may outlive the run's lock."""
        for unfinished in ocp.path.step.all_temporary_paths(self.folder):
            unfinished.get().rmtree()

    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None; waits for a save in progress."""
        with contextlib.suppress(Exception):  # `check` reports failures
            self._manager.wait_until_finished()
        return newest_step(self.folder)

    def restore(self, abstract: TrainState, data: DataPosition) -> TrainState | None:
        """Restore the newest checkpoint into the shapes and shardings of ``abstract``, and its position into ``data``.

        Returns None without a checkpoint. If the newest is damaged, ``train.damaged_checkpoint`` decides whether to
        raise `DamagedCheckpoint`, or to warn, restore the previous one and move the damaged one to ``RUN_DIR/damaged``.
        Raises `UserError` if the checkpoint holds another model, or if none is intact.
        """
        damaged: list[tuple[int, str]] = []
        for step in agree("checkpoints", partial(checkpoint_steps, self.folder), lambda steps: steps):
            state, problem = self._read(step, abstract, data)
            if not problem:
                self._move_damaged(damaged)
                return state
            damaged.append((step, problem))
            if self._config.train.damaged_checkpoint == "stop":
                raise DamagedCheckpoint(f"{problem} (train.damaged_checkpoint go_back restores the one before)")
            if jax.process_index() == 0:
                warn(f"{problem}; trying the previous one (train.damaged_checkpoint)")
        if damaged:
            raise DamagedCheckpoint(
                f"no checkpoint in {self.folder} is intact: start a new run with another --train.run_dir"
            )
        return None

    def _read(self, step: int, abstract: TrainState, data: DataPosition) -> tuple[TrainState | None, str]:
        """Return a checkpoint's state, or else a description of the damage, the same on all processes."""
        folder, problem = self.folder / str(step), ""
        model, optimizer, sums = {}, {}, {}
        positions: dict[int, Any] = {}
        corpus = None
        try:
            checksums = read_checksums(folder)
            saved, sums = read_config(folder, checksums), checksums["arrays"]
            self._check_config(folder, saved)
            positions, corpus = read_data_positions(folder)
            model = read_arrays(folder / "model", named_arrays(abstract.model))
            optimizer = read_arrays(folder / "optimizer", named_arrays(_optimizer_item(abstract)))
        except DamagedCheckpoint as error:
            problem = str(error)
        # All processes must know of a problem before they compute digests, or some would wait in the all-reduce.
        problem = first_message(problem)
        problem = problem or corrupted_array(
            folder, sums, {**prefix_names("model", model), **prefix_names("optimizer", optimizer)}
        )
        if problem:
            return None, problem
        resumed, data_notes = resume_mixture(saved, self._config, corpus, data.corpus)
        data.set_state(positions, self._config.train.batch_size, resumed)
        item = with_arrays(_optimizer_item(abstract), optimizer)
        updates = int(schedule_count(item["state"]))
        self.resumed = "; ".join([*_resumed(saved, self._config, step, updates), *data_notes])
        model = with_arrays(abstract.model, model)
        return TrainState(step=item["step"], model=model, opt_state=item["state"], loss_ema=item["usual"]), ""

    def _check_config(self, folder: epath.Path, saved: Config) -> None:
        for name, old, new in differences(saved.model, self._config.model):
            raise UserError(
                f"the checkpoint {folder} has model.{name} {old}, but the config says {new}: continue with "
                f"--model.{name} {old}, or start a new run with another --train.run_dir"
            )
        if saved.optimizer.name != self._config.optimizer.name:
            raise UserError(
                f"the checkpoint {folder} was trained with optimizer.name {saved.optimizer.name}, but "
                f"the config says {self._config.optimizer.name}: their states differ; keep {saved.optimizer.name}"
            )

    def _move_damaged(self, damaged: list[tuple[int, str]]) -> None:
        """Move damaged checkpoints away, so that the run can save those steps again, and say why in a text file."""

        def move() -> None:
            for step, problem in damaged if jax.process_index() == 0 else []:
                target = self.folder.parent / "damaged"
                target.mkdir(exist_ok=True)
                names = (target / name for name in (str(step), *(f"{step}-{n}" for n in range(1, 1000))))
                name = next(name for name in names if not name.exists())
                # Write the text first: `rename` needs a target folder, and in a bucket only files make folders.
                write_file(target / f"{name.name}.txt", f"{problem}\n")
                (self.folder / str(step)).rename(name)

        agree("damaged checkpoints", move)
        self._manager.reload()


def make_run_folder(config: Config) -> None:
    """Create the folder of a run's checkpoints; raises `UserError` if that fails."""
    folder = checkpoint_folder(config)
    # orbax takes a path with *, ? or [ for a glob pattern: it finds no file and commits an empty folder.
    if signs := set("*?[") & set(str(folder)):
        raise UserError(
            f"checkpoints cannot be saved below a folder with {' or '.join(sorted(signs))} in its name: rename it or "
            f"give another --train.run_dir than {folder.parent}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run folder {config.train.run_dir} (train.run_dir) cannot be created: {error}") from error


def _resumed(saved: Config, config: Config, step: int, updates: int) -> list[str]:
    """Describe a resumed run: its next step, a jump of the learning rate, and the settings that changed.

    The learning rate follows the count of ``updates``, which leaves out skipped steps.
    """
    lines = [f"resuming after step {step}"]
    if step >= config.train.steps:
        lines = [f"the run has {step} steps already, so nothing is trained (train.steps)"]
    else:
        old_rate, rate = (float(learning_rate(settings)(updates)) for settings in (saved, config))
        if abs(rate - old_rate) > 1e-6 * max(old_rate, rate):
            lines.append(f"the learning rate of step {step + 1} goes from {old_rate:.3g} to {rate:.3g}")
    changed = [f"{name} {old} -> {value}" for name, (old, value) in changed_settings(config, base=saved).items()]
    return [*lines, *([f"changed settings: {', '.join(changed)}"] if changed else [])]


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    # These names are in every stored checkpoint: "usual" is the former name of `loss_ema`.
    return {"step": state.step, "state": state.opt_state, "usual": state.loss_ema}
