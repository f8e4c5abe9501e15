"""Data positions, restored on any number of processes, and the worker processes of the pipeline."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from test_data import assert_equal_batches, make_config, shares, take

from layerskip_jax.data import pipeline
from layerskip_jax.data.pipeline import make_batches
from layerskip_jax.data.position import DataPosition, read_positions
from layerskip_jax.data.sources import open_documents


def save_position(iterator, rows, folder, process=0, processes=1):
    folder.mkdir(exist_ok=True)
    (folder / f"process_{process}-of-{processes}.json").write_bytes(DataPosition(iterator, rows).get_state())
    return folder


@given(stop=st.integers(0, 60), ahead=st.integers(1, 12), seed=st.integers(0, 5))
def test_a_restored_position_yields_the_same_batches(corpus, tmp_path_factory, stop, ahead, seed):
    """Over several epochs: 38 short documents are about 40 batches of 4 rows."""
    batches = make_batches(make_config(corpus), "train", batch_size=4, seed=seed)
    original = iter(batches)
    take(original, stop)
    saved = save_position(original, range(4), epath.Path(tmp_path_factory.mktemp("position")))
    expected = take(original, ahead)
    restored = iter(batches)
    DataPosition(restored, range(4)).set_state(read_positions(saved), 4)
    assert_equal_batches(take(restored, ahead), expected)


@given(
    before=st.sampled_from([1, 2, 4]),
    after=st.sampled_from([1, 2, 4]),
    stop=st.integers(0, 60),
    window=st.sampled_from([1, 16, 40]),
)
def test_any_number_of_processes_resumes_with_the_same_rows(corpus, tmp_path_factory, before, after, stop, window):
    config, saved = make_config(corpus, shuffle_window=window), epath.Path(tmp_path_factory.mktemp("position"))
    alone = iter(make_batches(config, "train", batch_size=4, seed=1))
    for process, rows in enumerate(shares(4, before)):
        part = iter(make_batches(config, "train", batch_size=4, rows=rows, seed=1))
        take(part, stop)
        save_position(part, rows, saved, process, before)
    take(alone, stop)
    expected = take(alone, 6)
    for rows in shares(4, after):
        part = iter(make_batches(config, "train", batch_size=4, rows=rows, seed=1))
        DataPosition(part, rows).set_state(read_positions(saved), 4)
        own = [{name: array[rows.start : rows.stop] for name, array in batch.items()} for batch in expected]
        assert_equal_batches(take(part, 6), own)


def test_a_process_reads_only_the_documents_of_its_local_rows(corpus, monkeypatch):
    documents, read = open_documents(corpus, "train"), []

    class Recorded:
        def __len__(self):
            return len(documents)

        def __getitem__(self, index):
            read[-1].append(index)
            return documents[index]

    monkeypatch.setattr(pipeline, "open_documents", lambda config, split: Recorded())
    for rows in shares(4, 2):
        read.append([])
        take(iter(make_batches(make_config(corpus, shuffle_window=1), "train", batch_size=4, rows=rows, seed=1)), 4)
    first, second = (set(part) for part in read)
    assert first
    assert second
    assert not first & second


@given(stop=st.integers(0, 30), before=st.integers(1, 5), after=st.integers(1, 5))
def test_another_batch_size_resumes_after_the_documents_that_were_read(corpus, tmp_path_factory, stop, before, after):
    documents, read = open_documents(corpus, "train"), []

    class Recorded:
        def __len__(self):
            return len(documents)

        def __getitem__(self, index):
            read.append(index)
            return documents[index]

    def batches(size):
        return iter(make_batches(make_config(corpus, shuffle_window=1), "train", batch_size=size, seed=1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "open_documents", lambda config, split: Recorded())
        original = batches(before)
        take(original, stop)
        taken = Counter(read)
        saved = read_positions(save_position(original, range(before), epath.Path(tmp_path_factory.mktemp("position"))))
        restored = batches(after)
        DataPosition(restored, range(after)).set_state(saved, after)
        read.clear()
        take(restored, 3)
    # Within the first epoch, only the document that each row was reading can come twice.
    if before != after and sum(taken.values()) + len(read) < len(documents) // 2:
        assert len(set(taken) & set(read)) <= before


@pytest.mark.parametrize("damage", [lambda text: text.replace("1", "2", 1), lambda text: text[:-40], lambda text: "[]"])
def test_a_damaged_position_is_an_error(corpus, tmp_path, damage):
    batches = iter(make_batches(make_config(corpus), "train", batch_size=4, seed=1))
    take(batches, 11)
    folder = epath.Path(save_position(batches, range(4), tmp_path / "position"))
    (file,) = folder.iterdir()
    file.write_text(damage(file.read_text()))
    with pytest.raises(ValueError, match=r"process_0-of-1\.json does not hold|line 1 column"):
        read_positions(folder)
    file.unlink()
    with pytest.raises(ValueError, match="does not hold the positions of all processes"):
        read_positions(folder)


@pytest.mark.parametrize(
    "change", [{"shuffle_window": 40}, {"shuffle_window": 1}, {"sequence_length": 24}], ids=lambda change: str(change)
)
def test_with_other_settings_the_rows_resume_after_the_documents_that_were_read(corpus, tmp_path, change):
    original = iter(make_batches(make_config(corpus), "train", batch_size=4, seed=1))
    take(original, 3)
    saved = read_positions(save_position(original, range(4), epath.Path(tmp_path)))
    restored = iter(make_batches(make_config(corpus, **change), "train", batch_size=4, seed=1))
    (fresh,) = take(iter(make_batches(make_config(corpus, **change), "train", batch_size=4, seed=1)), 1)
    DataPosition(restored, range(4)).set_state(saved, 4, {"": ("", "next documents")})
    (batch,) = take(restored, 1)
    assert batch["inputs_BT"].shape == fresh["inputs_BT"].shape
    assert not np.array_equal(batch["inputs_BT"], fresh["inputs_BT"])


def test_workers_ignore_sigint_and_sigterm(corpus):
    """All processes get Ctrl-C and a cluster's SIGTERM, but the run still needs batches until it has saved."""
    before = set(multiprocessing.active_children())
    batches = iter(make_batches(make_config(corpus, workers=1), "train", batch_size=4, seed=1))
    plain = iter(make_batches(make_config(corpus), "train", batch_size=4, seed=1))
    assert_equal_batches(take(batches, 1), take(plain, 1))
    (worker,) = set(multiprocessing.active_children()) - before
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    assert_equal_batches(take(batches, 60), take(plain, 60))
    batches.close()
    worker.join(20)
    assert worker.exitcode is not None


