"""Reading prepared data, the ArrayRecord files that `terramesh` writes: an index of records instead of tars, with what training asks of it.

``{root}/{split}/records.index`` lists keys and what each location has; record `i` of the TFDS data set is its location `i`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from terramind_jax import modalities as registry
from terramind_jax.data import clouds, scan, storage, table
from terramind_jax.data.columns import Keys
from terramind_jax.data.errors import DataError
from terramind_jax.data.mapped import COORDINATES, Mapped

if TYPE_CHECKING:
    from terramind_jax.geo import Place

DATASET, VERSION = "terramesh", "1.0.0"
NAME = "records.index"


def is_prepared(root: str | os.PathLike, split: str) -> bool:
    """Whether `root` holds a split as records, not as tars."""
    return os.path.isfile(os.path.join(root, split, NAME))


class Records:
    """The samples of one split of prepared data; attributes and methods are those of `index.Index`.

    Whoever unpickles it opens the same files. A record is read whole, once for all that is asked of it in a row.
    """

    def __init__(self, root: str | os.PathLike, split: str, modalities: Sequence[str]):
        self.path = os.path.join(root, split, NAME)
        found = table.read(self.path)
        if found is None:
            raise FileNotFoundError(f"{self.path} is missing or damaged; make the data set again.")
        self._id = found.meta["id"]
        self.root, self.split, self.modalities = os.fspath(root), split, tuple(modalities)
        names = found.meta["modalities"]
        available, tokens = (_columns(found.arrays[a], names, self.modalities) for a in ("available", "has_tokens"))
        wanted = (available if available.any() else tokens).any(1)  # as with tars, a location without pixels is none, if others have some
        self._rows = None if wanted.all() else np.flatnonzero(wanted)
        kept = slice(None) if self._rows is None else self._rows
        self.available, self.has_tokens = available[kept], tokens[kept]
        self.keys = Keys(found.arrays["keys"], self._rows)
        self.subsets, self.subset = tuple(found.meta["subsets"]), found.arrays["subset"][kept]
        self.count = len(found.arrays["keys"])  # records, of which some may have none of the modalities
        self._files, self._lock, self._last = None, threading.Lock(), threading.local()
        self._mapped = Mapped(root, split)

    def __reduce__(self):
        return Records, (self.root, self.split, self.modalities)

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return f"Records({len(self)} samples, {', '.join(self.modalities)})"

    def stored_bytes(self) -> int:
        """Bytes of all records, with all that they hold."""
        return self._open().dataset_info.splits[self.split].num_bytes

    def read_nearby(self, window: int, readers: int = 1) -> None:
        """A disk needs no help with an order that visits neighbours together."""

    def in_storage_order(self, samples: np.ndarray) -> np.ndarray:
        return np.sort(samples)

    def read(self, i: int, modality: str, out: np.ndarray | None = None) -> np.ndarray:
        """[H, W, C] in the stored dtype, never in `out`. `DataError` if it is not there, or could not be read when prepared."""
        found = self._record(i)
        if not found["available"].get(modality):
            raise DataError(f"{self._where(i)} has no {modality}, or none that could be read when it was made.")
        return found["pixels"][modality]

    def patches(self, i: int, modality: str, variant: int, image_size: int, positions: np.ndarray) -> np.ndarray | None:
        """Patches at `positions` of a fixed crop ``[n, 16 * 16 * C]``, read alone where pixels are `mapped`; else None."""
        return self._mapped.patches(modality, self.record_number(i), variant, image_size, positions)

    def tokens(self, i: int, modality: str) -> np.ndarray:
        """Stored token ids ``[variants, h, w]`` of sample `i`, one grid a fixed crop; of K codebooks ``[..., K]``."""
        grid = self._mapped.row(f"{modality}_tokens", self.record_number(i))
        grid = self._record(i)["tokens"].get(modality) if grid is None else grid
        if grid is None or not len(grid):
            raise DataError(f"{self._where(i)} has no tokens of {modality}, or none that could be made.")
        return grid

    def coordinates(self, i: int) -> tuple[float, float] | None:
        """(longitude, latitude) of the centre in degrees; None if not known."""
        place = self._mapped.row(COORDINATES, self.record_number(i))
        longitude, latitude = (self._record(i)["coordinates"] if place is None else place).tolist()
        return None if np.isnan(longitude) else (longitude, latitude)

    def cloud_mask(self, i: int) -> np.ndarray | None:
        """``[H, W]`` uint8, the codes of `clouds`; None if the shards had none."""
        mask = self._record(i).get(clouds.NAME)
        return None if mask is None or not len(mask) else mask

    def place(self, i: int) -> Place | None:
        """Where sample `i` lies on Earth (CRS, transform, size), if its shards said so."""
        from terramind_jax import geo  # GDAL takes long to load, and data workers never ask

        found = self._record(i)
        if np.isnan(found["transform"]).any():
            return None
        return geo.Place(found["crs"].decode(), tuple(found["transform"].tolist()), *found["size"].tolist())

    def check_tokens(self) -> None:
        """Records hold pixels and tokens together."""

    def token_table(self) -> table.Table:
        """Keys and ``has_tokens`` as an index of token shards has them."""
        there = self.has_tokens.any(0)
        columns = [f"{m}_tokens" for m, some in zip(self.modalities, there, strict=True) if some]
        counts = dict(zip(columns, self.has_tokens.sum(0)[there].tolist(), strict=True))
        meta = {"id": self._id, "columns": columns, "counts": counts, "faults": {}}
        has_tokens = self.has_tokens if there.all() else self.has_tokens[:, there]
        return table.Table(meta, {"keys": self.keys.raw(slice(None)), "available": has_tokens})

    def record_number(self, i: int) -> int:
        """The place of sample `i` among all records."""
        return i if self._rows is None else int(self._rows[i])

    def _record(self, i: int) -> dict[str, Any]:
        """The last one is kept, by each thread: what is read of a sample is read in a row."""
        if getattr(self._last, "number", None) != i:
            try:
                self._last.record = self._open()[self.record_number(i)]
            except Exception as error:  # ArrayRecord and protobuf raise many things
                raise DataError(f"{self._where(i)} cannot be read ({type(error).__name__}: {error}); make the data set again.") from error
            self._last.number = i
        return self._last.record

    def _open(self) -> Any:
        with self._lock:
            if self._files is None:
                import tensorflow_datasets as tfds  # takes long to load, and tars do without

                folder = os.path.join(self.root, DATASET, VERSION)
                self._files = tfds.builder_from_directory(folder).as_data_source(self.split)
            return self._files

    def _where(self, i: int) -> str:
        return f"{storage.join(self.root, DATASET)}, split {self.split}: sample {self.keys[i]!r}"


def _columns(there: np.ndarray, names: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    """Bool ``[n, len(wanted)]``, False for what no record has; of the file itself where it can be."""
    if list(names) == list(wanted):
        return there
    return np.stack([there[:, names.index(m)] if m in names else np.zeros(len(there), bool) for m in wanted], 1)


def open_records(
    root: str | os.PathLike, split: str, modalities: Sequence[str] | None = None, *, tokens_root: str | os.PathLike | None = None
) -> Records:
    """The records of ``{root}/{split}`` as `index.open_index` opens shards; their tokens are inside, so `tokens_root` is refused."""
    if tokens_root and os.fspath(tokens_root) != os.fspath(root):
        raise ValueError(f"{root} is prepared data, which holds its tokens; leave data.tokens empty, or prepare again with --tokens.")
    scan.declare(root)
    known = [m.name for m in registry.MODALITIES.values() if m.is_image]
    wanted = known if modalities is None else [m for m in modalities if registry.get(m).is_image]
    found = Records(root, split, wanted)
    if not len(found):
        raise FileNotFoundError(f"No samples in {os.path.join(root, split)} with a modality among {', '.join(wanted)}; prepare them.")
    if modalities is not None:
        return found
    return Records(root, split, [m for k, m in enumerate(wanted) if found.available[:, k].any() or found.has_tokens[:, k].any()])
