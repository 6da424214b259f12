"""A web server on loopback that serves a folder as an object store does: ranged reads, latency, errors and stalls."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path


class Faults:
    """What the server does wrong from now on: `errors` and `stalls` are shares of the requests, `latency` and `stall` seconds.

    To whoever it is `unlisted` for it says of what is not there that it may not be read. `sent` are the bytes that it has sent.
    """

    def __init__(self) -> None:
        self.latency, self.errors, self.stalls, self.stall = 0.0, 0.0, 0.0, 3.0
        self.forbidden = self.unlisted = False
        self.requests, self.failed, self.random = itertools.count(), itertools.count(), random.Random(0)
        self.at_once, self.most_at_once, self.sent, self.lock = 0, 0, 0, threading.Lock()

    def enter(self, change: int) -> None:
        """One request more, or less, that is being answered."""
        with self.lock:
            self.at_once += change
            self.most_at_once = max(self.most_at_once, self.at_once)


@contextlib.contextmanager
def serve(root: Path) -> Iterator[tuple[str, Faults]]:
    """The address of the server and its faults."""
    faults = Faults()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(send=False)

        def do_GET(self) -> None:
            self._answer(send=True)

        def _answer(self, send: bool) -> None:
            next(faults.requests)
            faults.enter(1)
            time.sleep(faults.latency)
            faults.enter(-1)
            if faults.random.random() < faults.stalls:
                next(faults.failed)
                time.sleep(faults.stall)
            if faults.forbidden or faults.random.random() < faults.errors:
                next(faults.failed)
                return self._send(403 if faults.forbidden else 503, b"", send)
            path = root / self.path.strip("/")
            if faults.unlisted and not path.is_file():
                return self._send(403, b"", send)
            if path.is_dir():
                links = "".join(f'<a href="{n}">{n}</a>\n' for n in sorted(os.listdir(path)))
                return self._send(200, links.encode(), send, kind="text/html")
            if not path.is_file():
                return self._send(404, b"", send)
            size, wanted = path.stat().st_size, self.headers.get("Range")
            if wanted is None:
                return self._send(200, path.read_bytes(), send, tag=f"{size}-{path.stat().st_mtime_ns}")
            first, last = (int(x) for x in wanted.removeprefix("bytes=").split("-"))
            if first >= size:
                return self._send(416, b"", send)
            with open(path, "rb") as f:
                f.seek(first)
                return self._send(206, f.read(last - first + 1), send)

        def _send(self, status: int, body: bytes, send: bool, kind: str = "application/octet-stream", tag: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Accept-Ranges", "bytes")
            if tag:
                self.send_header("ETag", tag)
            self.end_headers()
            if send:
                with faults.lock:
                    faults.sent += len(body)
                self.wfile.write(body)

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 128

        def handle_error(self, request, address) -> None:  # clients that gave up a stalled request
            pass

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", faults
    finally:
        server.shutdown()
        server.server_close()
