"""Files and folders: written whole or not at all, foreign entries ignored, links and unusual names followed."""

import errno
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath

from layerskip_jax.checkpoint.reading import open_model_folder
from layerskip_jax.checkpoint.run_folder import checkpoint_steps, find_checkpoint
from layerskip_jax.checkpoint.swept import store_swept
from layerskip_jax.commands import data as data_command
from layerskip_jax.commands.export import export_model
from layerskip_jax.commands.plots import Run, plot_run
from layerskip_jax.commands.report import write_report
from layerskip_jax.config import DataConfig
from layerskip_jax.data.pretokenize import pretokenize
from layerskip_jax.data.sources import open_documents
from layerskip_jax.errors import UserError, run_command
from layerskip_jax.locations import locate, write_file

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def run(trained_run, tmp_path):
    """A copy of the short run, in a folder with a space, non-ASCII characters and the special ones of patterns."""
    return Path(shutil.copytree(trained_run, tmp_path / "mein läuf [1e-3] 実験"))


def full_disk(monkeypatch, after=10):
    """Let every file take only ``after`` bytes, as on a full disk."""

    def write_bytes(path, content):
        with path.open("wb") as file:
            file.write(content[:after])
        raise FULL

    for kind in (Path, type(epath.Path("/"))):
        monkeypatch.setattr(kind, "write_bytes", write_bytes)
        monkeypatch.setattr(kind, "write_text", lambda path, text, **_: write_bytes(path, text.encode()))


WRITERS = {
    "tokenizer": lambda run, corpus: data_command.main(
        [
            *("tokenizer", "--overwrite", "--data.source", "text", "--data.path", corpus.path),
            *("--data.tokenizer", str(run / "tok.model"), "--model.vocab_size", "340"),
        ]
    ),
    "pretokenize": lambda run, corpus: pretokenize(corpus, str(run / "tokens")),
    "export": lambda run, corpus: export_model(str(run), str(run / "hf")),
    "sweep": lambda run, corpus: store_swept(str(run), {"exit_layer": 1}, {}),
    "plots": lambda run, corpus: plot_run(str(run)),
    "report": lambda run, corpus: write_report(str(run), ["def"], 2, 1),
}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_the_old_files_or_none(writer, run, corpus, monkeypatch):
    """One line names the file, and neither a file cut short nor a temporary one remains."""
    (run / "tok.model").write_text("the former one")
    before = contents(run)
    full_disk(monkeypatch)
    with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
        WRITERS[writer](run, corpus)
    assert contents(run) == before


@pytest.mark.parametrize("library", ["pretokenize", "export"])
def test_errors_of_libraries_about_the_disk_are_one_line(library, run, corpus, monkeypatch):
    """safetensors and array_record have their own errors for a full disk."""

    class SafetensorError(Exception):
        pass

    def fail(*_, **__):
        raise {"pretokenize": RuntimeError, "export": SafetensorError}[library]("I/O error: No space left on device")

    monkeypatch.setattr("layerskip_jax.data.pretokenize._write_split", fail)
    monkeypatch.setattr("layerskip_jax.commands.export.write_weights", fail)
    with pytest.raises(UserError, match=r"cannot write .*: I/O error: No space left on device"):
        WRITERS[library](run, corpus)
    assert not list(run.glob("*.partial"))


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_that_is_a_file_is_named(writer, run, corpus):
    for name in ("plots", "tok.model.d"):
        shutil.rmtree(run / name, ignore_errors=True)
        (run / name).write_text("not a folder")
    if writer == "sweep":  # the others read this file
        (run / "checkpoints" / "decode.json").mkdir()
    elsewhere = {
        "tokenizer": lambda: data_command.main(
            [
                *("tokenizer", "--data.source", "text", "--data.path", corpus.path, "--model.vocab_size", "340"),
                *("--data.tokenizer", str(run / "plots" / "tok.model")),
            ]
        ),
        "pretokenize": lambda: pretokenize(corpus, str(run / "plots" / "tokens")),
        "export": lambda: export_model(str(run), str(run / "plots" / "hf")),
    }
    with pytest.raises(UserError, match=r"cannot write .*(Not a directory|Is a directory|File exists)"):
        elsewhere.get(writer, lambda: WRITERS[writer](run, corpus))()


