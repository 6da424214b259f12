"""Where the members of a tar lie, from its headers alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from terramind_jax.data.errors import DataError

Read = Callable[[int, int], bytes]  # (offset, size) -> at most so many bytes

BLOCK = 512  # bytes of a header, which lies right before its member
_NAME = 100  # of which the name takes so many at most


def scan_tar(path: str | os.PathLike) -> Iterator[tuple[str, int, int]]:
    """(member name, offset, size) of every regular file in a local tar, in order, from its headers alone.

    Understands ustar, GNU long names and pax headers. Raises `DataError` for a tar that is truncated or damaged.
    """
    with open(path, "rb", buffering=0) as f:
        yield from scan(path, lambda offset, size: os.pread(f.fileno(), size, offset), os.fstat(f.fileno()).st_size)


def scan(path: str | os.PathLike, read: Read, end: int) -> Iterator[tuple[str, int, int]]:
    """As `scan_tar`, of a tar of `end` bytes that `read` reads."""
    offset, override = 0, {}
    while True:
        header = read(offset, BLOCK)
        if len(header) < BLOCK:
            raise DataError(f"{path} is truncated: it ends at byte {end} without the end mark of a tar; delete it or copy it again.")
        if not any(header):
            return
        name, size, kind = _parse_header(header, path, offset)
        size = _size(override["size"], path) if "size" in override and kind not in b"xgLK" else size
        start = offset + BLOCK
        if start + size > end:
            raise DataError(
                f"{path} is truncated: member {override.get('path', name)!r} needs {start + size} bytes and the file has {end}; "
                "delete it or copy it again."
            )
        if kind in b"xL":
            override |= _extended(read(start, size), kind)
        elif kind not in b"gK":
            if kind in b"0\0":
                yield override.get("path", name), start, size
            override = {}
        offset = start + -(-size // BLOCK) * BLOCK


def is_header_of(header: bytes, name: bytes) -> bool:
    """Whether a header may be that of a member whose path ends with `name`: a name that it had to cut or recode is not held against it."""
    stored = bytes(header[:_NAME]).split(b"\0")[0]
    return len(stored) == _NAME or not name.isascii() or stored.rsplit(b"/", 1)[-1] == name


def _parse_header(header: bytes, path: str | os.PathLike, offset: int) -> tuple[str, int, bytes]:
    checksum = sum(header) - sum(header[148:156]) + 8 * 32
    try:
        stored, size = _number(header[148:156]), _number(header[124:136])
    except ValueError:
        stored, size = -1, 0
    if stored != checksum or size < 0:
        raise DataError(f"{path} is damaged: there is no tar header at byte {offset}; delete it or copy it again.")
    name = header[:_NAME].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" * bool(prefix) + name).decode("utf-8", "surrogateescape"), size, header[156:157]


def _number(field: bytes) -> int:
    """Octal text, or GNU's base 256 for sizes beyond 8 GiB."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0")[0].strip() or b"0", 8)


def _size(text: str, path: str | os.PathLike) -> int:
    """A size that a pax header gives."""
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise DataError(f"{path} is damaged: it gives a member the size {text[:20]!r}; delete it or copy it again.")
    return int(text)


def _extended(data: bytes, kind: bytes) -> dict[str, str]:
    """What a GNU long name or a pax header says of the next member."""
    if kind == b"L":
        return {"path": data.split(b"\0")[0].decode("utf-8", "surrogateescape")}
    records = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or len(length) > 19 or int(length) <= len(length):
            return records  # what follows is no record; a wrong name or size shows at the next header
        record, data = data[len(length) + 1 : int(length) - 1], data[int(length) :]
        name, _, value = record.partition(b"=")
        records[name.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
    return records
