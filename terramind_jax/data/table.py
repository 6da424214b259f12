"""One memory-mapped file of named arrays: whoever opens it shares the memory of all others that did."""

from __future__ import annotations

import json
import mmap
import os
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

_MAGIC = b"TMJAXTAB"
_ALIGN = 64


class Table(NamedTuple):
    """What a file holds: anything JSON can say, and arrays that are read as they are used."""

    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]


def write(path: str | os.PathLike, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Written under a temporary name and renamed, so that processes may race and no reader sees a part."""
    fields, end = {}, 0
    for name, array in arrays.items():
        fields[name] = [array.dtype.str, list(array.shape), end]
        end += -(-array.nbytes // _ALIGN) * _ALIGN
    header = json.dumps({"meta": meta, "fields": fields}).encode()
    header += b" " * (-(len(_MAGIC) + 8 + len(header)) % _ALIGN)
    temporary = f"{os.fspath(path)}.{os.getpid()}.{threading.get_ident()}.tmp"
    try:
        with open(temporary, "wb") as f:
            f.write(_MAGIC + len(header).to_bytes(8, "little") + header)
            for array in arrays.values():
                f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
                f.write(b"\0" * (-array.nbytes % _ALIGN))
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def read(path: str | os.PathLike) -> Table | None:
    """The table in a file, None if there is none or it is damaged."""
    try:
        with open(path, "rb") as f:
            start = f.read(len(_MAGIC) + 8)
            size = int.from_bytes(start[len(_MAGIC) :], "little")
            if start[: len(_MAGIC)] != _MAGIC or size > os.fstat(f.fileno()).st_size:
                return None
            header = json.loads(f.read(size))
            data = np.frombuffer(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        return Table(header["meta"], {name: _array(data[len(start) + size :], *field) for name, field in header["fields"].items()})
    except (OSError, ValueError, KeyError, TypeError):  # whatever the damage leads to
        return None


def _array(data: np.ndarray, dtype: str, shape: list[int], offset: int) -> np.ndarray:
    kind = np.dtype(dtype)
    return data[offset : offset + kind.itemsize * int(np.prod(shape))].view(kind).reshape(shape)
