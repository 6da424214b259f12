"""Images, masks, and the names of split files and tables, as downstream data sets store them."""

from __future__ import annotations

import csv
import dataclasses
import glob
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np

from terramind_jax import geo
from terramind_jax.files import map_npy


@dataclasses.dataclass(frozen=True)
class Bands:
    """How the files of one modality are read."""

    modality: str
    names: tuple[str, ...]  # what the files hold, in their order
    use: tuple[str, ...]  # what is given, in this order
    scale: float = 1.0  # what stored values are multiplied by
    missing: tuple[float, ...] = ()  # stored values that mean no data, besides NaN and what a file itself says
    replace: float = 0.0  # what stands for them, before scaling
    times: int = 1  # images of a time series in one file
    by_band: bool = False  # a series is stored as all times of its first band, then of the next


def bands(modality: str, names: Sequence[str], use: Sequence[str] | None = None, **options) -> Bands:
    """`Bands` of a modality, `use` being a part of `names` in any order, all by default; a ValueError otherwise."""
    use = tuple(names if use is None else use)
    unknown = [name for name in use if name not in names]
    if unknown or len(set(use)) < len(use) or not use:
        what = f"{unknown[0]} is none of them" if unknown else "each may be used once, and one at least"
        raise ValueError(f"The files of {modality} hold the bands {', '.join(names)}; {what}.")
    return Bands(modality, tuple(names), use, **options)


def read_image(path: str, how: Bands) -> np.ndarray:
    """A GeoTIFF, or a ``.npy`` of ``[C, H, W]`` or ``[T, C, H, W]``, as ``[H, W, C]`` float32; a time series as ``[T, H, W, C]``."""
    return read_rows_of(path, how)[0]


def read_rows_of(path: str, how: Bands, rows: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """What `read_image` gives, and where no band has data at any time, ``[H, W]`` bool; of `rows`, first and end, if they are told."""
    if how.times > 1:
        stored = [f"{name} {t}" for t in range(how.times) for name in how.names]
        stored = [f"{name} {t}" for name in how.names for t in range(how.times)] if how.by_band else stored
        flat = _read(path, stored, how.modality, rows=rows)
        image = np.stack([flat[..., [stored.index(f"{name} {t}") for name in how.use]] for t in range(how.times)])
    else:
        image = _read(path, how.names, how.modality, how.use, rows)
    return _replace(image, how)


def _read(path: str, names: Sequence[str], what: str, use: Sequence[str] | None = None, rows: tuple[int, int] | None = None) -> np.ndarray:
    if not path.endswith(".npy"):
        return geo.read_valid(path, names, what, use, rows)
    array = np.moveaxis(np.array(map_npy(path)), -3, -1)
    if array.shape[-1] != len(names):
        raise ValueError(f"{path} has {array.shape[-1]} bands, expected {len(names)} for {what} ({', '.join(names)}).")
    array = array if use is None else array[..., [names.index(name) for name in use]]
    return array if rows is None else array[..., slice(*rows), :, :]


def _replace(image: np.ndarray, how: Bands) -> tuple[np.ndarray, np.ndarray]:
    image = np.ascontiguousarray(image, np.float32)
    missing = np.isnan(image)
    for value in how.missing:
        missing |= image == np.float32(value)
    image[missing] = how.replace
    nothing = missing.all(axis=(-1, *range(image.ndim - 3)))
    return image if how.scale == 1 else image * np.float32(how.scale), nothing


def read_mask(path: str, ignore_index: float | None, *, zero_is_none: bool = False, codes: Sequence[float] = ()) -> np.ndarray:
    """A map of one band as ``[H, W]`` float32, `ignore_index` where the file has no data.

    With `zero_is_none` stored classes count from 1, and 0 is none of them. With `codes` class k is stored as ``codes[k]``, even if the
    file calls that value no data; a ValueError for a value that is no code.
    """
    if path.endswith(".npy"):
        mask = np.squeeze(map_npy(path)).astype(np.float32)
    else:
        mask = geo.read_valid(path, ("label",), "a mask")[..., 0]
    if mask.ndim != 2:
        raise ValueError(f"{path} has shape {mask.shape}, expected a mask of one band, [H, W].")
    if codes:
        mask = _classes(path, mask, codes, ignore_index)
    missing = np.isnan(mask)
    if zero_is_none:
        missing |= mask == 0
        mask = np.where(mask == ignore_index, mask, mask - 1)
    if missing.any() and ignore_index is None:
        raise ValueError(f"{path} has {int(missing.sum())} pixels without a label; give them an ignore_index.")
    return np.where(missing, ignore_index, mask).astype(np.float32) if missing.any() else mask


def _classes(path: str, mask: np.ndarray, codes: Sequence[float], ignore_index: float | None) -> np.ndarray:
    """Stored codes to classes; NaN and `ignore_index`, unless it is a code, stay."""
    nodata = None if path.endswith(".npy") else geo.read_header(path).nodata
    mask = np.where(np.isnan(mask), nodata, mask) if nodata in codes else mask
    order = np.argsort(codes)
    stored = np.float32(codes)[order]
    at = np.searchsorted(stored, mask).clip(max=len(codes) - 1)
    known, none = stored[at] == mask, np.isnan(mask) | (mask == ignore_index)
    if not (known | none).all():
        raise ValueError(f"{path} has the label {mask[~(known | none)][0]:g}; its codes are {', '.join(f'{code:g}' for code in codes)}.")
    return np.where(known, order[at], mask).astype(np.float32)


# ---- names ----


def split_names(path: str) -> list[str]:
    """The names of a split file: a line each of a ``.txt``, the first column under a heading of a ``.csv``."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no split file {path}.")
    if path.endswith(".csv"):
        return [row[0] for row in read_rows(path)[1:]]
    with open(path, encoding="utf-8") as lines:
        return [line.strip() for line in lines if line.strip()]


def read_rows(path: str) -> list[list[str]]:
    """The rows of a ``.csv``, its heading included, empty ones left out; cells are stripped."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file {path}.")
    with open(path, encoding="utf-8", newline="") as f:
        return [[cell.strip() for cell in row] for row in csv.reader(f) if any(cell.strip() for cell in row)]


