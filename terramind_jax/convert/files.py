"""State dicts in files: ``.pt`` through PyTorch, ``.safetensors`` without it. Written whole or not at all; never unpickled."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import uuid
import zipfile
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

LIGHTNING = ".ckpt"  # a checkpoint of Lightning's, whose state dict is one entry of several
TORCH_SUFFIXES = (".pt", ".pth", ".bin", LIGHTNING)
STATE_DICT = "state_dict"
SAFETENSORS = ".safetensors"
TIED = "tied"  # what the header of a .safetensors file calls the names that were one array with another
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
}


def read(path: str | os.PathLike) -> dict[str, Array]:
    """Name -> array in the file's own dtype, bfloat16 included, read when it is used. Tied tensors are one object.

    Raises:
      FileNotFoundError, ImportError (a ``.pt`` without PyTorch), ValueError (truncated, foreign, or with anything but tensors in it).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    return _read_safetensors(path) if is_safetensors(path) else _read_torch(path)


def write(path: str | os.PathLike, state: Mapping[str, Array]) -> None:
    """Writes a state dict by the suffix of `path`, which must be free; a ``.ckpt`` as Lightning does.

    Arrays that are one object stay tied in a ``.pt``.
    """
    path = Path(path)
    write_to = _write_safetensors if is_safetensors(path) else partial(_write_torch, lightning=path.suffix == LIGHTNING)
    with replacing(path) as unfinished:
        write_to(unfinished, state)


def is_safetensors(path: Path) -> bool:
    """By the suffix; a ValueError if it is neither that nor PyTorch's."""
    if path.suffix not in (*TORCH_SUFFIXES, SAFETENSORS):
        raise ValueError(f"{path} has an unknown suffix; expected {', '.join(TORCH_SUFFIXES)} or {SAFETENSORS}.")
    return path.suffix == SAFETENSORS


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, of a file or a folder, renamed to it if all went well and removed if not."""
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        check_free(path)  # another process may have come first
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)


def check_free(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another name, or delete it first.")


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor in a file, read when it is used: ``np.asarray(x)``."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        x = np.fromfile(self.path, self.dtype, math.prod(self.shape), offset=self.offset).reshape(self.shape)
        return x if dtype is None else x.astype(dtype, copy=False)


Array = np.ndarray | Stored


def _read_safetensors(path: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):  # checks the header, and that the data is all there
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is no complete safetensors file ({error}).") from None
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
    try:
        tied = json.loads(header.pop("__metadata__", {}).get(TIED, "{}"))
    except ValueError:  # another program's
        tied = {}
    unknown = [f"{name} {x['dtype']}" for name, x in header.items() if x["dtype"] not in DTYPES]
    if unknown:
        raise ValueError(f"{path} holds {unknown[0]}; expected {', '.join(DTYPES)}.")
    state = {name: Stored(path, 8 + size + x["data_offsets"][0], tuple(x["shape"]), DTYPES[x["dtype"]]) for name, x in header.items()}
    return {name: _tied_to(state, tied.get(name) if isinstance(tied, dict) else None, x) for name, x in state.items()}


def _tied_to(state: Mapping[str, Stored], name: Any, x: Stored) -> Stored:
    """`x`, or what the file says it is tied to, unless another program has changed one of the two or what it says."""
    return state[name] if isinstance(name, str) and name in state and np.array_equal(state[name], x) else x


def _write_safetensors(path: Path, state: Mapping[str, Array]) -> None:
    """One tensor after the other; the library's own writer copies all of them first.

    The format has no ties: every name has its data, as a strict load expects, and the header tells what was one array.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    unknown = [f"{name} is {x.dtype}" for name, x in state.items() if x.dtype not in names]
    if unknown:
        raise ValueError(f"{unknown[0]}, which .safetensors files of this package do not hold; they hold {', '.join(map(str, names))}.")
    first: dict[int, str] = {}
    tied = {name: first[id(x)] for name, x in state.items() if first.setdefault(id(x), name) != name}
    header, end = {"__metadata__": {"format": "pt", **({TIED: json.dumps(tied)} if tied else {})}}, 0
    for name, x in state.items():
        start, end = end, end + math.prod(x.shape) * x.dtype.itemsize
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at multiples of 8 bytes
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for x in state.values():
            np.ascontiguousarray(x).tofile(f)


