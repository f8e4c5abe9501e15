"""Files of a text or JSON lines corpus: which of them belong to a split, and which documents are held out."""

import dataclasses
import functools
import hashlib
import os
import re
import stat
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

import numpy as np
from etils import epath

from layerskip_jax.config import DataConfig
from layerskip_jax.data.cutting import CHARACTERS, Span, cut_text
from layerskip_jax.data.documents import VALIDATION_PERCENT
from layerskip_jax.errors import UserError, nearest
from layerskip_jax.locations import decode_text, is_remote, locate

HELD_OUT_NAMES = ("validation", "valid", "val", "dev", "eval", "test")
"""Names of the held-out split in the order in which they are taken; data.validation_split names another."""

SPLIT_NAME = re.compile(rf"(.*[-_. ])?(train|training|{'|'.join(HELD_OUT_NAMES)})([-_. ]?\d[\w.-]*)?", re.IGNORECASE)

NO_TEXT = re.compile(
    r"(readme|licen[cs]e|copying|notice|authors|changelog|contributing|citation|dataset_infos?)([-_.].*)?",
    re.IGNORECASE,
)
"""Files that describe a corpus. They are left out, unless the corpus has no others."""

COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".tar", ".tgz"}

HELD_OUT_PERCENT = (1, 20)
"""The least and the most of the text [percent] to hold out; `hold_out` enforces the least only if files were cut."""


class File(NamedTuple):
    """A file with its size [bytes] and modification time (ns; in a bucket s), which show that it has changed."""

    path: str
    size: int
    changed: int


class CorpusFiles(NamedTuple):
    """The files of a split, and ``names``, its entries in the folder.

    If the folder names no splits, the files are those of both, ``names`` is empty, and `hold_out` divides the
    documents.
    """

    files: list[File]
    names: list[str]
    left_out: list[str]
    """Entries of the folder that belong to neither split."""


def find_files(config: DataConfig, split: str, suffixes: tuple[str, ...]) -> CorpusFiles:
    """Return the files of ``split`` at ``config.path``; raises `UserError` if there is none.

    Entries of a folder with names such as train/, valid.txt or wiki.test.txt are the splits. Without a name for
    training, all that is not held out is for training.
    """
    root = locate(config.path)
    if not root.exists():
        others = [str(root.parent / other.name) for other in root.parent.iterdir()] if root.parent.is_dir() else []
        raise UserError(f"no corpus at {config.path} (data.path){nearest(str(root), others)}")
    is_other_split = split not in (config.train_split, config.validation_split)
    if is_other_split:
        config = dataclasses.replace(config, validation_split=split)
    entries, texts = _entries(root, suffixes) if root.is_dir() else ([], [])
    train, held_out, unused = _split_entries(texts, config)
    has_splits = bool(train or held_out)
    if is_other_split and not has_splits:
        raise UserError(f"{config.path} has no split {split!r}: put the files into a folder of that name")
    if not root.is_dir():
        return CorpusFiles(_walk(root, (), set(), _real(root.parent)), [], [])
    if not train:
        named = {*held_out, *unused}
        train = [entry for entry in texts if entry not in named]
    chosen = held_out if has_splits and split == config.validation_split else train
    seen, folder = {_real(root)}, _real(texts[0].parent) if texts else ""
    files = [file for entry in chosen for file in _walk(entry, suffixes, seen, folder)]
    if not files:
        kinds = f" ending in {' or '.join(suffixes)}" if suffixes else ""
        if not has_splits:
            raise UserError(f"no files{kinds} under {config.path} (data.path)")
        if chosen:
            listed = ", ".join(entry.name for entry in chosen)
            raise UserError(f"the {split!r} split of {config.path} has no text{kinds}: {listed:.200} is empty")
        there = train or held_out
        raise UserError(
            f"{config.path} has a {there[0].stem!r} split but no {split!r}: add it, name another in data.train_split "
            f"or data.validation_split, or hold out a part with --data.path {there[0]}; found: "
            f"{', '.join(entry.name for entry in _visible(root)):.200}"
        )
    used = {*train, *held_out}
    left_out = [entry.name for entry in entries if entry not in used]
    return CorpusFiles(files, [entry.name for entry in chosen] if has_splits else [], left_out)


def _entries(folder: epath.Path, suffixes: tuple[str, ...]) -> tuple[list[epath.Path], list[epath.Path]]:
    """Return the entries of a folder that can be text, and those of them that are no README or license.

    If a folder is the only entry, return its entries instead.
    """
    try:
        inner = _visible(folder)
    except PermissionError as error:
        raise UserError(f"cannot read {folder} (data.path): {error}") from error
    entries = [entry for entry in inner if not suffixes or _has_suffix(entry, suffixes) or entry.is_dir()]
    texts = [entry for entry in entries if not NO_TEXT.fullmatch(entry.name) or entry.is_dir()] or entries
    single = len(texts) == 1 and texts[0].is_dir() and not os.path.islink(texts[0])
    if single and not SPLIT_NAME.fullmatch(texts[0].name):
        return _entries(texts[0], suffixes)
    return entries, texts


