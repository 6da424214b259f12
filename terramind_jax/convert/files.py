"""State dicts in files: ``.pt`` through PyTorch, ``.safetensors`` without it. Written whole or not at all; never unpickled."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
SAFETENSORS = ".safetensors"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
}


def read(path: str | os.PathLike) -> dict[str, Array]:
    """Name -> array in the file's own dtype, bfloat16 included. Tied tensors of a ``.pt`` are one array; those of ``.safetensors`` are
    read when they are used.

    Raises:
      FileNotFoundError, ImportError (a ``.pt`` without PyTorch), ValueError (truncated, foreign, or with anything but tensors in it).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    return _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)


def write(path: str | os.PathLike, state: Mapping[str, Array]) -> None:
    """Writes a state dict by the suffix of `path`, which must be free. Arrays that are one object stay tied in a ``.pt``."""
    path = Path(path)
    write_to = _write_safetensors if _is_safetensors(path) else _write_torch
    with replacing(path) as partial:
        write_to(partial, state)


def _is_safetensors(path: Path) -> bool:
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
    """One tensor of a ``.safetensors`` file, read when it is used: ``np.asarray(x)``."""

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
    header.pop("__metadata__", None)
    unknown = [f"{name} {x['dtype']}" for name, x in header.items() if x["dtype"] not in DTYPES]
    if unknown:
        raise ValueError(f"{path} holds {unknown[0]}; expected {', '.join(DTYPES)}.")
    return {name: Stored(path, 8 + size + x["data_offsets"][0], tuple(x["shape"]), DTYPES[x["dtype"]]) for name, x in header.items()}


def _write_safetensors(path: Path, state: Mapping[str, Array]) -> None:
    """One tensor after the other; the library's own writer copies all of them first."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
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
    return torch


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    torch = _torch()
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the damage leads to
        if "weights_only" in str(error) or "Weights only" in str(error):
            raise ValueError(f"{path} holds Python objects beside its tensors; it was not loaded, as that would run its code.") from None
        raise ValueError(f"{path} is truncated or no PyTorch file ({str(error).splitlines()[0]}).") from None
    if not isinstance(loaded, Mapping) or not all(isinstance(x, torch.Tensor) for x in loaded.values()):
        raise ValueError(f"{path} is no flat dictionary of tensors, as the published files are; save model.state_dict() instead.")
    seen: dict[tuple, np.ndarray] = {}

    def to_numpy(x) -> np.ndarray:
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype)
        if key not in seen or not x.numel():
            seen[key] = x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()
        return seen[key]

    return {name: to_numpy(x.detach().contiguous()) for name, x in loaded.items()}


def _write_torch(path: Path, state: Mapping[str, Array]) -> None:
    torch = _torch()
    tensors: dict[int, object] = {}

    def to_tensor(x: Array):
        array = np.asarray(x)
        array = array if array.flags.writeable and array.flags.c_contiguous else np.array(array, order="C")
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if x.dtype == ml_dtypes.bfloat16 else torch.from_numpy(array)

    for x in state.values():
        if id(x) not in tensors:
            tensors[id(x)] = to_tensor(x)
    torch.save({name: tensors[id(x)] for name, x in state.items()}, path)
