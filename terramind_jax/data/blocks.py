"""Pixels of prepared data by blocks of 4 x 4, so that a view reads the patches that its masks chose and little else.

The crops of a tile of 264 pixels begin at 0, 20 and 40, so a patch of any of them is four rows of four whole blocks, and one copy of the
tile serves all ten crops. ``{root}/{split}/{modality}.blocks.npy`` is ``[records, H / 4, W / 4, 4 * 4 * C]`` in the stored dtype, mapped
into memory and not compressed; ``{modality}.readable.npy``, written last, tells which records are in it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from terramind_jax.data import crops, views
from terramind_jax.data.errors import DataError
from terramind_jax.data.records import Records, open_records
from terramind_jax.modalities import PATCH_SIZE

BLOCK = 4
RUNS = PATCH_SIZE // BLOCK  # blocks along a patch


def paths(root: str | os.PathLike, split: str, modality: str) -> tuple[Path, Path]:
    """Of the blocks, and of what tells which records they are of."""
    folder = Path(root) / split
    return folder / f"{modality}.blocks.npy", folder / f"{modality}.readable.npy"


class Blocks:
    """The blocks of one modality of a split."""

    def __init__(self, root: str | os.PathLike, split: str, modality: str):
        data, readable = paths(root, split, modality)
        self.data, self.readable = np.load(data, mmap_mode="r"), np.load(readable)

    def patches(self, record: int, variant: int, image_size: int, positions: np.ndarray) -> np.ndarray | None:
        """Patches ``[n, 16 * 16 * C]`` of a crop as `crops.select_patches` gives them; None where only the record itself can tell."""
        rows, columns, width = self.data.shape[1:]
        if not self.readable[record] or min(rows, columns) * BLOCK < image_size:
            return None
        top, left, mirror = crops.offsets(rows * BLOCK, columns * BLOCK, variant, image_size)
        if top % BLOCK or left % BLOCK:
            return None
        side = image_size // PATCH_SIZE
        row, column = np.divmod(positions, side)
        column = side - 1 - column if mirror else column
        at = (top // BLOCK + RUNS * row)[:, None] + np.arange(RUNS), (left // BLOCK + RUNS * column)[:, None] + np.arange(RUNS)
        found = self.data[record][at[0][:, :, None], at[1][:, None]]  # [n, 4, 4, 4 * 4 * C]
        found = found.reshape(len(positions), RUNS, RUNS, BLOCK, BLOCK, -1).swapaxes(2, 3)
        found = found.reshape(len(positions), PATCH_SIZE, PATCH_SIZE, -1)
        return np.ascontiguousarray(found[:, :, ::-1] if mirror else found).reshape(len(positions), PATCH_SIZE**2 * width // BLOCK**2)


def write(root: str | os.PathLike, split: str, modalities: Sequence[str] | None = None) -> list[str]:
    """Writes the blocks of prepared data that are not there yet, and returns the modalities whose blocks are there then.

    A modality whose tiles are no multiple of 4 pixels is left out. Raises ValueError for tiles of several sizes.
    """
    found, names = open_records(root, split), []
    for modality in modalities or found.modalities:
        data, readable = paths(root, split, modality)
        if readable.exists() or _write(found, modality, data, readable):
            names.append(modality)
    return names


def _write(found: Records, modality: str, data: Path, readable: Path) -> bool:
    out, known = None, np.zeros(found.count, bool)
    temporary = data.with_name(f"{data.name}.{os.getpid()}.tmp")
    there = np.flatnonzero(found.available[:, found.modalities.index(modality)])
    try:
        for i in tqdm(there, desc=f"{modality} blocks of {found.split}", unit="tile", disable=not sys.stderr.isatty()):
            try:
                tile = found.read(int(i), modality)
            except DataError:
                continue  # as bad as in the records, which are asked for it
            height, width, channels = tile.shape
            if height % BLOCK or width % BLOCK:
                return False
            shape = height // BLOCK, width // BLOCK, BLOCK**2 * channels
            if out is None:
                out = np.lib.format.open_memmap(temporary, "w+", views.stored_dtype(modality), (found.count, *shape))
            if out.shape[1:] != shape:
                raise ValueError(f"Tiles of {modality} differ in size, {height}x{width} pixels and others; blocks need one size.")
            record = found.record_number(int(i))
            known[record] = not views.is_empty(tile, modality)
            out[record] = tile.reshape(shape[0], BLOCK, shape[1], BLOCK, channels).swapaxes(1, 2).reshape(shape)
        if out is None:
            return False
        out.flush()
        os.replace(temporary, data)
    finally:
        temporary.unlink(missing_ok=True)
    temporary = readable.with_name(f"{readable.stem}.{os.getpid()}.tmp.npy")
    np.save(temporary, known)
    os.replace(temporary, readable)
    return True
