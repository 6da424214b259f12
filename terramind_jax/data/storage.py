"""Byte ranges of shards: from local disks, or from a store that fsspec knows, with retries; tested are ``http``, ``gs``, ``s3`` and ``hf``.

A store is given by the URL of its root and travels to data workers as nothing but that.
"""

from __future__ import annotations

import functools
import os
import random
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

from terramind_jax.files import is_remote

_OPEN_FILES = 256  # TerraMesh has about 7,000 shards; more than a process may hold open
ATTEMPTS, FIRST_PAUSE, LONGEST_PAUSE = 8, 0.1, 10.0  # seconds; pauses double, and vary so that workers do not come back all at once
TIMEOUT = 30.0  # seconds without an answer after which a request is made again
KEPT = 256 << 20  # bytes of blocks that a process keeps of a store
BLOCKS_IN_USE = 10  # of each folder at most: a window of samples lies in five, and the next one is read ahead
_REQUEST = 1 << 20  # bytes that are sent in the time that a request takes besides
_EXTRAS = {"http": "http", "https": "http", "gs": "gcs", "s3": "s3"}  # of this package, by what a URL begins with
_SIGN_IN = {
    "gs": "gcloud auth application-default login",
    "s3": "aws configure, or set FSSPEC_S3_ANON=true for a public bucket",
    "hf": "hf auth login",
}


class Object(NamedTuple):
    """One file of a folder. `version` changes when its content does, as far as the store tells."""

    name: str
    size: int
    version: int


