"""The checkpoints of a run: saved in the background, kept, and read again, the newest that is whole.

Model, optimizer, data position and config are saved together through orbax, and appear together or not at all.
"""

import contextlib
import sys
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath

from layerskip_jax.checkpoint.digests import digests
from layerskip_jax.checkpoint.reading import (
    DamagedCheckpoint,
    checkpoint_folder,
    differences,
    in_item,
    in_short,
    named_arrays,
    read_arrays,
    read_checksums,
    read_config,
    read_data_positions,
    sha256,
    sha256_of,
    with_arrays,
    wrong_array,
)
from layerskip_jax.config import Config, experiment
from layerskip_jax.data.load_tokenizer import load_tokenizer, tokenizer_in
from layerskip_jax.data.position import Position
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.distributed import first_said, together
from layerskip_jax.errors import UserError
from layerskip_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one run, as a context manager that waits for the last save on its way out."""

    def __init__(self, config: Config):
        self.folder = checkpoint_folder(config)
        self._config = config
        self._manager = self._open()
        self._tokenizer: dict[str, bytes] = {}

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._config.train.keep_checkpoints,
            keep_period=self._config.train.keep_every or None,
            create=True,
            cleanup_tmp_directories=True,  # what a killed process, or a save that failed, had begun
            lightweight_initialize=True,  # reads nothing of a checkpoint that may be damaged
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            return  # another process is gone, for which orbax would wait
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            if kind is None:
                self._save_has_failed(error)
            else:
                _warn(f"the last checkpoint could not be written: {in_short(error)}")
        finally:
            with contextlib.suppress(Exception):  # what it has raised above, it may raise again
                self._manager.close()

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise `UserError` if the run has another tokenizer already: one run has one."""
        path = tokenizer_in(self.folder)
        if path and load_tokenizer(str(path)).files != tokenizer.files:
            raise UserError(
                f"the run {self._config.train.run_dir} was trained with another tokenizer than "
                f"{self._config.data.tokenizer}: continue with --data.tokenizer {path}, or start a new --train.run_dir"
            )

    def keep_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Put the tokenizer beside the checkpoints, so that they need no other file."""
        self._tokenizer = tokenizer.files
        for name, content in tokenizer.files.items() if jax.process_index() == 0 else ():
            begun, file = self.folder / f"{name}.begun", self.folder / name
            if not file.exists():
                begun.write_bytes(content)
                begun.replace(file)  # so that a process that is killed here leaves no half of it

    def save(self, state: TrainState, data: Position, last: bool = False) -> None:
        """Save after the step that ``state.step`` counts; returns as soon as the arrays are copied.

        What goes wrong, now or later in the background, is raised as `UserError` or said, as ``train.failed_save`` has
        it. So are numbers that are not finite, which are never saved. The ``last`` save of a process is waited for, and
        raises in any case: no later one makes up for it.
        """
        model, optimizer = named_arrays(state.model), named_arrays(_rest(state))
        sums, finite = digests({**in_item("model", model), **in_item("optimizer", optimizer)})
        if not finite:
            raise UserError(
                f"parameters are not finite after step {int(state.step)}, so they are not saved; the checkpoint of "
                f"step {self.latest()} in {self.folder} is the newest: lower optimizer.learning_rate and start again"
            )
        config = experiment(self._config)
        tokenizer = {name: sha256(content) for name, content in self._tokenizer.items()}
        checksums = {"arrays": sums, "config": sha256_of(config), "tokenizer": tokenizer}
        try:
            self._manager.save(
                int(state.step),
                args=ocp.args.Composite(
                    model=ocp.args.StandardSave(model),
                    optimizer=ocp.args.StandardSave(optimizer),
                    batches=grain.checkpoint.CheckpointSave(data),  # named to be written first, for it may fail at once
                    config=ocp.args.JsonSave(config),
                    checksums=ocp.args.JsonSave(checksums),
                ),
            )
            if last:
                self._manager.wait_until_finished()
        except Exception as error:
            self._save_has_failed(error, last)

    def check(self) -> None:
        """Raise or say, as ``train.failed_save`` has it, what went wrong in the background since the last look."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            self._save_has_failed(error)

    def _save_has_failed(self, error: Exception, last: bool = False) -> None:
        newest = self.latest()
        alone = jax.process_count() == 1  # the others may know of nothing, and would be waited for
        if alone:
            with contextlib.suppress(Exception):
                self._manager.close()
            self._manager = self._open()  # orbax's would raise the same error at every save from here on
        kept = f"the checkpoint of step {newest} is intact" if newest is not None else "there is no earlier one"
        line = f"a checkpoint could not be written to {self.folder}: {in_short(error)}; {kept}"
        if last:
            raise UserError(f"{line}; mend that and start again") from error
        if self._config.train.failed_save == "stop" or not alone:
            raise UserError(f"{line} (a run of one process goes on without, with train.failed_save go_on)") from error
        _warn(f"{line}; the run goes on, and tries again at the next one (train.failed_save)")

    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None; waits for one that is being written."""
        with contextlib.suppress(Exception):  # a save that has failed is not complete, and is said elsewhere
            self._manager.wait_until_finished()
        return max(self._steps(), default=None)

    def _steps(self) -> list[int]:
        return sorted(ocp.utils.checkpoint_steps(self.folder), reverse=True)

    def restore(self, abstract: TrainState, data: Position) -> TrainState | None:
        """Restore the newest checkpoint into the shapes and shardings of ``abstract``, and set ``data`` to its place.

        Returns None where there is none. One that is damaged is named, and the one before it taken, or the run stopped,
        as ``train.damaged_checkpoint`` says; what was passed over is moved to ``RUN_DIR/damaged``. Raises `UserError`
        when the checkpoint holds another model, or when none is whole.
        """
        damaged: list[tuple[int, str]] = []
        for step in together("checkpoints", self._steps, lambda steps: steps):
            state, problem = self._read(step, abstract, data)
            if not problem:
                self._move_away([step for step, _ in damaged])
                return state
            damaged.append((step, problem))
            if self._config.train.damaged_checkpoint == "stop":
                raise DamagedCheckpoint(
                    f"{problem} (train.damaged_checkpoint go_back takes the one before, if it is whole)"
                )
            if jax.process_index() == 0:
                _warn(f"{problem}; the one before is taken, if it is whole (train.damaged_checkpoint)")
        if damaged:
            raise DamagedCheckpoint(
                f"no checkpoint of {self.folder} is whole: start a new run with another --train.run_dir"
            )
        return None

    def _read(self, step: int, abstract: TrainState, data: Position) -> tuple[TrainState | None, str]:
        """Return a checkpoint's state, or what is wrong with it: the same on every process."""
        folder, problem = self.folder / str(step), ""
        model, optimizer, sums, positions = {}, {}, {}, {}
        try:
            saved = read_config(folder)
            self._check_it_fits(folder, saved)
            sums = read_checksums(folder)["arrays"]
            positions = read_data_positions(folder)
            model = read_arrays(folder / "model", named_arrays(abstract.model))
            optimizer = read_arrays(folder / "optimizer", named_arrays(_rest(abstract)))
        except DamagedCheckpoint as error:
            problem = str(error)
        problem = first_said(problem)  # before the digests, which all processes compute together
        problem = problem or wrong_array(folder, sums, {**in_item("model", model), **in_item("optimizer", optimizer)})
        if problem:
            return None, problem
        data.set_state(positions, self._config.train.batch_size, same_rows(saved, self._config))
        rest = with_arrays(_rest(abstract), optimizer)
        model = with_arrays(abstract.model, model)
        return TrainState(step=rest["step"], model=model, opt_state=rest["state"], usual=rest["usual"]), ""

    def _check_it_fits(self, folder: epath.Path, saved: Config) -> None:
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

    def _move_away(self, steps: list[int]) -> None:
        """Make room for the checkpoints that the run is going to write again."""

        def move() -> None:
            for step in steps if jax.process_index() == 0 else []:
                away = self.folder.parent / "damaged"
                away.mkdir(exist_ok=True)
                taken = len(list(away.glob(f"{step}*")))
                (self.folder / str(step)).rename(away / (f"{step}-{taken}" if taken else str(step)))

        together("damaged checkpoints", move)
        self._manager.reload()

    def changes(self, step: int) -> list[str]:
        """Return what is said of going on from a checkpoint with other settings."""
        old, new = experiment(read_config(self.folder / str(step))), experiment(self._config)
        changed = [
            f"{group}.{name} {old[group][name]} -> {value}"
            for group, settings in new.items()
            for name, value in settings.items()
            if old[group][name] != value
        ]
        return [f"changed settings: {', '.join(changed)}"] if changed else []


def same_rows(one: Config, other: Config) -> bool:
    """Say whether two configs, of one batch size, make the same rows of the same documents, wherever those lie."""
    names = ("source", "name", "train_split", "prompt_key", "sequence_length", "shuffle_window")
    return one.train.seed == other.train.seed and all(
        getattr(one.data, name) == getattr(other.data, name) for name in names
    )


def make_run_folder(config: Config) -> None:
    """Make the folder of a run's checkpoints; raises `UserError` where that cannot be."""
    try:
        checkpoint_folder(config).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run folder {config.train.run_dir} (train.run_dir) cannot be made: {error}") from error


def _rest(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "state": state.opt_state, "usual": state.usual}


def _warn(line: str) -> None:
    print(f"WARNING: {line}", file=sys.stderr, flush=True)
