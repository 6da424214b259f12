"""Work directories: local folders, or object stores such as ``gs://``, where nothing is appended to and nothing renamed."""

from __future__ import annotations

import io
import os
import threading
import uuid

import numpy as np
from etils import epath

# Read once, when gcsfs is first imported. Else it asks by gRPC before each request what kind of bucket it is, until it is told, which
# who reads without signing in never is. "true" in the environment is for zonal buckets, which are only read so.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


def is_remote(path: str | os.PathLike) -> bool:
    """Whether `path` lies in an object store."""
    return "://" in os.fspath(path)


def folder(path: str | os.PathLike) -> epath.Path:
    """`path` in full, whatever folder the process is in later."""
    return epath.Path(os.fspath(path) if is_remote(path) else os.path.abspath(path))


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file of which no reader ever sees a part; its folder is made."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.Path, content: bytes) -> None:
    """As `write_text`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):
        path.write_bytes(content)  # an object is there once it is whole
        return
    temporary = path.parent / f"{path.name}.{uuid.uuid4().hex}.tmp"  # machines that share a folder may have processes of one number
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- .npy -------------------------------------------------------------------------------------------------------------------

_HEADERS = threading.Lock()  # NumPy parses headers as Python, and CPython 3.11 takes those that threads parse together for damaged


def parse_npy(content: bytes | memoryview) -> np.ndarray:
    """The array in the content of a ``.npy`` file; what NumPy raises for what is none."""
    with _HEADERS:
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)


def map_npy(path: str | os.PathLike) -> np.ndarray:
    """The array in a ``.npy`` file, read as it is used; what NumPy raises for what is none."""
    with _HEADERS:
        return np.load(path, mmap_mode="r", allow_pickle=False)
