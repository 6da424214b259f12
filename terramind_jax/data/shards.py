"""One sample and one shard, in TerraMesh's format: tars of ``KEY.zarr.zip``, Zarr inside an uncompressed zip.

A shard is ``{root}/{split}/{modality}/{subset}_shard_{number:06d}.tar``. A sample holds ``bands[time, band, y, x]`` and small
arrays beside it (``center_lon``, ``center_lat``, ``time`` in int64 nanoseconds, optionally ``cloud_mask`` or ``truth``). Format 2
is written, formats 2 and 3 are read. The reader needs no Zarr library, never unpickles and never extracts a path.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tarfile
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numcodecs
import numpy as np

from terramind_jax.data import layout, tars
from terramind_jax.data.errors import DataError

SAMPLE_SUFFIX = ".zarr.zip"
TOKEN_SUFFIX = ".npy"
TOKEN_SOURCE = "_source", ".txt"  # first member of a token shard: the fingerprint of the pixels it was made from

ZSTD = numcodecs.Blosc("zstd", clevel=3, shuffle=numcodecs.Blosc.SHUFFLE)

_DIMENSIONS = {4: ("time", "band", "y", "x"), 3: ("time", "y", "x"), 2: ("y", "x"), 1: ("time",), 0: ()}
_NUMBERS = ("bool", "int", "uint", "float", "complex")  # data types of format 3, without their bits
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date a zip can hold: equal arrays give equal bytes


# ---- writing ----------------------------------------------------------------------------------------------------------------


def write_sample(
    arrays: Mapping[str, np.ndarray],
    *,
    attrs: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    array_attrs: Mapping[str, Mapping[str, Any]] | None = None,
    codec: numcodecs.abc.Codec = ZSTD,
) -> bytes:
    """The bytes of one ``.zarr.zip``: one chunk an array, encoded by `codec`, consolidated metadata, dimension names for xarray.

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
        used = codec if array.size > 1 else None
        metadata[f"{name}/.zarray"] = _array_metadata(array, used)
        metadata[f"{name}/.zattrs"] = {"_ARRAY_DIMENSIONS": list(names), **(array_attrs or {}).get(name, {})}
        if array.size:
            chunks[f"{name}/" + ".".join("0" * max(array.ndim, 1))] = array.tobytes() if used is None else _encoded(used, array)
    files = {".zmetadata": json.dumps({"metadata": metadata, "zarr_consolidated_format": 1}).encode()}
    files |= {name: json.dumps(value).encode() for name, value in metadata.items()}
    return _stored_zip(files | chunks)


def _encoded(codec: Any, array: np.ndarray) -> bytes:
    """By one thread: several lay their blocks down as they finish them, so that equal arrays would not give equal bytes."""
    before, numcodecs.blosc.use_threads = numcodecs.blosc.use_threads, False
    try:
        return bytes(codec.encode(array))
    finally:
        numcodecs.blosc.use_threads = before


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
    Raises `DataError` for anything that is no readable Zarr: the sentence names the array but not the shard, which
    only the caller knows.
    """
    with _open_zip(payload) as z:
        members = set(z.namelist())
        metadata = _metadata(z, members)
        found = {k[: -len("/.zarray")]: meta for k, meta in metadata.items() if k.endswith("/.zarray")}
        wanted = [n for n, meta in found.items() if _is_plain(meta)] if names is None else [n for n in names if n in found]
        return {n: _guarded(_read_array, z, members, n, found[n]) for n in wanted}


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
        return _metadata_3(z, members)
    raise DataError("is a zip but no Zarr group (it has neither .zmetadata nor .zgroup nor zarr.json)")


def _metadata_3(z: zipfile.ZipFile, members: set[str]) -> dict[str, Any]:
    """Format 3 by the names of format 2: each array's metadata under ``.zarray``, attributes under ``.zattrs``."""
    nodes = {n[: -len("zarr.json")]: _guarded(_read_json, z, n) for n in members if n.endswith("zarr.json")}
    arrays = {f"{n}.zarray": meta for n, meta in nodes.items() if meta.get("node_type") == "array"}
    return arrays | {f"{n}.zattrs": meta.get("attributes", {}) for n, meta in nodes.items()}


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
    kind = meta.get("dtype", meta.get("data_type")) if isinstance(meta, dict) else None
    return isinstance(kind, str) and (kind[1:2] in "biufcmM" if "dtype" in meta else kind.rstrip("0123456789") in _NUMBERS)


def _read_array(z: zipfile.ZipFile, members: set[str], name: str, meta: Mapping[str, Any]) -> np.ndarray:
    found = layout.parse(name, meta)
    wanted = [member for member, _ in found.members() if member in members]
    for member in wanted:
        if z.getinfo(member).file_size > found.most():
            raise DataError(f"has a chunk {member!r} larger than its array allows")
    return found.assemble({member: z.read(member) for member in wanted})


def token_source(members: Iterator[tuple[str, int, int]], read: tars.Read) -> str:
    """The fingerprint of its pixels with which a token shard begins, "" if it tells none; `members` are as `tars.scan` gives them."""
    name, start, size = next(members, ("", 0, 0))
    return read(start, size).decode("ascii", "replace") if name == "".join(TOKEN_SOURCE) else ""
