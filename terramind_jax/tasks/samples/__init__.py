"""``data sample``: tiny copies of the published downstream data sets, made of the embedded world, to try fine-tuning without data.

Files, names, dtypes and missing values are those of the originals, of CropTypeMapping, DynamicEarthNet, SpaceNet-7, AI4SmallFarms and
Five-Billion-Pixels what PANGAEA's readers expect; so are sizes, unless told otherwise. What the embedded world has not, burn scars,
parcels' seasons, marine debris, is painted onto it: enough to be learned from, and nothing to draw conclusions from.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from terramind_jax.data import shards
from terramind_jax.tasks.samples import images, series

# By name: what writes it, and the original's side in pixels.
WRITERS: dict[str, tuple[Callable[[str, dict[str, int], int, int], None], int]] = {
    "sen1floods11": (images.write_sen1floods11, 512),
    "burnscars": (images.write_burnscars, 512),
    "mados": (images.write_mados, 240),
    "pastis": (series.write_pastis, 128),
    "eurosat": (images.write_eurosat, 64),
    "multitemporal_crop": (series.write_multitemporal_crop, 224),
    "croptypemapping": (series.write_croptypemapping, 64),
    "dynamicearthnet": (series.write_dynamicearthnet, 1024),
    "spacenet7": (series.write_spacenet7, 1024),
    "ai4smallfarms": (images.write_ai4smallfarms, 496),
    "fivebillionpixels": (images.write_fivebillionpixels, 520),
    "xview2": (series.write_xview2, 1024),
    "biomassters": (series.write_biomassters, 256),
}


def sample(name: str, out: str | os.PathLike, *, count: int = 4, size: int | None = None, seed: int = 0) -> None:
    """Writes a copy of the data set `name` to `out`: `count` training samples and half as many, one at least, of each other split.

    Of EuroSAT they are images of every class, of SpaceNet-7 mosaics of 16 tiles. `size` is the images' side in pixels, by default the
    original's; MADOS needs a multiple of 12. `out` appears only when it is complete.
    Raises ValueError for unknown names and sizes, FileExistsError if `out` holds something.
    """
    if name not in WRITERS:
        raise ValueError(f"There are no samples of {name!r}; known are {', '.join(WRITERS)}.")
    write, published = WRITERS[name]
    size = published if size is None else size
    if count < 1 or seed < 0 or size < 12 or size % 12 and name == "mados":
        raise ValueError(
            f"Cannot make {count} samples of {size} pixels under seed {seed}; count is at least 1, size 12, of MADOS times 12."
        )
    with shards.new_folder(os.fspath(out)) as partial:
        write(partial, {"train": count, "val": max(1, count // 2), "test": max(1, count // 2)}, size, seed)