def _split_entries(
    entries: list[epath.Path], config: DataConfig
) -> tuple[list[epath.Path], list[epath.Path], list[epath.Path]]:
    """Return the entries named after training, after the held-out split, and after a held-out split that is not used.

    A name with something in front of it, such as wiki.valid.txt, counts only if there is a wiki.train.txt:
    parser_test.go is no split.
    """
    named: dict[str, list[epath.Path]] = {}
    match_name = SPLIT_NAME.fullmatch
    matches = [(entry, match) for entry in entries if (match := match_name(entry.name) or match_name(entry.stem))]
    prefixes = {match[1] for _, match in matches if match[2].lower().startswith("train")} | {None}
    for entry, match in matches:
        if match[1] in prefixes:
            named.setdefault(match[2].lower(), []).append(entry)
    train = [entry for entry in entries if config.train_split in (entry.name, entry.stem)]
    if config.train_split == "train":
        train = named.get("train") or named.get("training") or []
    held_out = [entry for entry in entries if config.validation_split in (entry.name, entry.stem)]
    if config.validation_split == "validation":
        held_out = next((named[name] for name in HELD_OUT_NAMES if name in named), [])
    used = {*train, *held_out}
    unused = [entry for name in HELD_OUT_NAMES for entry in named.get(name, []) if entry not in used]
    return train, held_out, unused


def _has_suffix(entry: epath.Path, suffixes: tuple[str, ...]) -> bool:
    name = entry.stem if entry.suffix in COMPRESSED else entry.name
    return PurePath(name).suffix in suffixes


def _visible(folder: epath.Path) -> list[epath.Path]:
    return sorted((entry for entry in folder.iterdir() if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _real(path: epath.Path) -> str:
    return str(path) if is_remote(path) else os.path.realpath(path)


def _walk(path: epath.Path, suffixes: tuple[str, ...], seen: set[str], parent: str) -> list[File]:
    """Return the files under ``path`` that are not empty; a link to what has been ``seen`` is left out.

    ``parent`` is the real path of the folder of ``path``.
    """
    name = str(path)
    is_link = not is_remote(path) and os.path.islink(name)
    real = os.path.realpath(name) if is_link else os.path.join(parent, path.name)
    if real in seen:
        return []
    seen.add(real)
    is_folder, size, changed = _stat(path)
    if is_folder:
        return [file for entry in _visible(path) for file in _walk(entry, suffixes, seen, real)]
    if not size or (suffixes and not _has_suffix(path, suffixes)):
        return []
    if path.suffix in COMPRESSED:
        raise UserError(f"{path} is compressed, which cannot be read: unpack it and remove the {path.suffix} file")
    return [File(name, size, changed)]


def _stat(path: epath.Path) -> tuple[bool, int, int]:
    """Return whether ``path`` is a folder, its size (0 if it cannot be read) and its modification time.

    A corpus can have millions of files, so this makes one request.
    """
    if is_remote(path):
        remote = path.stat()
        return remote.is_directory, remote.length, int(remote.mtime or 0)
    try:
        local = os.stat(path)
    except OSError:
        return False, 0, 0
    return stat.S_ISDIR(local.st_mode), local.st_size, local.st_mtime_ns


def hold_out(
    names: Sequence[str], sizes: Sequence[int] | np.ndarray, config: DataConfig, split: str, cut: int = 0
) -> np.ndarray:
    """Return the indices of the documents of ``split``: about 5 % are held out.

    A document is held out if the SHA-256 of its name, modulo 100, is below `VALIDATION_PERCENT`. If the held-out
    documents have more than 20 % of the bytes, those with the largest remainders return to training. If they have less
    than 1 %, documents with the next remainders are added, except those that would exceed 20 %. If ``cut``, the number
    of files that were cut into documents, is 0, they are added only if none is held out, so that such a corpus keeps
    the split of earlier runs. Of two or more documents, at least one is in each split.
    """
    hashes = (hashlib.sha256(name.encode("utf-8", "surrogateescape")) for name in names)
    ranks = np.fromiter((int(name_hash.hexdigest(), 16) % 100 for name_hash in hashes), np.uint8, len(names))
    held_out = set(np.flatnonzero(ranks < VALIDATION_PERCENT).tolist())
    least, most = (int(np.sum(sizes)) * percent / 100 for percent in HELD_OUT_PERCENT)
    least *= bool(cut)
    held = sum(int(sizes[i]) for i in held_out)
    kept = held_out and least <= held <= most
    order = [] if kept else sorted(range(len(names)), key=lambda i: (ranks[i], names[i]))
    for i in reversed(order):
        if i in held_out and held > most:
            held_out.remove(i)
            held -= sizes[i]
    for i in order:
        if i not in held_out and (held < least or not held_out) and held + sizes[i] <= most:
            held_out.add(i)
            held += sizes[i]
    if not held_out and len(names) > 1:
        held_out = {min(order, key=lambda i: sizes[i])}
    is_held_out = np.zeros(len(names), bool)
    is_held_out[list(held_out)] = True
    return np.flatnonzero(is_held_out == (split != config.train_split))


@functools.lru_cache(maxsize=256)
def cut_file(file: File, has_splits: bool) -> list[Span]:
    """Return the spans [bytes] of the pieces of a text file.

    If the corpus names its splits, pieces have `CHARACTERS`. Otherwise some of them are held out, so pieces have a
    twentieth of the file, between 200 characters and `CHARACTERS`.
    """
    try:
        content = epath.Path(file.path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file.path}: {error}") from error
    text = decode_text(content, file.path)
    length = len(text) - text.count("\r\n")
    position, at, spans = len(content) - len(text.encode()), 0, []
    for start, end in cut_text(text, CHARACTERS if has_splits else min(CHARACTERS, max(200, length // 20))):
        first = position + len(text[at:start].encode())
        position, at = first + len(text[start:end].encode()), end
        spans.append((first, position))
    return spans
