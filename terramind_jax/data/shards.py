"""One sample and one shard, in TerraMesh's format: tars of ``KEY.zarr.zip``, Zarr format 2 inside an uncompressed zip.

A shard is ``{root}/{split}/{modality}/{subset}_shard_{number:06d}.tar``. A sample holds ``bands[time, band, y, x]`` and small
arrays beside it (``center_lon``, ``center_lat``, ``time`` in int64 nanoseconds, optionally ``cloud_mask`` or ``truth``). The
reader needs no Zarr library, never unpickles and never extracts a path.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import shutil
import tarfile
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numcodecs
import numpy as np

SAMPLE_SUFFIX = ".zarr.zip"
TOKEN_SUFFIX = ".npy"

_COMPRESSORS = {"blosc": numcodecs.Blosc, "zstd": numcodecs.Zstd, "lz4": numcodecs.LZ4, "zlib": numcodecs.Zlib, "gzip": numcodecs.GZip}
_FILTERS = {"shuffle": numcodecs.Shuffle, "delta": numcodecs.Delta, "fixedscaleoffset": numcodecs.FixedScaleOffset}
_DIMENSIONS = {4: ("time", "band", "y", "x"), 3: ("time", "y", "x"), 2: ("y", "x"), 1: ("time",), 0: ()}
_MAX_ARRAY_BYTES = 1 << 30  # a sample is a few MB; more than this is a damaged or hostile header
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date a zip can hold: equal arrays give equal bytes


class DataError(Exception):
    """A shard or sample that cannot be read; the message is one sentence naming it."""


# ---- writing ----------------------------------------------------------------------------------------------------------------


def write_sample(
    arrays: Mapping[str, np.ndarray],
    *,
    attrs: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    array_attrs: Mapping[str, Mapping[str, Any]] | None = None,
) -> bytes:
    """The bytes of one ``.zarr.zip``: one zstd chunk an array, consolidated metadata, dimension names for xarray.

    `arrays` are stored as they are (``bands`` is [time, band, y, x]); `dims` names the axes of arrays that are not laid out so;
    `attrs` belong to the group, `array_attrs[name]` to one array.
    """
    metadata: dict[str, Any] = {".zgroup": {"zarr_format": 2}, ".zattrs": dict(attrs or {})}
    chunks: dict[str, bytes] = {}
    for name, value in arrays.items():
        array = np.asarray(value, order="C")
        if array.dtype.hasobject or array.dtype.names or not name or "/" in name:
            raise ValueError(f"Array {name!r} of dtype {array.dtype} cannot be stored; expected a plain name and a numeric dtype.")
        names = tuple((dims or {}).get(name, _DIMENSIONS.get(array.ndim, ())))
        if len(names) != array.ndim:
            raise ValueError(f"Array {name!r} has {array.ndim} axes but {len(names)} dimension names {names}; give dims[{name!r}].")
        codec = numcodecs.Blosc("zstd", clevel=3, shuffle=numcodecs.Blosc.SHUFFLE) if array.size > 1 else None
        metadata[f"{name}/.zarray"] = _array_metadata(array, codec)
        metadata[f"{name}/.zattrs"] = {"_ARRAY_DIMENSIONS": list(names), **(array_attrs or {}).get(name, {})}
        if array.size:
            chunks[f"{name}/" + ".".join("0" * max(array.ndim, 1))] = array.tobytes() if codec is None else bytes(codec.encode(array))
    files = {".zmetadata": json.dumps({"metadata": metadata, "zarr_consolidated_format": 1}).encode()}
    files |= {name: json.dumps(value).encode() for name, value in metadata.items()}
    return _stored_zip(files | chunks)


def _array_metadata(array: np.ndarray, codec: Any) -> dict[str, Any]:
    return {
        "chunks": [max(n, 1) for n in array.shape],
        "compressor": None if codec is None else codec.get_config(),
        "dtype": array.dtype.str,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(array.shape),
        "zarr_format": 2,
    }


def _stored_zip(files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as z:
        for name, payload in files.items():
            z.writestr(zipfile.ZipInfo(name, _EPOCH), payload)
    return out.getvalue()


class ShardWriter:
    """Writes one tar under a temporary name and renames it when the ``with`` block ends well; an error leaves nothing behind."""

    def __init__(self, root: str | os.PathLike, split: str, modality: str, subset: str, number: int):
        folder = os.path.join(root, split, modality)
        os.makedirs(folder, exist_ok=True)
        self.path = os.path.join(folder, f"{subset}_shard_{number:06d}.tar")
        self._temporary = f"{self.path}.{os.getpid()}.tmp"
        self._keys: set[str] = set()

    def __enter__(self) -> ShardWriter:
        self._tar = tarfile.open(self._temporary, "w", format=tarfile.GNU_FORMAT)
        return self

    def add(self, key: str, payload: bytes, suffix: str = SAMPLE_SUFFIX) -> None:
        """Appends member ``{key}{suffix}``; a key that is repeated or holds a slash is a ValueError."""
        if not key or "/" in key or key in self._keys:
            raise ValueError(f"Key {key!r} cannot be added to {self.path}: keys are unique in a shard, not empty and hold no slash.")
        self._keys.add(key)
        member = tarfile.TarInfo(key + suffix)
        member.size = len(payload)
        self._tar.addfile(member, io.BytesIO(payload))

    def __exit__(self, kind, value, traceback) -> None:
        self._tar.close()
        if kind is None:
            os.replace(self._temporary, self.path)
        else:
            os.unlink(self._temporary)


@contextlib.contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[str]:
    """A folder of a unique temporary name beside `out`, renamed to it when the ``with`` block ends well and removed when not.

    `out` may exist if it is empty; a FileExistsError if something lies there by the end.
    """
    partial = f"{os.path.normpath(out)}.{uuid.uuid4().hex[:8]}.partial"
    os.makedirs(partial)
    try:
        yield partial
        if os.path.isdir(out) and not os.listdir(out):
            os.rmdir(out)
        if os.path.exists(out):
            raise FileExistsError(f"{os.fspath(out)} was filled by another process meanwhile; choose another folder.")
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ---- reading ----------------------------------------------------------------------------------------------------------------


def read_sample(payload: bytes, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of one ``.zarr.zip``, in the machine's byte order.

    `names` picks arrays, and those that the sample lacks are left out; without it every array comes except text and objects.
    Raises `DataError` for anything that is no readable Zarr format 2: the sentence names the array but not the shard, which
    only the caller knows.
    """
    with _open_zip(payload) as z:
        members = set(z.namelist())
        metadata = _metadata(z, members)
        found = [k[: -len("/.zarray")] for k in metadata if k.endswith("/.zarray")]
        if names is None:
            wanted = [n for n in found if _is_plain(metadata[f"{n}/.zarray"])]
        else:
            wanted = [n for n in names if n in found]
        return {n: _guarded(_read_array, z, members, n, metadata[f"{n}/.zarray"]) for n in wanted}


