"""Sources of documents: random access to the texts of a split, in each supported format.

A source has ``__len__`` and ``__getitem__``, which grain needs, and can be pickled into worker processes.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from etils import epath

from layerskip_jax.config import DataConfig
from layerskip_jax.data.documents import VALIDATION_PERCENT, Documents, Pair, as_text
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.errors import UserError, nearest
from layerskip_jax.locations import locate


def open_documents(config: DataConfig, split: str, prepare: bool = True) -> Documents:
    """Open ``split`` of the corpus that ``config`` names; raises `UserError` if it is missing or empty.

    Without ``prepare`` nothing is written: the folders in a checkpoint's config may be a stranger's choice.
    """
    if config.source == "python_stdlib" and not prepare and not (locate(config.data_dir) / "python_stdlib").exists():
        raise UserError(
            f"the corpus python_stdlib is not prepared in {config.data_dir}: layerskip data prepare "
            f"--data.data_dir {config.data_dir}"
        )
    openers = {
        "python_stdlib": _open_stdlib,
        "tfds": _open_tfds,
        "text": _open_text,
        "jsonl": _open_jsonl,
        "tokens": _open_tokens,
    }
    documents = openers[config.source](config, split)
    if len(documents) == 0:
        where = config.path or config.name or config.source
        raise UserError(f"the {split!r} split of {where} is empty: there is no document to read")
    return documents


class _Fields:
    """The text of each example, or its prompt and its text."""

    def __init__(self, examples: Sequence[Any], keys: Sequence[str]):
        self._examples, self._keys = examples, keys

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> str:
        example = self._examples[index]
        texts = [as_text(example[key], f"example {index}: the field {key!r}") for key in self._keys]
        return Pair(*texts) if len(texts) == 2 else texts[0]


def _keys(config: DataConfig) -> dict[str, str]:
    """Return ``{setting: field}`` of the fields that make a document, in their order."""
    prompt = {"data.prompt_key": config.prompt_key} if config.prompt_key else {}
    return prompt | {"data.text_key": config.text_key}


def _open_stdlib(config: DataConfig, split: str) -> Documents:
    import tensorflow_datasets as tfds

    from layerskip_jax.data.python_stdlib.python_stdlib_dataset_builder import Builder

    builder = Builder(data_dir=config.data_dir, file_format="array_record")
    tfds.disable_progress_bar()
    try:
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except FileExistsError:  # another process has prepared the dataset at the same time
        builder = Builder(data_dir=config.data_dir, file_format="array_record")
        if not builder.is_prepared():
            raise
    return _data_source(builder, config, split, {"data.text_key": "text"})


def _open_tfds(config: DataConfig, split: str) -> Documents:
    return _data_source(_tfds_builder(config), config, split, _keys(config))


def open_records(config: DataConfig, split: str) -> Sequence[Any]:
    """Open ``split`` of a TFDS dataset as examples with all their fields; raises `UserError` if it is missing."""
    return _records(_tfds_builder(config), config, split)


def _tfds_builder(config: DataConfig) -> Any:
    import tensorflow_datasets as tfds

    name, folder = config.name, locate(config.data_dir)
    try:
        builder = tfds.builder(name, data_dir=str(folder), try_gcs=False)
    except (tfds.core.DatasetNotFoundError, ValueError, ImportError) as error:
        known = [*tfds.list_builders(with_community_datasets=False), *_names_in(folder)]
        if name.split("/")[0].split(":")[0] in known:
            raise UserError(f"TFDS cannot open {name!r} in {folder}: {error}") from error
        raise UserError(f"TFDS knows no dataset {name!r}{nearest(name, known)}") from error
    if not builder.data_path.exists():
        raise UserError(
            f"the dataset {name!r} is not prepared in {folder}: prepare it as ArrayRecord on a machine with internet "
            f"access: tfds build {name} --data_dir {folder} --file_format array_record"
        )
    return builder


def _names_in(folder: epath.Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _records(builder: Any, config: DataConfig, split: str) -> Sequence[Any]:
    file_format = builder.info.file_format.value if builder.info.file_format else "tfrecord"
    if file_format != "array_record":
        raise UserError(
            f"{builder.info.full_name} in {config.data_dir} is stored as {file_format}, which cannot be read without "
            f"TensorFlow: prepare it again with tfds build {builder.info.full_name} --file_format array_record"
        )
    splits = list(builder.info.splits)
    if split.split("[")[0] not in splits:
        raise UserError(f"{builder.info.full_name} has no split {split!r}: it has {', '.join(splits) or 'none'}")
    return builder.as_data_source(split=split)


def _data_source(builder: Any, config: DataConfig, split: str, keys: dict[str, str]) -> Documents:
    records = _records(builder, config, split)
    for setting, key in keys.items():
        if key not in builder.info.features:
            raise UserError(
                f"{builder.info.full_name} has no field {key!r} ({setting}){nearest(key, builder.info.features)}: "
                f"it has {', '.join(builder.info.features)}"
            )
    return _Fields(records, list(keys.values()))


def _files(config: DataConfig, split: str, suffixes: tuple[str, ...]) -> tuple[list[epath.Path], bool]:
    """Return the files at ``config.path``, and whether they hold only ``split``, by a name such as train/."""
    root = locate(config.path)
    if not root.exists():
        others = [str(root.parent / other.name) for other in root.parent.iterdir()] if root.parent.is_dir() else []
        raise UserError(f"no corpus at {config.path} (data.path){nearest(str(root), others)}")
    if not root.is_dir():
        return [root], False
    paths = {name: _split_path(root, name, suffixes) for name in (split, config.train_split, config.validation_split)}
    if found := paths[split]:
        return _walk(found, suffixes), True
    if named := [(name, path) for name, path in paths.items() if path]:
        (name, path), entries = named[0], ", ".join(sorted(path.name for path in root.iterdir()))
        raise UserError(
            f"{config.path} has a {name!r} split but no {split!r}: add it, name another in data.train_split or "
            f"data.validation_split, or hold out a part of {name!r} with --data.path {path}; found: {entries:.200}"
        )
    files = _walk(root, suffixes)
    if not files:
        kinds = f" ending in {' or '.join(suffixes)}" if suffixes else ""
        raise UserError(f"no files{kinds} under {config.path} (data.path)")
    return files, False


def _split_path(root: epath.Path, split: str, suffixes: tuple[str, ...]) -> epath.Path | None:
    """Return the folder or file that is named after a split."""
    candidates = [root / split, *(root / f"{split}{suffix}" for suffix in suffixes or (".txt",))]
    return next((path for path in candidates if path.exists()), None)


def _walk(path: epath.Path, suffixes: tuple[str, ...]) -> list[epath.Path]:
    if not path.is_dir():
        return [path]
    inner = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    found = [file for entry in inner for file in _walk(entry, suffixes)]
    return [file for file in found if not suffixes or file.suffix in suffixes]


def _in_split(names: Sequence[str], split: str, config: DataConfig) -> list[int]:
    """Return the indices whose names hash into ``split``: about 5 % validation; of two or more names, at least one."""
    if split not in (config.train_split, config.validation_split):
        raise UserError(f"{config.path} has no split {split!r}: put the files into a folder of that name")
    ranks = [int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 for name in names]
    held_out = {i for i, rank in enumerate(ranks) if rank < VALIDATION_PERCENT}
    if len(names) >= 2 and not held_out:
        held_out = {min(range(len(names)), key=lambda i: (ranks[i], names[i]))}
    if len(names) >= 2 and len(held_out) == len(names):
        held_out.discard(max(range(len(names)), key=lambda i: (ranks[i], names[i])))
    wants_held_out = split == config.validation_split
    return [i for i in range(len(names)) if (i in held_out) == wants_held_out]


class _TextFiles:
    def __init__(self, paths: list[str]):
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> str:
        try:
            return epath.Path(self._paths[index]).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {self._paths[index]} as UTF-8 text: {error}") from error


def _open_text(config: DataConfig, split: str) -> Documents:
    files, own = _files(config, split, ())
    paths = [str(file) for file in files]
    if len(paths) == 1 and not own:
        return _Paragraphs(paths[0], split, config)
    root = str(locate(config.path))
    chosen = range(len(paths)) if own else _in_split([path.removeprefix(root) for path in paths], split, config)
    return _TextFiles([paths[i] for i in chosen])


class _Paragraphs:
    """A single file, cut at blank lines into documents of a few thousand characters."""

    def __init__(self, path: str, split: str, config: DataConfig, characters: int = 4000):
        text = _TextFiles([path])[0]
        pieces: list[str] = []
        for paragraph in text.split("\n\n"):
            if pieces and len(pieces[-1]) < characters:
                pieces[-1] += "\n\n" + paragraph
            else:
                pieces.append(paragraph)
        pieces = [piece for piece in pieces if piece.strip()]
        self._pieces = [pieces[i] for i in _in_split([str(i) for i in range(len(pieces))], split, config)]

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> str:
        return self._pieces[index]


class _JsonLines:
    """Lines of JSON files, found by their offsets and parsed on access."""

    def __init__(self, lines: list[tuple[str, int, int]], keys: dict[str, str]):
        self._lines, self._keys = lines, keys

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> str:
        path, number, offset = self._lines[index]
        with epath.Path(path).open("rb") as file:
            file.seek(offset)
            line = file.readline()
        texts: list[str] = []
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number} is not a JSON object: {error!r}") from error
        for setting, key in self._keys.items():
            try:
                value = record[key]
            except (KeyError, TypeError) as error:
                raise UserError(
                    f"{path} line {number} is not a JSON object with a text in {key!r} ({setting}): {error!r}"
                ) from error
            if not isinstance(value, str):
                raise UserError(f"{path} line {number}: {key!r} ({setting}) is not a string")
            texts.append(value)
        return Pair(*texts) if len(texts) == 2 else texts[0]


def _open_jsonl(config: DataConfig, split: str) -> Documents:
    files, own = _files(config, split, (".jsonl", ".json"))
    lines = []
    for file in files:
        offset = 0
        with file.open("rb") as opened:
            for number, line in enumerate(opened, 1):
                if line.strip():
                    lines.append((str(file), number, offset))
                offset += len(line)
    names = [f"{epath.Path(path).name}:{number}" for path, number, _ in lines]
    chosen = range(len(lines)) if own else _in_split(names, split, config)
    return _JsonLines([lines[i] for i in chosen], _keys(config))


METADATA = "metadata.json"


class _Tokens:
    def __init__(self, shards: list[str], dtype: str):
        self._records, self._dtype = grain.sources.ArrayRecordDataSource(shards), dtype

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.frombuffer(self._records[index], self._dtype).astype(np.int32)


def read_metadata(folder: epath.Path) -> dict[str, Any]:
    """Read the metadata of a pretokenized corpus (`layerskip_jax.data.pretokenize`)."""
    try:
        return json.loads((folder / METADATA).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"no pretokenized corpus at {folder} (data.path): make one with layerskip data pretokenize --out FOLDER"
        ) from error


def _open_tokens(config: DataConfig, split: str) -> Documents:
    folder = locate(config.path)
    metadata = read_metadata(folder)
    if metadata["tokenizer_sha256"] != load_tokenizer(config.tokenizer).fingerprint():
        raise UserError(
            f"{config.path} was made with another tokenizer than {config.tokenizer}: pretokenize it again, or set "
            "data.tokenizer to the one it was made with"
        )
    if split not in metadata["splits"]:
        raise UserError(f"{config.path} has no split {split!r}: it has {', '.join(metadata['splits'])}")
    shards, wanted = sorted(map(str, (folder / split).glob("*.array_record"))), metadata["splits"][split]["documents"]
    documents: Documents = _Tokens(shards, metadata["dtype"]) if shards else []
    if len(documents) != wanted:
        raise UserError(
            f"the {split!r} split of {config.path} has {len(documents)} documents in {len(shards)} shards, but "
            f"{wanted} were written: copy the whole folder again"
        )
    return documents
