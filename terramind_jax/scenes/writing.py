"""What is written of a scene, row by row: GeoTIFFs, which end as Cloud-Optimised GeoTIFFs with what they were made from in their tags, and
arrays that lie on disk meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.crs import CRS
from rasterio.transform import Affine
from rasterio.windows import Window

from terramind_jax import geo

BLOCK = 256  # pixels along the side of a tile of a file of `create`
SPARE = 2**24  # bytes: a disk with fewer left is full
CHUNK = 2**20  # bytes


@dataclasses.dataclass(frozen=True)
class Layer:
    """One raster to be written: what its bands are and hold where there is no data."""

    place: geo.Place
    bands: tuple[str, ...]
    dtype: str
    unit: str
    nodata: float
    tags: Mapping[str, str]
    colours: Sequence[str] = ()  # of the classes, "#rrggbb", for programs that show class maps

    @property
    def is_class_map(self) -> bool:
        return not self.dtype.startswith("float")


def create(path: Path, layer: Layer) -> None:
    """An empty BigTIFF of the full size, so that what is written into it later survives a kill, and a full disk is told at once."""
    place = layer.place
    profile = dict(driver="GTiff", height=place.height, width=place.width, count=len(layer.bands), dtype=layer.dtype, nodata=layer.nodata)
    profile |= dict(tiled=True, blockxsize=BLOCK, blockysize=BLOCK, bigtiff="yes")
    profile |= dict(crs=CRS.from_user_input(place.crs) if place.crs else None, transform=Affine(*place.transform))
    tiles = -(-place.height // BLOCK) * -(-place.width // BLOCK)
    with space(path), geo.unplaced():
        with rasterio.open(path, "w", **profile) as out:
            out.update_tags(**layer.tags)
            for i, name in enumerate(layer.bands, 1):
                out.set_band_description(i, name)
                out.set_band_unit(i, layer.unit)
            if layer.colours:
                out.write_colormap(1, {i: tuple(bytes.fromhex(colour[1:])) for i, colour in enumerate(layer.colours)})
        # GDAL fills the file when it closes it, and says nothing if that fails.
        if path.stat().st_size < tiles * BLOCK**2 * len(layer.bands) * np.dtype(layer.dtype).itemsize:
            raise OSError(errno.ENOSPC, "The file is too short", str(path))


def write_rows(path: Path, row: int, pixels: np.ndarray) -> None:
    """Whole rows of pixels ``[n, W, C]`` into a file of `create`."""
    with space(path), rasterio.open(path, "r+") as out:
        out.write(np.moveaxis(pixels, -1, 0), window=Window(0, row, pixels.shape[1], pixels.shape[0]))


def finish(source: Path, path: Path, layer: Layer) -> None:
    """The file of `create` as a Cloud-Optimised GeoTIFF at `path`, which appears whole or not at all."""
    whole = source.with_suffix(".cog.tif")
    how = "NEAREST" if layer.is_class_map else "AVERAGE"
    with space(path):
        # One thread: the order in which several write is not the same every time.
        options = dict(driver="COG", compress="DEFLATE", predictor="YES", overview_resampling=how, bigtiff="IF_SAFER", num_threads="1")
        rasterio.shutil.copy(source, whole, **options)
        geo.check_whole(whole, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(whole, path)
    source.unlink()


def mapped(path: Path, dtype: type, shape: tuple[int, ...], *, goes_on: bool) -> np.memmap:
    """An array on disk, zeros unless it `goes_on` with a file of an earlier call. The disk has set all of its blocks aside.

    Without that, a write into the map of a sparse file on a full disk would end the process with SIGBUS.
    """
    with space(path):
        if not goes_on:
            np.lib.format.open_memmap(path, "w+", dtype, shape)
            _set_aside(path)
        return np.lib.format.open_memmap(path, "r+", dtype, shape)


def _set_aside(path: Path) -> None:
    """Blocks for the whole of a sparse file."""
    with open(path, "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        for start in range(0, size, CHUNK):  # macOS, Windows: what is written has blocks
            file.seek(start)
            held = file.read(CHUNK)
            file.seek(start)
            file.write(held)


@contextlib.contextmanager
def space(path: Path) -> Iterator[None]:
    """Tells of a full disk, which GDAL reports as this or that, as an OSError with ENOSPC and one sentence."""
    try:
        yield
    except Exception as error:  # some of GDAL's have no name in `rasterio.errors`
        left = shutil.disk_usage(next(p for p in Path(path).absolute().parents if p.exists())).free
        if getattr(error, "errno", None) == errno.ENOSPC or left < SPARE:
            full = OSError(f"The disk of {path.parent} is full; make room, and the same command goes on where it stopped.")
            full.errno = errno.ENOSPC
            raise full from error
        raise
