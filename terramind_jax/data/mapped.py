"""Prepared data as arrays that are mapped into memory, so that a view reads the patches and tokens that its masks chose and little else.

Pixels lie by blocks of 4 x 4: the crops of a tile of 264 pixels begin at 0, 20 and 40, so a patch of any of them is four rows of four
whole blocks, and one copy of the tile serves all ten crops. Nothing is compressed. In ``{root}/{split}`` of what ``data prepare``
wrote, with a row a record:

- ``{modality}.mapped.npy`` ``[n, H / 4, W / 4, 4 * 4 * C]`` in the stored dtype,
- ``{modality}_tokens.mapped.npy`` ``[n, 10, h, w]``,
- ``coordinates.mapped.npy`` ``[n, 2]``, longitude and latitude, NaN if not known,

and beside each ``NAME.readable.npy`` ``[n]``, written last: False for records that it says nothing about, which then are asked themselves.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from terramind_jax import files
from terramind_jax.data import crops, views
from terramind_jax.data.errors import DataError
from terramind_jax.modalities import PATCH_SIZE

if TYPE_CHECKING:
    from terramind_jax.data.records import Records

BLOCK = 4
RUNS = PATCH_SIZE // BLOCK  # blocks along a patch
COORDINATES = "coordinates"


def paths(root: str | os.PathLike, split: str, name: str) -> tuple[Path, Path]:
    """Of an array, and of what tells which records are in it; `name` is a modality, ``{modality}_tokens`` or ``coordinates``."""
    folder = Path(root) / split
    return folder / f"{name}.mapped.npy", folder / f"{name}.readable.npy"


class Mapped:
    """The arrays of one split, each opened when it is first asked for. What they do not tell is None."""

    def __init__(self, root: str | os.PathLike, split: str):
        self._root, self._split = root, split
        self._open: dict[str, tuple[np.ndarray, np.ndarray] | None] = {}

    def row(self, name: str, record: int) -> np.ndarray | None:
        """The row of a record in the array `name`."""
        if name not in self._open:
            data, readable = paths(self._root, self._split, name)
            self._open[name] = (files.map_npy(data), files.map_npy(readable)) if readable.exists() else None
        found = self._open[name]
        return found[0][record] if found and found[1][record] else None

    def patches(self, modality: str, record: int, variant: int, image_size: int, positions: np.ndarray) -> np.ndarray | None:
        """`select_patches` of a record's tile."""
        blocks = self.row(modality, record)
        return None if blocks is None else select_patches(blocks, variant, image_size, positions)


def select_patches(blocks: np.ndarray, variant: int, image_size: int, positions: np.ndarray) -> np.ndarray | None:
    """Patches ``[n, 16 * 16 * C]`` of a crop of a tile ``[H / 4, W / 4, 4 * 4 * C]``, as `crops.select_patches` gives them.

    None for a crop that is larger than the tile or does not begin at a block.
    """
    if min(blocks.shape[:2]) * BLOCK < image_size:
        return None
    top, left, mirror = crops.offsets(blocks.shape[0] * BLOCK, blocks.shape[1] * BLOCK, variant, image_size)
    if top % BLOCK or left % BLOCK:
        return None
    side, n = image_size // PATCH_SIZE, len(positions)
    row, column = np.divmod(positions, side)
    column = side - 1 - column if mirror else column
    rows, columns = ((x // BLOCK + RUNS * y)[:, None] + np.arange(RUNS) for x, y in ((top, row), (left, column)))
    found = blocks[rows[:, :, None], columns[:, None]]  # [n, 4, 4, 4 * 4 * C]
    found = found.reshape(n, RUNS, RUNS, BLOCK, BLOCK, -1).swapaxes(2, 3).reshape(n, PATCH_SIZE, PATCH_SIZE, -1)
    return np.ascontiguousarray(found[:, :, ::-1] if mirror else found).reshape(n, -1)


def write(found: Records) -> list[str]:
    """Writes the arrays of prepared data that are not there yet, and returns the names of all that are there then.

    A modality whose tiles have sides that are no multiples of 4 is left out. Raises ValueError for tiles or tokens of several sizes.
    """
    names: dict[str, tuple[Iterable[int], Callable[[int], np.ndarray | None]]] = {}
    for column, modality in enumerate(found.modalities):
        names[modality] = np.flatnonzero(found.available[:, column]), partial(_blocks, found, modality)
        names[f"{modality}_tokens"] = np.flatnonzero(found.has_tokens[:, column]), partial(found.tokens, modality=modality)
    names[COORDINATES] = range(len(found)), lambda i: np.array(found.coordinates(i) or (np.nan, np.nan))
    return [name for name, what in names.items() if paths(found.root, found.split, name)[1].exists() or _write(found, name, *what)]


def _blocks(found: Records, modality: str, i: int) -> np.ndarray | None:
    tile = found.read(i, modality)
    height, width, channels = tile.shape
    if height % BLOCK or width % BLOCK or views.is_empty(tile, modality):
        return None
    blocks = tile.reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK, channels).swapaxes(1, 2)
    return blocks.reshape(*blocks.shape[:2], -1)


def _write(found: Records, name: str, samples: Iterable[int], make: Callable[[int], np.ndarray | None]) -> bool:
    data, readable = paths(found.root, found.split, name)
    temporary = data.with_name(f"{name}.{os.getpid()}.tmp")
    out, known = None, np.zeros(found.count, bool)
    try:
        for i in tqdm(samples, desc=f"{name} of {found.split}", unit="sample", disable=not sys.stderr.isatty()):
            try:
                row = make(int(i))
            except DataError:
                continue  # as bad as in the records
            if row is None:
                continue
            if out is None:
                out = np.lib.format.open_memmap(temporary, "w+", row.dtype, (found.count, *row.shape))
            if row.shape != out.shape[1:]:
                raise ValueError(f"{name} has arrays of {out.shape[1:]} and of {row.shape}; mapped into memory, they need one size.")
            record = found.record_number(int(i))
            out[record], known[record] = row, True
        if out is None:
            return False
        out.flush()
        os.replace(temporary, data)
        np.save(temporary.with_suffix(".npy"), known)
        os.replace(temporary.with_suffix(".npy"), readable)
    finally:
        temporary.unlink(missing_ok=True)
    return True
