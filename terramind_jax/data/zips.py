"""Where the members of an uncompressed zip lie, so that reading one of its arrays later needs neither its directory nor a library."""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from typing import NamedTuple

from zlib_ng.zlib_ng import crc32  # more than ten times as fast as the standard library's

from terramind_jax.data.tars import Read

_END = struct.Struct("<4s4xHHIIH")  # end of the central directory: signature, entries here, entries, size, offset, comment
_ENTRY = struct.Struct("<4s4xHH4xIIIHHH8xI")  # of the directory: signature, flags, method, CRC, sizes, lengths, offset
_LOCAL = struct.Struct("<4s2xHH4xIIIHH")  # before each member: signature, flags, method, CRC, sizes, lengths
_TAIL = 4096  # holds the directory of a sample


class Member(NamedTuple):
    """One member: its header begins at `offset` and what follows it at `end`."""

    offset: int
    end: int
    plain: bool  # stored as it is, with its size in the header before it


def directory(read: Read, size: int) -> dict[str, Member]:
    """The members of a zip of `size` bytes, by name; empty if it is none."""
    start = max(size - _TAIL, 0)
    tail = read(start, size - start)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        return {}
    _, _, _, length, offset, _ = _END.unpack_from(tail, at)
    if offset + length > size:
        return {}
    data = tail[offset - start :] if offset >= start else read(offset, length)
    return _members(data, length, offset)


def _members(data: bytes, length: int, end: int) -> dict[str, Member]:
    found, at = [], 0
    while at + _ENTRY.size <= min(length, len(data)):
        signature, flags, method, _, packed, unpacked, name, extra, comment, offset = _ENTRY.unpack_from(data, at)
        if signature != b"PK\1\2":
            return {}
        plain = method == 0 and not flags & 0x09 and packed == unpacked < 0xFFFFFFFF
        found.append((offset, data[at + _ENTRY.size : at + _ENTRY.size + name].decode("utf-8", "replace"), plain))
        at += _ENTRY.size + name + extra + comment
    found.sort()
    ends = [offset for offset, *_ in found[1:]] + [end]
    return {name: Member(offset, stop, plain) for (offset, name, plain), stop in zip(found, ends, strict=True)}


def content(read: Read, member: Member) -> bytes | None:
    """The bytes of one plain member; None where they are not what its header says."""
    return next(iter(split(read(member.offset, member.end - member.offset)).values()), None) if member.plain else None


def span(members: Mapping[str, Member], names: Collection[str]) -> tuple[int, int]:
    """(offset, size) of the piece that holds `names` and hardly anything else; size 0 if there is none."""
    wanted = [members[name] for name in names]
    if not wanted or not all(m.plain for m in wanted):
        return 0, 0
    start, end = min(m.offset for m in wanted), max(m.end for m in wanted)
    return (start, end - start) if end - start <= 1.25 * sum(m.end - m.offset for m in wanted) + 4096 else (0, 0)


def split(piece: bytes | memoryview) -> dict[str, memoryview]:
    """The members of a piece that begins where a member does. One whose checksum does not agree is a ValueError."""
    view, found, at = memoryview(piece), {}, 0
    while at + _LOCAL.size <= len(piece):
        signature, _, _, checksum, size, _, name, extra = _LOCAL.unpack_from(piece, at)
        start = at + _LOCAL.size + name + extra
        if signature != b"PK\3\4" or start + size > len(piece):
            break
        member = view[start : start + size]
        key = bytes(view[at + _LOCAL.size : at + _LOCAL.size + name]).decode("utf-8", "replace")
        if crc32(member) != checksum:
            raise ValueError(f"the checksum of {key!r} does not agree")
        found[key], at = member, start + size
    return found
