"""Paths of local files and of files in Cloud Storage buckets, and the encoding of text files."""

import codecs
import contextlib
import fcntl
import functools
import importlib
import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from layerskip_jax.errors import UserError, bucket_error, disk_error

BUCKET_LIBRARIES = ("gcsfs", "tensorflow")
"""`etils.epath` needs one of these to read and write gs://."""


def locate(path: str) -> epath.Path:
    """Return an absolute local path with ``~`` expanded, or a gs:// path.

    Links are not followed. Raises `UserError` for a path with a null character or invalid UTF-8, for any other scheme,
    which would become a local folder of that name, and for gs:// without one of `BUCKET_LIBRARIES`.
    """
    scheme = re.match(r"[A-Za-z][\w+.-]+:/", path)
    if "\0" in path or path != path.encode(errors="replace").decode():
        raise UserError(f"the path {path!r} is not UTF-8, or has a null character: name another")
    if not scheme:
        return epath.Path(path).expanduser().resolve()
    if not path.startswith("gs://"):
        raise UserError(f"{path} is neither a local path nor a gs:// path: buckets are written gs://BUCKET/...")
    if not any(importlib.util.find_spec(library) for library in BUCKET_LIBRARIES):
        raise UserError(f"{path} needs gcsfs: pip install 'layerskip-jax[gcs]'")
    _configure_buckets()
    return epath.Path(path)  # not resolve(): it would make the gs:// path relative to the working directory


def decode_text(content: bytes, source: str) -> str:
    """Return UTF-8 text without its byte-order mark; raises `UserError` that names any other encoding of ``source``."""
    check_encoding(content[:4096], source)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {source} as UTF-8 text: {error}") from error


def check_encoding(beginning: bytes, source: str) -> None:
    """Raise `UserError` if ``source`` begins like UTF-16, UTF-32 or binary data, which may pass for UTF-8."""
    wide = beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))
    if wide or beginning.count(0) > len(beginning) / 8:
        raise UserError(
            f"cannot read {source} as UTF-8 text: it looks like UTF-16 or UTF-32, or it is no text; convert it with "
            "iconv -f UTF-16 -t UTF-8"
        )


def is_regular(path: epath.Path) -> bool:
    """Return whether ``path`` is a regular file. `epath` also accepts pipes and devices, on which a read can block."""
    return path.is_file() if is_remote(path) else os.path.isfile(path)


# `epath.Path.stat` fails for local files whose owner has no name, as in containers.
def file_size(file: epath.Path) -> int:
    """Return the size of a file [bytes]."""
    return file.stat().length if is_remote(file) else os.path.getsize(file)


def modified_time(file: epath.Path) -> int:
    """Return when a file was last changed [seconds]."""
    return file.stat().mtime if is_remote(file) else int(os.path.getmtime(file))


def read_limited(file: epath.Path, limit: int = 1 << 26) -> bytes:
    """Read a file from an untrusted source.

    Raises `FileNotFoundError` if it is not a file, and `OSError` if it has more than ``limit`` bytes.
    """
    if not is_remote(file) and not is_regular(file):
        raise FileNotFoundError("it is missing, or not a file")
    size = file_size(file)
    if size > limit:
        raise OSError(f"it has {size:,} bytes, more than {limit:,}")
    return file.read_bytes()


def keep_compiled_programs(run_dir: str) -> None:
    """Set JAX's compilation cache to ``RUN_DIR/compiled``, unless JAX_COMPILATION_CACHE_DIR is set.

    A resumed run, or one for which `tpu/compile_ahead.py --store` has compiled, then starts without compiling. Do not
    call this on CPU, where a program fits one kind of processor and the run may resume on another.
    """
    # Imported late: commands import this module before they parse their options.
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(locate(run_dir) / "compiled"))
        compilation_cache.reset_cache()  # JAX ignores the setting once it has compiled a program