def test_a_file_that_is_a_link_stays_one_and_a_device_is_not_replaced(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_file(epath.Path(tmp_path / "link"), "neu: ü")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text(encoding="utf-8") == "neu: ü"
    with pytest.raises(UserError, match=r"cannot write /dev/full: No space left on device"):
        write_file(epath.Path("/dev/full"), b"x")
    assert Path("/dev/full").is_char_device()


def test_output_that_cannot_be_printed_is_one_line():
    code = "from layerskip_jax.commands.layerskip import run; run()"
    command = [sys.executable, "-c", code, "--help"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "error: [Errno 28] No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_errors_of_the_file_system_are_one_line(capsys):
    def main():
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/somewhere")

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: [Errno 30] Read-only file system: '/somewhere'\n"


FOREIGN = [
    "notes_20990101",
    "good_9",
    "20990101",
    "09",
    "\uff19\uff19",
    "-7",
    "99 (copy)",
    "99.bak",
    "checkpoint_99",
    "1e3",
]


@pytest.mark.parametrize("kind", ["folder", "file", "folder with files"])
def test_foreign_entries_among_checkpoints_are_ignored(kind, run):
    for name in FOREIGN:
        path = run / "checkpoints" / name
        if kind == "file":
            path.write_text("mine")
        else:
            path.mkdir()
        if kind == "folder with files":
            (path / "notes.txt").write_text("mine")
    assert checkpoint_steps(epath.Path(run / "checkpoints")) == [3]
    assert find_checkpoint(str(run)).name == "3"


def test_a_checkpoint_outside_a_run_has_no_plots(run, tmp_path):
    shutil.copytree(run / "checkpoints/3", tmp_path / "copied")
    with pytest.raises(UserError, match=r"copied is not in a run folder: give the run"):
        Run.open(str(tmp_path / "copied"))


def test_a_model_is_not_exported_to_a_bucket(run):
    with pytest.raises(UserError, match="export writes to a local disk, not to gs://bucket/model"):
        export_model(str(run), "gs://bucket/model")


def test_copies_of_data_positions_and_token_shards_are_ignored(run, corpus, tmp_path):
    from layerskip_jax.checkpoint.run_folder import read_data_positions

    batches = epath.Path(run / "checkpoints" / "3" / "batches")
    positions = read_data_positions(batches.parent)
    for file in list(batches.iterdir()):
        (batches / file.name.replace(".json", " (copy).json")).write_text("{}")
    assert read_data_positions(batches.parent) == positions

    folder = tmp_path / "tokens [1]"
    pretokenize(corpus, str(folder))
    tokens = DataConfig(source="tokens", path=str(folder), tokenizer=corpus.tokenizer)
    count = len(open_documents(tokens, "train"))
    shutil.copy(folder / "train" / "00000.array_record", folder / "train" / "00000 (copy).array_record")
    (folder / "train" / "._00000.array_record").write_bytes(b"metadata of a Mac")
    assert len(open_documents(tokens, "train")) == count


def test_links_in_a_corpus_are_followed_once(corpus, tmp_path):
    """A circle of links, a second name of a folder, a broken link and a pipe add no document."""
    folder = tmp_path / "Texte für später"
    shutil.copytree(corpus.path, folder / "v1")
    plain = DataConfig(source="text", path=str(folder))
    expected = sum(len(open_documents(plain, split)) for split in ("train", "validation"))
    (folder / "v1" / "around").symlink_to(folder)
    (folder / "latest").symlink_to(folder / "v1")
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe")
    (tmp_path / "link").symlink_to(folder)
    for path in (folder, tmp_path / "link"):
        found = DataConfig(source="text", path=str(path))
        assert sum(len(open_documents(found, split)) for split in ("train", "validation")) == expected


def test_the_owner_of_a_file_needs_no_name(run, tmp_path, monkeypatch):
    """In a container, files may belong to a user and a group that only the host knows."""
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    export_model(str(run), str(tmp_path / "hf"))
    assert open_model_folder(str(tmp_path / "hf")).config.model.num_layers == 4


def test_paths_that_cannot_exist_are_refused():
    for path in ("runs/\udcff", "runs/\0"):
        with pytest.raises(UserError, match="is not UTF-8, or has a null character"):
            locate(path)