def _torch():
    try:
        import torch
    except ImportError:
        raise ImportError(
            "Files .pt are read and written by PyTorch, which is not installed; pip install 'terramind-jax[torch]', or use .safetensors."
        ) from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise ImportError(f"PyTorch {torch.__version__} may run code that is in a .pt (CVE-2025-32434); install 2.6 or newer.")
    return torch


def _read_torch(path: Path) -> dict[str, Array]:
    stored = {name: _stored(path, x) for name, x in _torch_load(path).items()}
    if all(stored.values()) and _is_uncompressed(path):
        return _one_object_each(stored, stored)
    # An old PyTorch, or a file that does not hold its tensors in one piece each: all are read at once.
    tensors = {name: x.detach().contiguous() for name, x in _torch_load(path, fake=False).items()}
    places = {name: (x.data_ptr() if x.numel() else name, x.shape, x.dtype) for name, x in tensors.items()}
    return _one_object_each({name: to_numpy(x) for name, x in tensors.items()}, places)


def _is_uncompressed(path: Path) -> bool:
    """Whether the members of a zip archive can be read where they lie, as PyTorch writes them."""
    with zipfile.ZipFile(path) as archive:
        return all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())


def _one_object_each(state: Mapping[str, Array], places: Mapping[str, Hashable]) -> dict[str, Array]:
    """Arrays of the same place are the same object."""
    first: dict[Hashable, Array] = {}
    return {name: first.setdefault(places[name], x) for name, x in state.items()}


def _torch_load(path: Path, fake: bool = True) -> dict[str, Any]:
    """The dictionary of tensors in a file; `fake` ones know where in the file their data is and hold none."""
    torch = _torch()
    with open(path, "rb") as f:
        start = f.read(2)
    if start != b"PK" and start[:1] != b"\x80":  # a zip archive, or a pickle as before PyTorch 1.6
        raise ValueError(f"{path} is truncated or no PyTorch file (it starts with {start!r}).")
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode() if fake else nullcontext():
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the damage leads to
        if "weights_only" in str(error) or "Weights only" in str(error):
            raise ValueError(f"{path} holds Python objects beside its tensors; it was not loaded, as that would run its code.") from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is truncated or no PyTorch file ({reason}).") from None
    if isinstance(loaded, Mapping) and isinstance(loaded.get(STATE_DICT), Mapping):
        loaded = loaded[STATE_DICT]
    is_flat = isinstance(loaded, Mapping) and all(isinstance(k, str) and isinstance(x, torch.Tensor) for k, x in loaded.items())
    if not is_flat or not all(x.layout == torch.strided for x in loaded.values()):
        raise ValueError(f"{path} is no flat dictionary of dense tensors, as the published files are; save model.state_dict() instead.")
    return loaded


def _stored(path: Path, x) -> Stored | None:
    """A fake tensor's place in the file, None if that is unknown or not in one piece."""
    start = getattr(x.untyped_storage(), "_checkpoint_offset", None)
    if start is None or not x.is_contiguous():
        return None
    return Stored(path, start + x.storage_offset() * x.itemsize, tuple(x.shape), np.dtype(str(x.dtype).removeprefix("torch.")))


def to_numpy(x) -> np.ndarray:
    """An array, or a tensor of PyTorch, parameters and bfloat16 included, as an array."""
    if not hasattr(x, "detach"):
        return np.asarray(x)
    torch, x = _torch(), x.detach().cpu().contiguous()
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def _write_torch(path: Path, state: Mapping[str, Array], lightning: bool = False) -> None:
    torch = _torch()
    tensors: dict[int, object] = {}

    def to_tensor(x: Array):
        array = np.asarray(x)
        array = array if array.flags.writeable and array.flags.c_contiguous else np.array(array, order="C")
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if x.dtype == ml_dtypes.bfloat16 else torch.from_numpy(array)

    for x in state.values():
        if id(x) not in tensors:
            tensors[id(x)] = to_tensor(x)
    named: dict[str, Any] = {name: tensors[id(x)] for name, x in state.items()}
    if lightning:
        named = {STATE_DICT: named, "pytorch-lightning_version": "2.0.0", "epoch": 0, "global_step": 0}
    torch.save(named, path)
