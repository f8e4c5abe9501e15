"""Time from the start of ``decode.py`` to its first new token: ``python -m benchmarks.first_token RUN``.

Each figure is the median of several processes, and includes Python's start, the imports, reading the checkpoint and
compiling. "Warm" processes find their programs in a compilation cache of JAX, which one more process fills first.
"Cold" ones have no such cache, even if JAX_COMPILATION_CACHE_DIR is set.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial

from benchmarks.common import ROOT, called_in_turn, header
from layerskip_jax.command_line import add_run, make_parser, positive
from layerskip_jax.errors import UserError, run_command

PROMPT = "import os"


def seconds_to_first_token(run: str, cache: str = "") -> float:
    """Start ``decode.py`` and return the seconds until it has printed more than the prompt."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    if cache:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    began = time.perf_counter()
    command = [sys.executable, str(ROOT / "decode.py"), run, "--prompt", PROMPT, "--max_new_tokens", "64"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout
        printed = b""
        while len(printed) <= len(PROMPT) and (part := os.read(process.stdout.fileno(), 4096)):
            printed += part
        seconds = time.perf_counter() - began
        process.stdout.read()
    if process.returncode or len(printed) <= len(PROMPT):
        raise UserError(f"decode.py printed no token, and ended with status {process.returncode}")
    return seconds


def main() -> None:
    parser = make_parser(__doc__.split("\n")[0])
    add_run(parser)
    parser.add_argument("--repeats", metavar="N", type=positive, default=3, help="processes of each kind (default: 3)")
    options = parser.parse_known_options(None)
    header()
    with tempfile.TemporaryDirectory() as cache:
        seconds_to_first_token(options.run, cache)
        folders = {"cold": "", "warm": cache}
        calls = {name: partial(seconds_to_first_token, options.run, folder) for name, folder in folders.items()}
        for name, times in called_in_turn(calls, options.repeats, warm_up=0).items():
            print(f"{name}: {statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f})")


if __name__ == "__main__":
    run_command(main)
