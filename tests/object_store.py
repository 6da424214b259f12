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

    To whoever it is `unlisted` for it says of what is not there that it may not be read. Where it is `writable` it takes files, if such a
    server does at all. `sent` are the bytes that it has sent.
    """

    def __init__(self) -> None:
        self.latency, self.errors, self.stalls, self.stall = 0.0, 0.0, 0.0, 3.0
        self.forbidden = self.unlisted = self.writable = False
        self.requests, self.failed, self.random = itertools.count(), itertools.count(), random.Random(0)
        self.at_once, self.most_at_once, self.sent, self.lock = 0, 0, 0, threading.Lock()

    def enter(self, change: int) -> None:
        """One request more, or less, that is being answered."""
        with self.lock:
            self.at_once += change
            self.most_at_once = max(self.most_at_once, self.at_once)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as a web server does, with files and pages of links; subclasses speak as other stores do."""

    root: Path
    faults: Faults
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else an answer's body waits for the client to confirm its header

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        faults = self.faults
        next(faults.requests)
        faults.enter(1)
        time.sleep(faults.latency)
        faults.enter(-1)
        if faults.random.random() < faults.stalls:
            next(faults.failed)
            time.sleep(faults.stall)
        if faults.forbidden or faults.random.random() < faults.errors:
            next(faults.failed)
            return self.refuse(403 if faults.forbidden else 503)
        self.answer()

    do_HEAD = do_GET

    def answer(self) -> None:
        path = self.root / self.path.strip("/")
        if path.is_dir() and not self.faults.unlisted:
            links = "".join(f'<a href="{n}">{n}</a>\n' for n in sorted(os.listdir(path)))
            self.send(200, links.encode(), {"Content-Type": "text/html"})
        elif path.is_file():
            self.send_file(path)
        else:
            self.refuse_missing()

    def refuse_missing(self) -> None:
        self.refuse(403 if self.faults.unlisted else 404)

    def refuse(self, status: int) -> None:
        self.send(status)

    def send_file(self, path: Path) -> None:
        """The file, or the range of it that is asked for."""
        status = path.stat()
        size, wanted, tag = status.st_size, self.headers.get("Range"), {"ETag": f'"{status.st_size}-{status.st_mtime_ns}"'}
        if wanted is None:
            return self.send(200, path.read_bytes(), tag)
        first, last = (int(x) for x in wanted.removeprefix("bytes=").split("-"))
        if first >= size:
            return self.refuse(416)
        with open(path, "rb") as f:
            f.seek(first)
            self.send(206, f.read(last - first + 1))

    def send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            with self.faults.lock:
                self.faults.sent += len(body)
            self.wfile.write(body)


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request, address) -> None:  # clients that gave up a stalled request
        pass


@contextlib.contextmanager
def serve(root: Path, handler: type[Handler] = Handler) -> Iterator[tuple[str, Faults]]:
    """The address of the server and its faults."""
    faults = Faults()
    server = _Server(("127.0.0.1", 0), type(handler.__name__, (handler,), {"root": root, "faults": faults}))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", faults
    finally:
        server.shutdown()
        server.server_close()