class _Descriptor:
    """An open file that closes itself when the last user lets go, so evicting one never cuts off a read in another thread."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "number") and os is not None:  # modules are already gone at interpreter exit
            os.close(self.number)


class LocalStore:
    """Folders of this machine."""

    def __init__(self) -> None:
        self._open = functools.lru_cache(_OPEN_FILES)(_Descriptor)

    def __reduce__(self):
        return LocalStore, ()

    def read(self, path: str, offset: int, size: int, block: int = 0) -> bytes:
        """At most `size` bytes from `offset`: fewer where the file ends. A disk needs no blocks."""
        opened = self._open(path)  # held until the read is over: another thread may evict it meanwhile
        return os.pread(opened.number, size, offset)

    def read_text(self, path: str) -> str | None:
        """A small file, None if there is none."""
        if not os.path.exists(path):
            return None
        with open(path, encoding="utf-8") as f:
            return f.read()

    def list(self, folder: str) -> list[Object] | None:
        """The files of a folder by name, None if there is no such folder."""
        if not os.path.isdir(folder):
            return None
        found = [(e.name, e.stat()) for e in os.scandir(folder) if e.is_file()]
        return sorted(Object(name, status.st_size, status.st_mtime_ns) for name, status in found)


class RemoteStore:
    """A store reached through fsspec. Requests that fail or stall are made again; what it refuses for good is an error at once."""

    def __init__(self, url: str) -> None:
        import fsspec  # loads slowly, and local data needs none of it

        self.url = url
        try:
            self._files, _ = fsspec.core.url_to_fs(url)
        except ImportError as error:
            extra = _EXTRAS.get(_scheme(url))
            remedy = f"pip install 'terramind-jax[{extra}]'" if extra else "install what is missing"
            raise ImportError(f"{url} cannot be read: {str(error).rstrip('.')}; {remedy}.") from error
        self._kept: OrderedDict[tuple[str, int, int], Future[bytes]] = OrderedDict()  # the last blocks that were asked for
        self._kept_bytes, self._lock = 0, threading.Lock()

    def __reduce__(self):
        return RemoteStore, (self.url,)

    def read(self, path: str, offset: int, size: int, block: int = 0) -> bytes:
        """At most `size` bytes from `offset`: fewer where the object ends.

        With a `block` the object is read in whole blocks of so many bytes, of which the last ones are kept, `KEPT` bytes together: for
        reads that lie near each other in place and time.
        """
        if not block:
            return self._fetch(path, offset, size)
        first, last = offset // block, (offset + max(size, 1) - 1) // block
        data = b"".join(self._read_block(path, number, block) for number in range(first, last + 1))
        return data[offset - first * block :][:size]

    def _read_block(self, path: str, number: int, block: int) -> bytes:
        """A block that another thread has begun to read is waited for."""
        key = path, number, block
        with self._lock:
            found, mine = self._kept.get(key), Future()
            if found is None:
                self._kept[key], self._kept_bytes = mine, self._kept_bytes + block
                while self._kept_bytes > KEPT and len(self._kept) > 1:
                    (*_, size), _ = self._kept.popitem(last=False)
                    self._kept_bytes -= size
            else:
                self._kept.move_to_end(key)
        if found is not None:
            return found.result()
        try:
            mine.set_result(self._fetch(path, number * block, block))
        except BaseException as error:
            with self._lock:  # the next one who asks tries again
                if self._kept.pop(key, None) is not None:
                    self._kept_bytes -= block
            mine.set_exception(error)
        return mine.result()

    def _fetch(self, path: str, offset: int, size: int) -> bytes:
        if not size:
            return b""
        try:
            data = self._call(path, "cat_file", path, start=offset, end=offset + size)
        except EOFError:
            return b""
        return data[offset : offset + size] if len(data) > size else data  # a server that ignores ranges sends everything

    def list(self, folder: str) -> list[Object] | None:
        """The files of a folder by name, None if there is no such folder."""
        try:
            found = self._call(folder, "ls", folder.rstrip("/") + "/" * folder.startswith("http"), detail=True)
        except FileNotFoundError:
            return None
        files = [f for f in found if f["type"] == "file" and f["name"].rstrip("/") != folder.rstrip("/")]
        return sorted(self._object(f) for f in files if f["name"].endswith(".tar"))

    def read_text(self, path: str) -> str | None:
        """A small object, None if there is none, or as `find` says."""
        try:
            return self._call(path, "cat_file", path).decode()
        except (FileNotFoundError, PermissionError):
            return None

    def _object(self, entry: dict[str, Any]) -> Object:
        if entry.get("size") is None:  # a listing of links tells no sizes
            entry = entry | self._call(entry["name"], "info", entry["name"])
        if entry.get("size") is None:
            raise OSError(f"{entry['name']} cannot be indexed: its server does not tell its size.")
        return Object(entry["name"].rsplit("/", 1)[-1], int(entry["size"]), _version(entry))

    def find(self, path: str, *, required: bool = False) -> Object | None:
        """One object, None if there is none. What may not be read is not there either, unless it is `required`: a PermissionError.

        For whoever may read a store but not list it is told the same of all that is not there.
        """
        try:
            return self._object(self._call(path, "info", path))
        except FileNotFoundError:
            return None
        except PermissionError:
            if required:
                raise
            return None

    def get(self, path: str, target: str) -> bool:
        """Copies an object to a local file, False if there is none."""
        try:
            self._call(path, "get_file", path, target, timeout=None)
        except FileNotFoundError:
            return False
        return True

    def put(self, source: str, path: str) -> bool:
        """Copies a local file into the store, False if it cannot be written to. Nor is the Hub, where that would be a commit."""
        if _scheme(path) == "hf":
            return False
        try:
            self._files.put_file(source, path)
        except Exception:  # read-only stores say so in many ways
            return False
        return True

    def _call(self, path: str, name: str, *arguments: Any, timeout: float | None = -1, **options: Any) -> Any:
        """Calls a method of the file system until it succeeds or has failed for good."""
        from fsspec.asyn import sync

        timeout = TIMEOUT if timeout == -1 else timeout

        def call() -> Any:
            if name in ("ls", "info"):  # others may have written since it was listed
                self._files.invalidate_cache(path)
            if getattr(self._files, "async_impl", False):
                return sync(self._files.loop, getattr(self._files, f"_{name}"), *arguments, timeout=timeout, **options)
            if name == "cat_file":
                options["cache_type"] = "none"  # such a file system opens a file for it, and would read ahead
            return getattr(self._files, name)(*arguments, **options)

        return with_retries(call, path)


def block_size(sample: float, window: int, readers: int) -> int:
    """Bytes that are best read at once where `window` neighbours of so many bytes each are visited together; 0: each by itself.

    A reader visits only one in `readers` of a window's samples, but its blocks, a quarter of a window each, hold them all.
    """
    block = max(int(window * sample / 4), 1)
    singly, in_blocks = window / readers * (_REQUEST + sample), 5 * (_REQUEST + block)
    return block if in_blocks < singly else 0


def with_retries(call: Callable[[], Any], path: str) -> Any:
    """Calls again, with growing pauses, what fails for a reason that may pass; a ConnectionError of one sentence if all attempts do.

    What will not pass is said at once: a FileNotFoundError, a PermissionError, or an EOFError for a range that begins behind the end.
    """
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except Exception as raised:
            # Of a web server and the Hub fsspec says that a file is not there whatever the answer was, which is then the cause.
            hidden = raised.__cause__ if isinstance(raised, FileNotFoundError) and path.startswith(("http", "hf:")) else None
            error = hidden or raised
            status = _status(error) or _status(error.__cause__)
            if isinstance(error, FileNotFoundError) or status == 404:
                raise FileNotFoundError(f"There is no {path}.") from error
            if status == 416:
                raise EOFError(f"{path} ends before the range that was asked for.") from error
            if isinstance(error, PermissionError) or status in (401, 403):
                sign_in = f"; sign in with: {_SIGN_IN[scheme]}" if (scheme := _scheme(path)) in _SIGN_IN else "."
                raise PermissionError(f"{path} may not be read with the credentials at hand ({_in_short(error)}){sign_in}") from error
            # An answer that was cut short is a ValueError, too, but of a kind of its own.
            of_use = isinstance(error, NotImplementedError | TypeError | AttributeError) or type(error) is ValueError
            if attempt == ATTEMPTS - 1 or of_use:
                tried = f"{attempt + 1} attempts failed, the last with " if attempt else ""
                raise ConnectionError(f"{path} cannot be read: {tried}{_in_short(error)}.") from error
        time.sleep(min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1))


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of the answer that an error of aiohttp, gcsfs, httpx or botocore tells of, None if there was none."""
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        return answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if type(error) is OSError and str(error).startswith("Forbidden"):  # as gcsfs says it
        return 403
    if type(error).__name__ == "NoCredentialsError":  # botocore did not even ask
        return 401
    return getattr(error, "status", None) or getattr(error, "code", None) or getattr(answer, "status_code", None)


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _scheme(url: str) -> str:
    return url.partition("://")[0]


def _version(entry: dict[str, Any]) -> int:
    names = ("ETag", "etag", "generation", "md5Hash", "blob_id", "mtime", "LastModified", "updated")
    return zlib.crc32(repr([str(entry[n]) for n in names if entry.get(n)]).encode())


def store(root: str | os.PathLike) -> LocalStore | RemoteStore:
    """The store that holds `root`."""
    return RemoteStore(os.fspath(root)) if is_remote(root) else LocalStore()


def join(*parts: str | os.PathLike) -> str:
    """A path in the store of its first part."""
    first = os.fspath(parts[0])
    return "/".join([first.rstrip("/"), *map(str, parts[1:])]) if is_remote(first) else os.path.join(*parts)
