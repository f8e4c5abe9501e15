"""Sources of documents: random access to the texts of a split, in each supported format.

A source has ``__len__`` and ``__getitem__``, which grain needs, and can be pickled into worker processes.
"""

import codecs
import contextlib
import functools
import json
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from etils import epath

from layerskip_jax.config import DataConfig
from layerskip_jax.data.corpus_files import CorpusFiles, File, cut_file, find_files, hold_out
from layerskip_jax.data.documents import Documents, MixedDocuments, Pair, as_text
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.errors import UserError, bucket_error, nearest
from layerskip_jax.locations import check_encoding, decode_text, locate, names_in
from layerskip_jax.mixture import LOCATIONS, mixture_shares

CUT_BELOW_FILES = 10
"""A text file with more than a tenth (1 / `CUT_BELOW_FILES`) of the bytes of the files that were found is cut into
documents. Documents are held out whole, so one large file could otherwise be all of the held-out text."""


def open_documents(config: DataConfig, split: str, prepare: bool = True) -> Documents:
    """Open ``split`` of the corpus that ``config`` names; raises `UserError` if it is missing or empty.

    Without ``prepare`` nothing is written: the folders in a checkpoint's config may be a stranger's choice.
    """
    if config.mixture:
        parts = {name: _open_component(name, data, split, prepare) for name, data in config.components.items()}
        return MixedDocuments(parts, mixture_shares(config.mixture))
    if prepare:
        check_place(config)
    openers: dict[str, Callable[[DataConfig, str], Documents]] = {
        "python_stdlib": functools.partial(_open_stdlib, prepare=prepare),
        "tfds": _open_tfds,
        "text": _open_text,
        "jsonl": _open_jsonl,
        "tokens": _open_tokens,
    }
    documents = openers[config.source](config, split)
    if len(documents) == 0:
        where = config.path or config.name or config.source
        hints = {
            "text": ": two files or about 400 characters are needed to hold a part out",
            "jsonl": ": the corpus needs at least two lines, so that one can be held out",
        }
        hint = hints.get(config.source, "")
        raise UserError(f"the {split!r} split of {where} is empty: there is no document to read{hint}")
    return documents


def check_place(config: DataConfig) -> None:
    """Raise `UserError` if ``name`` or ``path`` is set and the source does not read it: the user then expects another
    corpus. Do not call it for a stored config, whose corpus has been read without them."""
    for location, source in (("name", "tfds"), ("path", "text")):
        value = getattr(config, location)
        if value and location != LOCATIONS[config.source]:
            raise UserError(
                f"data.source {config.source} does not read data.{location} {value}: set --data.{location} '', or "
                f"--data.source {source}"
            )


def _open_component(name: str, config: DataConfig, split: str, prepare: bool) -> Documents:
    try:
        return open_documents(config, split, prepare)
    except UserError as error:
        line = str(error).replace("--data.path ", f"WEIGHT={config.source}:")
        raise UserError(f"data.mixture {name}: {line}") from error


def open_splits(config: DataConfig) -> tuple[Documents, Documents]:
    """Open the training split and the held-out split, see `open_documents`."""
    return open_documents(config, config.train_split), open_documents(config, config.validation_split)


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


def _stdlib_builder(config: DataConfig) -> Any:
    from layerskip_jax.data.python_stdlib.python_stdlib_dataset_builder import Builder

    return Builder(data_dir=str(locate(config.data_dir)), file_format="array_record")


def _open_stdlib(config: DataConfig, split: str, prepare: bool) -> Documents:
    import tensorflow_datasets as tfds

    builder = _stdlib_builder(config)
    if not prepare and not builder.is_prepared():
        raise UserError(
            f"the corpus {builder.name}/{builder.builder_config.name} is not prepared in {config.data_dir}: use the "
            f"Python that trained the run, or prepare this one's: layerskip data prepare --data.data_dir "
            f"{config.data_dir}"
        )
    tfds.disable_progress_bar()
    try:
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except FileExistsError:  # another process has prepared the dataset at the same time
        builder = _stdlib_builder(config)
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
        known = [*tfds.list_builders(with_community_datasets=False), *names_in(folder)]
        if name.split("/")[0].split(":")[0] in known:
            raise UserError(f"TFDS cannot open {name!r} in {folder}: {error}") from error
        raise UserError(f"TFDS knows no dataset {name!r}{nearest(name, known)}") from error
    if not builder.data_path.exists():
        raise UserError(
            f"the dataset {name!r} is not prepared in {folder}: prepare it as ArrayRecord on a machine with internet "
            f"access: tfds build {name} --data_dir {folder} --file_format array_record"
        )
    return builder


