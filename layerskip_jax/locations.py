"""Where files are: on this machine, or in a bucket."""

import importlib.util
import os
import re

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from layerskip_jax.errors import UserError

BUCKET_LIBRARIES = ("gcsfs", "tensorflow")
"""Either of these lets `etils.epath` read and write gs://."""


def locate(path: str) -> epath.Path:
    """Return a path of this machine, absolute and with ``~`` expanded, or a gs:// one.

    Raises `UserError` for another scheme, which would become a local folder of that name, and for gs:// without a
    library that opens it.

    """
    scheme = re.match(r"[A-Za-z][\w+.-]+:/", path)
    if not scheme:
        return epath.Path(path).expanduser().resolve()
    if not path.startswith("gs://"):
        raise UserError(
            f"{path} is neither a path of this machine nor a gs:// one: buckets are written gs://BUCKET/..."
        )
    if not any(importlib.util.find_spec(library) for library in BUCKET_LIBRARIES):
        raise UserError(f"{path} needs gcsfs: pip install layerskip_jax[gcs]")
    return epath.Path(path)  # not resolved: that would put it into the working directory


def keep_compiled_programs(run_dir: str) -> None:
    """Let JAX keep what it compiles in ``RUN_DIR/compiled``, unless JAX_COMPILATION_CACHE_DIR names another place.

    So a run that is started again, or that `tpu/compile_ahead.py --store` was called for, need not compile. Not on CPU:
    there a program is for one kind of processor, and a run may go on on another.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(locate(run_dir) / "compiled"))
        compilation_cache.reset_cache()  # a program compiled before has settled that none is kept


def is_remote(path: epath.Path) -> bool:
    """Return whether ``path`` is in a bucket, where nothing can be appended to a file."""
    return str(path).startswith("gs://")