def name_of(file: str, pattern: str) -> str | None:
    """The sample's name in a file's: what stands at the first ``*`` of a pattern such as ``*_S2.tif``; None if it does not match."""
    first, *rest = map(re.escape, pattern.split("*"))
    found = re.fullmatch(f"{first}(.+?){'.*'.join(rest)}", file)
    return found and found.group(1)


def names_in(folder: str, pattern: str) -> list[str]:
    """The names of all samples in a folder, sorted."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"There is no folder {folder}.")
    files = (os.path.basename(f) for f in glob.glob(os.path.join(glob.escape(folder), pattern)))
    return sorted(name for name in (name_of(f, pattern) for f in files) if name)


def path_of(folder: str, pattern: str, name: str) -> str:
    """The file of a sample: its name in the place of the pattern's ``*``, or else the one file that begins with both.

    A number that goes on is another's: ``tile_10_label.tif`` is not of ``tile_1``. A ValueError if several files are left.
    """
    exact = os.path.join(folder, pattern.replace("*", name, 1))
    if "*" not in exact and os.path.exists(exact):
        return exact
    before, after = pattern.split("*", 1)
    start = os.path.join(folder, f"{before}{name}")
    found = sorted(glob.glob(f"{glob.escape(start)}*{after}"))
    if name[-1:].isdigit():
        found = [file for file in found if not file[len(start) :][:1].isdigit()]
    if len(found) > 1:
        raise ValueError(f"{len(found)} files of {folder} match the sample {name} and the pattern {pattern}, such as {found[0]}.")
    return found[0] if found else exact


def check_present(paths: Iterable[tuple[str, str]], where: str) -> None:
    """Raises a FileNotFoundError if a file of ``(sample's name, path)`` is not there; `where` is what names the samples."""
    absent = [(name, path) for name, path in paths if not os.path.exists(path)]
    if absent:
        name, path = absent[0]
        samples = len({name for name, _ in absent})
        what = f"{name}, whose file" if samples == 1 else f"{samples} samples whose files are absent: of {name}"
        raise FileNotFoundError(f"{where} names {what} {path} is not there.")


def require(title: str, root: str, parts: Sequence[str], source: str, others: Iterable[str] = ()) -> None:
    """Raises a FileNotFoundError that tells what of a published data set is not in `root`, and where to get it.

    `others`, such as parts of other splits, are not needed, but where there is one of them, `root` is no folder of something else.
    """
    absent = [part for part in parts if not os.path.exists(os.path.join(root, part))]
    if absent[1:] and not any(os.path.exists(os.path.join(root, part)) for part in (*parts, *others)):
        raise FileNotFoundError(f"{root} holds nothing of {title}, not even {absent[0]}; get it from {source}.")
    if absent:
        what = f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not there"
        raise FileNotFoundError(f"{title} is not complete in {root}: {what}; get it from {source}.")


def base(root: str | os.PathLike, folder: str) -> str:
    """`root`, or the folder in it that an archive unpacks to."""
    inner = os.path.join(root, folder)
    return inner if os.path.isdir(inner) else os.fspath(root)