@functools.cache
def _configure_buckets() -> None:
    """Configure gcsfs and TensorStore for long runs, unless the user's environment variables already do."""
    # TensorStore would wait forever for a silent connection. With these limits it drops the connection and retries.
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "60")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    if importlib.util.find_spec("gcsfs"):
        # gcsfs would keep listings of folders forever, although TensorStore and other processes write into them.
        settings = importlib.import_module("fsspec.config").conf
        settings.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    # gcsfs prints a traceback of each error that it then raises, and commands report the error in one line.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def is_remote(path: epath.Path) -> bool:
    """Return whether ``path`` is in a bucket, where files cannot be appended to."""
    return str(path).startswith("gs://")


def names_in(folder: epath.Path) -> list[str]:
    """Return the names in a folder, and none for a folder that cannot be listed; raises the errors of a bucket."""
    with contextlib.suppress(*((FileNotFoundError, NotADirectoryError) if is_remote(folder) else (OSError,))):
        return [entry.name for entry in folder.iterdir()]
    return []


def write_file(path: epath.Path, content: bytes | str) -> None:
    """Write a file atomically: under a temporary name, which is then renamed; raises `UserError` if that fails.

    If ``path`` is a link, this replaces the file that it points to. Devices, pipes and objects in a bucket are written
    directly; an object appears only when it is complete.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        if is_remote(path):
            path.write_bytes(data)
            return
        file = Path(os.path.realpath(path))
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and not file.is_file():
            file.write_bytes(data)
            return
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        try:
            partial.write_bytes(data)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    except Exception as error:
        if not isinstance(error, OSError) and bucket_error(error) is None:
            raise
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


@contextlib.contextmanager
def folder_lock(folder: epath.Path, wait: bool) -> Iterator[bool]:
    """Hold an exclusive lock on a local ``folder`` of this machine, and yield True.

    If another process holds it, wait (with ``wait``) or yield False. In a bucket, or on a file system that has no
    locks, yield True without a lock.
    """
    handle, held = -1, True
    try:
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
        try:
            if handle >= 0:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
        except OSError:
            pass  # no locks here
        yield held
    finally:
        if handle >= 0:
            os.close(handle)


@contextlib.contextmanager
def new_folder(target: epath.Path) -> Iterator[epath.Path]:
    """Yield ``TARGET.partial``, an empty folder that is renamed to ``target`` once the block ends without an error.

    After an error it is removed, so that it does not fill the disk. Raises `UserError` if the disk refuses a write.
    """
    partial = target.parent / f"{target.name}.partial"
    try:
        if partial.exists():
            partial.rmtree()
        partial.mkdir(parents=True)
        yield partial
        partial.rename(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.rmtree()
        if isinstance(error, OSError) or disk_error(error):
            raise UserError(f"cannot write {target}: {error}") from error
        raise


def file_inside(folder: epath.Path, name: str) -> epath.Path:
    """Return the file ``name`` of a model folder, whether it exists or not; raises `UserError` if it is elsewhere.

    A name such as ``../x`` leads out of the folder, and so does a link, except into the ``blobs`` of the cache of
    huggingface_hub: there, the files of a snapshot are links to ``../../blobs``.
    """
    if is_remote(folder):
        if ".." in name.split("/") or name.startswith("/"):
            raise UserError(f"{folder} names the file {name!r:.80}, which is not in the folder")
        return folder / name
    try:
        root, real = Path(folder).resolve(), (Path(folder) / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links
        raise UserError(f"{folder} names the file {name!r:.80}, which is not a valid path: {error}") from error
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    cached = real.parent.name == "blobs" and (real.parent == blobs or real.parent.parent.name.startswith("models--"))
    if not cached and not real.is_relative_to(root):
        raise UserError(
            f"{name!r:.80} in {folder} leads out of the folder, to {real}: only files in the folder are read; copy the "
            "file there if you trust it"
        )
    return folder / name