def _records(builder: Any, config: DataConfig, split: str) -> Sequence[Any]:
    import tensorflow_datasets as tfds

    # If a dataset's builder is Python code, TFDS stores the alternative formats that it finds on disk only in
    # `info.as_proto`, not in the attributes of `info`.
    proto, readable = builder.info.as_proto, tfds.core.FileFormat.with_random_access()
    stored = [proto.file_format or "tfrecord", *proto.alternative_file_formats]
    found = [file_format for name in stored for file_format in readable if file_format.value == name]
    if not found:
        raise UserError(
            f"{builder.info.full_name} in {config.data_dir} is stored as {', '.join(stored)}, which cannot be read "
            f"without TensorFlow: prepare it again with tfds build {builder.info.full_name} --file_format array_record"
        )
    if builder.info.file_format != found[0]:
        builder.info.set_file_format(found[0], override=True, override_if_initialized=True)
    splits = list(builder.info.splits)
    if split.split("[")[0] not in splits:
        raise UserError(f"{builder.info.full_name} has no split {split!r}: it has {', '.join(splits) or 'none'}")
    try:
        return builder.as_data_source(split=split)
    except ValueError as error:  # a part such as train[:90 or train[:200%]
        raise UserError(f"{builder.info.full_name} cannot be split by {split!r}: {error}") from error


def _data_source(builder: Any, config: DataConfig, split: str, keys: dict[str, str]) -> Documents:
    records = _records(builder, config, split)
    for setting, key in keys.items():
        if key not in builder.info.features:
            raise UserError(
                f"{builder.info.full_name} has no field {key!r} ({setting}){nearest(key, builder.info.features)}: "
                f"it has {', '.join(builder.info.features)}"
            )
    return _Fields(records, list(keys.values()))


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """Open a file of the corpus to read bytes; raises `UserError` if it cannot be read."""
    try:
        with epath.Path(path).open("rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error


class _Texts:
    """Text files or pieces of them, as ``(path, first byte, end)``; the end None is that of the file."""

    def __init__(self, pieces: list[tuple[str, int, int | None]], sizes: list[int], files: CorpusFiles, cut: int):
        self._pieces, self.sizes, self.files, self.cut = pieces, sizes, files, cut

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> str:
        path, start, end = self._pieces[index]
        with _opened(path) as file:
            file.seek(start)
            content = file.read(-1 if end is None else end - start)
        return decode_text(content, path)


def _open_text(config: DataConfig, split: str) -> Documents:
    found = find_files(config, split, ())
    total, root, cut = sum(file.size for file in found.files), str(locate(config.path)), 0
    pieces: list[tuple[str, int, int | None]] = []
    names, sizes = [], []
    for file in found.files:
        name = file.path.removeprefix(root) if len(found.files) > 1 else ""
        if file.size * CUT_BELOW_FILES <= total:
            pieces.append((file.path, 0, None))
            names.append(name)
            sizes.append(file.size)
            continue
        spans = cut_file(file, bool(found.names))
        cut += len(spans) > 1
        pieces += [(file.path, start, end) for start, end in spans]
        names += [f"{name}:{number}" if name else str(number) for number in range(len(spans))]
        sizes += [end - start for start, end in spans]
    chosen = range(len(pieces)) if found.names else hold_out(names, sizes, config, split, cut)
    return _Texts([pieces[i] for i in chosen], [sizes[i] for i in chosen], found, cut)


LINE = np.dtype([("file", np.int32), ("number", np.int32), ("offset", np.int64), ("size", np.int64)])
"""Where a line of JSON is: index of the file, number of the line from 1, first byte, bytes. 10 million take 240 MB."""


class _JsonLines:
    """Lines of JSON files, found by their offsets and parsed on access."""

    cut = 0

    def __init__(self, lines: np.ndarray, keys: dict[str, str], files: CorpusFiles):
        self._lines, self._keys, self.files = lines, keys, files
        self.sizes = lines["size"]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> str:
        file_index, number, offset, size = self._lines[index].item()
        path = self.files.files[file_index].path
        with _opened(path) as file:
            file.seek(offset)
            line = file.read(size)
        texts: list[str] = []
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
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


class _LineNames(Sequence[str]):
    """The names by which lines are held out, such as ``part-0.jsonl:12``; 10 million in a list would take 0.7 GB."""

    def __init__(self, files: list[File], lines: np.ndarray):
        self._files = [os.path.basename(file.path) for file in files]
        self._lines = lines[["file", "number"]]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: Any) -> Any:
        file_index, number = self._lines[index].item()
        return f"{self._files[file_index]}:{number}"