KILLED_RUN = """
import multiprocessing, os, signal, sys
from layerskip_jax.config import Config, DataConfig
from layerskip_jax.data.pipeline import make_batches

if __name__ == "__main__":
    data = DataConfig(source="text", path=sys.argv[1], tokenizer=sys.argv[2], sequence_length=32, workers=1)
    batches = iter(make_batches(Config(data=data), "train", batch_size=4))
    next(batches)
    print(multiprocessing.active_children()[0].pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_exit_when_the_run_is_killed(corpus, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED_RUN)
    done = subprocess.run(
        [sys.executable, str(script), corpus.path, corpus.tokenizer], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    status, until = Path(f"/proc/{int(done.stdout)}/stat"), time.monotonic() + 20
    while status.exists() and ") Z " not in status.read_text() and time.monotonic() < until:
        time.sleep(0.1)
    assert not status.exists() or ") Z " in status.read_text()


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_give_the_same_batches_and_positions(corpus, tmp_path, workers):
    """So a run can resume with another number of workers."""
    batches = make_batches(make_config(corpus, workers=workers), "train", batch_size=4, seed=1)
    original = iter(batches)
    take(original, 5)
    saved = read_positions(epath.Path(save_position(original, range(4), tmp_path / "position")))
    expected = take(original, 4)
    for again in (batches, make_batches(make_config(corpus), "train", batch_size=4, seed=1)):
        restored = iter(again)
        DataPosition(restored, range(4)).set_state(saved, 4)
        assert_equal_batches(take(restored, 4), expected)
    plain = iter(make_batches(make_config(corpus), "train", batch_size=4, seed=1))
    take(plain, 5)
    assert_equal_batches(take(plain, 4), expected)
