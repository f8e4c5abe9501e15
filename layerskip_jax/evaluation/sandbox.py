"""Run generated Python in a separate process with an empty folder and limited time, memory and files.

On Linux it has no network, if the kernel permits that. This protects against accidents, not against attackers: for
that, run the whole evaluation in a container.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile

LAUNCHER = """
import ctypes, resource, sys
seconds, megabytes, nonce = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
sys.argv[1:] = []
NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000
if sys.platform == "linux":  # if the kernel permits it; otherwise the network stays reachable
    ctypes.CDLL(None).unshare(NEW_USER | NEW_NETWORK)
program = sys.stdin.read()
limits = {"CPU": seconds, "AS": megabytes << 20, "FSIZE": 1 << 20, "NOFILE": 32, "CORE": 0}
for name, limit in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
exec(compile(program, "<generated>", "exec"), {"__name__": "__main__"})
sys.__stdout__.write(nonce)  # reached only if the program ran to its end: an early exit is a failure
sys.__stdout__.flush()
"""


def runs_to_its_end(program: str, seconds: int = 10, megabytes: int = 512) -> bool:
    """Return whether ``program`` runs to its end without an exception, within ``seconds`` and ``megabytes``."""
    nonce = secrets.token_hex(16)
    # Files, not pipes: reading a pipe would wait for child processes that the program left running.
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as read, tempfile.TemporaryFile() as written:
        read.write(program.encode("utf-8", "replace"))
        read.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", LAUNCHER, str(seconds), str(megabytes), nonce],
            stdin=read,
            stdout=written,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder},
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=seconds)
        finally:  # also after Ctrl-C, which a session of its own does not receive
            with contextlib.suppress(ProcessLookupError):  # also the processes that it started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        written.seek(0)
        return written.read().endswith(nonce.encode())
