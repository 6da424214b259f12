"""How a Zarr array (format 2 or 3) lies in its chunks, and decoding them: the part of Zarr that samples use, through numcodecs alone."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numcodecs
import numpy as np

from terramind_jax.data.errors import DataError

_COMPRESSORS = {"blosc": numcodecs.Blosc, "zstd": numcodecs.Zstd, "lz4": numcodecs.LZ4, "zlib": numcodecs.Zlib, "gzip": numcodecs.GZip}
_FILTERS = {"shuffle": numcodecs.Shuffle, "delta": numcodecs.Delta, "fixedscaleoffset": numcodecs.FixedScaleOffset}
_SHUFFLES = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}
_MAX_ARRAY_BYTES = 1 << 30  # a sample is a few MB; more than this is a damaged or hostile header


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """What an array's metadata says, checked."""

    name: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype  # as stored
    decoders: Sequence[Any]  # in the order of decoding; only codecs listed here are ever built from a file's words
    fill: Any
    prefix: str  # of a chunk's place in its name
    separator: str

    def members(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The name of each chunk, from the zip's root, and its place in the grid."""
        for position in itertools.product(*(range(-(-n // c)) for n, c in zip(self.shape, self.chunks, strict=True))):
            place = self.separator.join([self.prefix] * bool(self.prefix) + [str(p) for p in position])
            yield f"{self.name}/{place or '0'}", position

    def assemble(self, chunks: Mapping[str, bytes], out: np.ndarray | None = None) -> np.ndarray:
        """The array, in the machine's byte order, from its encoded chunks by name; the fill value where one is missing.

        It is decoded into `out` if that is a contiguous array of its type and number of values, and the array is one chunk.
        """
        native = self.dtype.newbyteorder("=")
        if self.shape == self.chunks:  # the common case: one chunk, no copy
            member, _ = next(self.members())
            if member in chunks:
                same = out is not None and (out.dtype, out.size) == (self.dtype, math.prod(self.shape)) and out.flags.c_contiguous
                return self._decode(member, chunks[member], out if same else None).astype(native, copy=False)
        out = np.empty(self.shape, native)
        if any(member not in chunks for member, _ in self.members()):
            out[...] = self.fill
        for member, position in self.members():
            if member in chunks:
                window = tuple(slice(p * c, min((p + 1) * c, n)) for p, c, n in zip(position, self.chunks, self.shape, strict=True))
                out[window] = self._decode(member, chunks[member])[tuple(slice(0, w.stop - w.start) for w in window)]
        return out

    def most(self) -> int:
        """Bytes of an encoded chunk that no sound one exceeds."""
        return 2 * math.prod(self.chunks) * self.dtype.itemsize + 4096

    def _decode(self, member: str, data: Any, out: np.ndarray | None = None) -> np.ndarray:
        if len(data) > self.most():
            raise DataError(f"has a chunk {member!r} larger than its array allows")
        for number, decoder in enumerate(self.decoders, 1):
            into = {"out": out.reshape(-1).view(np.uint8)} if out is not None and number == len(self.decoders) else {}
            data = decoder.decode(data, **into)
        array = np.frombuffer(data, np.uint8)
        if array.size != math.prod(self.chunks) * self.dtype.itemsize:
            raise DataError(f"has a chunk {member!r} of {array.nbytes} bytes, expected {math.prod(self.chunks) * self.dtype.itemsize}")
        return array.view(self.dtype).reshape(self.chunks)


def parse(name: str, meta: Mapping[str, Any]) -> Layout:
    """The layout of array `name` from its ``.zarray`` (format 2) or ``zarr.json`` (format 3); a `DataError` for what is not supported."""
    make = _format_3 if meta.get("zarr_format") == 3 else _format_2
    layout = make(name, meta)
    if layout.dtype.kind not in "biufcmM":
        raise DataError(f"stores {name!r} as {layout.dtype}, expected numbers or dates")
    if len(layout.shape) != len(layout.chunks) or min(layout.chunks, default=1) < 1 or min(layout.shape, default=0) < 0:
        raise DataError(f"gives {name!r} chunks {layout.chunks} that do not fit its shape {layout.shape}")
    if max(math.prod(layout.shape), math.prod(layout.chunks)) * layout.dtype.itemsize > _MAX_ARRAY_BYTES:
        raise DataError(f"claims {name!r} of shape {layout.shape} and chunks {layout.chunks}, larger than any sample")
    return dataclasses.replace(layout, fill=_fill_value(layout.fill, layout.dtype))


def parse_bytes(name: str, text: bytes) -> Layout | None:
    """As `parse`; None for what cannot be parsed."""
    try:
        return parse(name, json.loads(text))
    except Exception:  # untrusted bytes: whatever they lead to
        return None


def _format_2(name: str, meta: Mapping[str, Any]) -> Layout:
    if not isinstance(meta["dtype"], str) or np.dtype(meta["dtype"]).hasobject:
        raise DataError(f"stores {name!r} as objects, which are never unpickled")
    if meta.get("order", "C") != "C":
        raise DataError(f"stores {name!r} in order {meta['order']!r}, expected C")
    configs = [(_COMPRESSORS, meta.get("compressor")), *((_FILTERS, f) for f in reversed(meta.get("filters") or []))]
    decoders = [_codec(name, known, config["id"], config) for known, config in configs if config is not None]
    shape, chunks = tuple(map(int, meta["shape"])), tuple(map(int, meta["chunks"]))
    separator = meta.get("dimension_separator", ".")
    return Layout(name, shape, chunks, np.dtype(meta["dtype"]), decoders, meta.get("fill_value"), "", separator)


def _format_3(name: str, meta: Mapping[str, Any]) -> Layout:
    grid, keys = meta["chunk_grid"], meta.get("chunk_key_encoding", {"name": "default"})
    if grid["name"] != "regular" or not isinstance(meta["data_type"], str):
        raise DataError(f"stores {name!r} in a {grid['name']!r} grid of {meta['data_type']!r}, expected a regular grid of numbers")
    if keys["name"] not in ("default", "v2"):
        raise DataError(f"names the chunks of {name!r} by {keys['name']!r}, expected default or v2")
    default = keys["name"] == "default"
    separator = keys.get("configuration", {}).get("separator", "/" if default else ".")
    dtype, decoders = np.dtype(meta["data_type"]), []
    for codec in meta["codecs"]:
        kind, config = codec["name"], codec.get("configuration", {})
        if kind == "bytes":
            dtype = dtype.newbyteorder(">" if config.get("endian") == "big" else "<")
        elif kind == "crc32c":
            decoders.append(_WithoutChecksum())
        else:
            options = config | ({"shuffle": _SHUFFLES[config["shuffle"]]} if kind == "blosc" else {})
            decoders.append(_codec(name, _COMPRESSORS, kind, options))
    shape, chunks = tuple(map(int, meta["shape"])), tuple(map(int, grid["configuration"]["chunk_shape"]))
    return Layout(name, shape, chunks, dtype, decoders[::-1], meta.get("fill_value"), "c" * default, separator)


class _WithoutChecksum:
    """Format 3's crc32c, which the zip's own checksum makes superfluous."""

    def decode(self, data: Any) -> Any:
        return memoryview(data)[:-4]


def _codec(name: str, known: Mapping[str, Any], kind: str, config: Mapping[str, Any]) -> Any:
    if kind not in known:
        raise DataError(f"stores {name!r} with codec {kind!r}, expected one of {', '.join(known)}")
    options = {k: v for k, v in config.items() if k != "id"}
    if kind in ("blosc", "zstd"):
        options.pop("typesize", None), options.pop("checksum", None)  # of encoding only
    return known[kind].from_config(options)


def _fill_value(value: Any, dtype: np.dtype) -> Any:
    """Zarr's JSON form of a fill value: null is zero here, NaN and infinities are words."""
    if value is None:
        return np.zeros((), dtype)[()]
    if isinstance(value, str) and dtype.kind not in "f":
        raise DataError(f"has the fill value {value!r} for dtype {dtype}")
    return np.array(value).astype(dtype)[()]
