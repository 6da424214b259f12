"""Work directories: local folders, or object stores such as ``gs://``, where nothing is appended to and nothing renamed."""

from __future__ import annotations

import os

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
    temporary = path.parent / f"{path.name}.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