def read_attributes(payload: bytes, name: str = "") -> dict[str, Any]:
    """The attributes of array `name`, or of the group."""
    with _open_zip(payload) as z:
        return _guarded(dict, _metadata(z, set(z.namelist())).get(f"{name}/.zattrs" if name else ".zattrs", {}))


def _open_zip(payload: bytes) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(io.BytesIO(payload))
    except Exception as error:  # besides BadZipFile: NotImplementedError, struct.error, ... for what a damaged directory says
        raise DataError(f"is no zip file ({error})") from error


def _metadata(z: zipfile.ZipFile, members: set[str]) -> dict[str, Any]:
    if ".zmetadata" in members:
        consolidated = _guarded(_read_json, z, ".zmetadata").get("metadata")
        if isinstance(consolidated, dict):
            return consolidated
        raise DataError("has a .zmetadata without metadata")
    if ".zgroup" in members:
        return {n: _guarded(_read_json, z, n) for n in members if n.endswith((".zarray", ".zattrs"))}
    if "zarr.json" in members:
        raise DataError("is Zarr format 3, expected format 2")
    raise DataError("is a zip but no Zarr group (it has neither .zmetadata nor .zgroup)")


def _read_json(z: zipfile.ZipFile, name: str) -> dict[str, Any]:
    value = json.loads(z.read(name))
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no JSON object")
    return value