@functools.lru_cache(maxsize=1 << 16)  # with less, both splits would read every file of a larger corpus
def _find_lines(file: File) -> np.ndarray:
    """Return the lines of a JSON lines file that are not blank, with any line end: JSON text contains no raw CR."""
    numbers, offsets, sizes = array("i"), array("q"), array("q")
    offset, number = 0, 0
    with _opened(file.path) as opened:
        for line in opened:
            if not offset:
                check_encoding(line[:4096], file.path)
            for part in line.rstrip(b"\r\n").split(b"\r"):
                number += 1
                if part.strip().removeprefix(codecs.BOM_UTF8):
                    numbers.append(number)
                    offsets.append(offset)
                    sizes.append(len(part))
                offset += len(part) + 1
            offset += len(line) - len(line.rstrip(b"\r\n")) - 1
    lines = np.zeros(len(numbers), LINE)
    lines["number"], lines["offset"], lines["size"] = numbers, offsets, sizes
    return lines


def _open_jsonl(config: DataConfig, split: str) -> Documents:
    found = find_files(config, split, (".jsonl", ".json"))
    parts = [_find_lines(file) for file in found.files]
    lines = np.concatenate([np.zeros(0, LINE), *parts])
    lines["file"] = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    if not found.names:
        lines = lines[hold_out(_LineNames(found.files, lines), lines["size"], config, split)]
    return _JsonLines(lines, _keys(config), found)


METADATA = "metadata.json"


class _Tokens:
    """Documents that `layerskip_jax.data.pretokenize` wrote; ``tokens`` counts their tokens."""

    def __init__(self, shards: list[str], dtype: str, tokens: int):
        self._records, self._dtype, self.tokens = grain.sources.ArrayRecordDataSource(shards), dtype, tokens

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.frombuffer(self._records[index], self._dtype).astype(np.int32)


def read_metadata(folder: epath.Path) -> dict[str, Any]:
    """Read the metadata of a pretokenized corpus (`layerskip_jax.data.pretokenize`)."""
    try:
        metadata = json.loads((folder / METADATA).read_bytes())
        counts = [part[name] for part in metadata["splits"].values() for name in ("documents", "tokens")]
        np.dtype(metadata["dtype"])
        if isinstance(metadata["tokenizer_sha256"], str) and all(isinstance(count, int) for count in counts):
            return metadata
        error: Exception = ValueError("it is another program's metadata")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as caught:
        if bucket_error(caught):
            raise
        error = caught
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
    found = [name for name in names_in(folder / split) if re.fullmatch(r"\d+\.array_record", name)]
    shards, counts = [str(folder / split / name) for name in sorted(found)], metadata["splits"][split]
    wanted = counts["documents"]
    documents: Documents = _Tokens(shards, metadata["dtype"], counts["tokens"]) if shards else []
    if len(documents) != wanted:
        raise UserError(
            f"the {split!r} split of {config.path} has {len(documents)} documents in {len(shards)} shards, but "
            f"{wanted} were written: copy the whole folder again"
        )
    return documents