def _guarded(function, *args):
    """Runs a parsing step on untrusted bytes; whatever it stumbles on becomes a `DataError`."""
    try:
        return function(*args)
    except DataError:
        raise
    except Exception as error:  # codecs raise RuntimeError, zlib.error, ...
        name = next((a for a in args if isinstance(a, str)), "")
        raise DataError(f"has a damaged {name!r} ({type(error).__name__}: {error})") from error


def _is_plain(meta: Any) -> bool:
    """Whether an array holds numbers or dates: text and objects are skipped unless asked for."""
    return isinstance(meta, dict) and isinstance(meta.get("dtype"), str) and meta["dtype"][1:2] in "biufcmM"


def _read_array(z: zipfile.ZipFile, members: set[str], name: str, meta: Mapping[str, Any]) -> np.ndarray:
    if not isinstance(meta["dtype"], str) or np.dtype(meta["dtype"]).hasobject:
        raise DataError(f"stores {name!r} as objects, which are never unpickled")
    if meta.get("order", "C") != "C":
        raise DataError(f"stores {name!r} in order {meta['order']!r}, expected C")
    dtype, shape, chunk_shape = np.dtype(meta["dtype"]), tuple(map(int, meta["shape"])), tuple(map(int, meta["chunks"]))
    if dtype.kind not in "biufcmM":
        raise DataError(f"stores {name!r} as {dtype}, expected numbers or dates")
    if len(shape) != len(chunk_shape) or min(chunk_shape, default=1) < 1 or min(shape, default=0) < 0:
        raise DataError(f"gives {name!r} chunks {chunk_shape} that do not fit its shape {shape}")
    if max(math.prod(shape), math.prod(chunk_shape)) * dtype.itemsize > _MAX_ARRAY_BYTES:
        raise DataError(f"claims {name!r} of shape {shape} and chunks {chunk_shape}, larger than any sample")
    decoders = _decoders(name, meta)
    separator = meta.get("dimension_separator", ".")
    native = dtype.newbyteorder("=")
    if shape == chunk_shape:  # the common case: one chunk, no copy
        member = f"{name}/" + separator.join("0" * max(len(shape), 1))
        if member in members:
            return _chunk(z, member, decoders, dtype, shape).astype(native, copy=False)
    out = np.full(shape, _fill_value(meta.get("fill_value"), dtype), native)
    for position in itertools.product(*(range(-(-n // c)) for n, c in zip(shape, chunk_shape, strict=True))):
        member = f"{name}/" + (separator.join(map(str, position)) or "0")
        if member in members:
            window = tuple(slice(p * c, min((p + 1) * c, n)) for p, c, n in zip(position, chunk_shape, shape, strict=True))
            inside = tuple(slice(0, w.stop - w.start) for w in window)
            out[window] = _chunk(z, member, decoders, dtype, chunk_shape)[inside]
    return out


def _decoders(name: str, meta: Mapping[str, Any]) -> list[Any]:
    """Codecs in the order of decoding; only those listed here are ever built from a file's words."""
    decoders = []
    for known, config in [(_COMPRESSORS, meta.get("compressor")), *((_FILTERS, f) for f in reversed(meta.get("filters") or []))]:
        if config is None:
            continue
        if config.get("id") not in known:
            raise DataError(f"stores {name!r} with codec {config.get('id')!r}, expected one of {', '.join(known)}")
        decoders.append(known[config["id"]].from_config({k: v for k, v in config.items() if k != "id"}))
    return decoders


def _chunk(z: zipfile.ZipFile, member: str, decoders: list[Any], dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    if z.getinfo(member).file_size > 2 * size + 4096:
        raise DataError(f"has a chunk {member!r} larger than its array allows")
    data: Any = z.read(member)
    for decoder in decoders:
        data = decoder.decode(data)
    array = np.frombuffer(data, dtype)
    if array.size != math.prod(shape):
        raise DataError(f"has a chunk {member!r} of {array.nbytes} bytes, expected {size}")
    return array.reshape(shape)


def _fill_value(value: Any, dtype: np.dtype) -> Any:
    """Zarr's JSON form of a fill value: null is zero here, NaN and infinities are words."""
    if value is None:
        return np.zeros((), dtype)[()]
    if isinstance(value, str) and dtype.kind not in "f":
        raise DataError(f"has the fill value {value!r} for dtype {dtype}")
    return np.array(value).astype(dtype)[()]
