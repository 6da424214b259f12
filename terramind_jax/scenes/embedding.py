"""Scenes, embedded: a vector a patch, blended where windows overlap, or one a window; as a raster or a table.

Vectors lie in a file in the journal's folder while they are made. One row of windows is in memory at a time; a table is whole.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm.auto import tqdm

from terramind_jax import geo
from terramind_jax.model import backbone
from terramind_jax.scenes import feeding, progress, reading, windows, writing
from terramind_jax.scenes.feeding import Network, Work
from terramind_jax.scenes.journal import Journal
from terramind_jax.scenes.reading import PATCH, Scene

Pooling = Literal["none", "mean", "max"]
POOLINGS = ("none", "mean", "max")
FORMATS = {"geotiff": ".tif", "geoparquet": ".parquet"}
ROWS = 64  # of patches, copied to a raster at once


@dataclasses.dataclass(frozen=True)
class Job:
    """What holds for all scenes of a command; see `embed_scenes.run`. `layer` counts from 0."""

    network: Network
    layer: int
    pooling: Pooling
    format: str
    batch_size: int
    out: Path
    journal: Journal


def output_path(out: Path, scene: str, format: str) -> Path:
    return out / f"{scene}{FORMATS[format]}"


def embed_together(job: Job, work: Work) -> None:
    """Writes the embeddings of some scenes; goes on where the journal says."""
    with tqdm(desc=work.title, total=int(work.live.sum()), unit="window", dynamic_ncols=True) as bar:
        vectors = _patches(job, work, bar) if job.pooling == "none" else _pooled(job, work, bar)
    for scene, patches, columns in work.parts():
        path = output_path(job.out, scene.name, job.format)
        if path.exists():
            continue  # it is finished since the last time
        if job.format == "geotiff":
            _write_raster(job, scene, vectors[:, patches], path)
        elif job.pooling == "none":
            _write_table(job, scene, vectors[:, patches], (range(len(vectors)), range(scene.grid[1])), 1, path)
        else:
            starts = work.cut.rows, work.cut.at(0, range(columns.start, columns.stop))[:, 1]
            _write_table(job, scene, vectors[:, columns], starts, work.cut.size, path)


# ---- vectors ----


def _patches(job: Job, work: Work, bar: tqdm) -> np.ndarray:
    """A vector a patch, ``[h, w, D]`` on disk, NaN where no input has data."""
    c, piece, dim = work.cut, (work.name, "vectors"), job.network.module.config.dim
    done = job.journal.get(*piece)
    vectors = _on_disk(job, work, (*c.grid, dim))
    progress.resume(bar, int(work.live[:done].sum()))
    tiles = functools.partial(_tiles, job, work)
    for i, top, made in windows.joined(c, 1, lambda i: tiles(i, bar if i >= done else None), (1, c.grid[1], dim), done):
        made[0][~_there(work, top, made.shape[1])] = np.nan
        vectors[top : top + made.shape[1]] = made[0]
        _keep(job, piece, vectors, i + 1)
    return vectors


def _tiles(job: Job, work: Work, i: int, bar: tqdm | None) -> Iterator[windows.Tile]:
    for js, features in _features(job, work, i):
        for j, image in zip(js, features, strict=True):
            yield 0, work.cut.columns[j], image
            if bar is not None:
                bar.update()


def _pooled(job: Job, work: Work, bar: tqdm) -> np.ndarray:
    """A vector a window, ``[rows, columns, D]`` on disk, of its patches with data; NaN where there are none."""
    c, piece, dim = work.cut, (work.name, "vectors"), job.network.module.config.dim
    done = job.journal.get(*piece)
    vectors = _on_disk(job, work, (*work.live.shape, dim))
    progress.resume(bar, int(work.live[:done].sum()))
    pool = {"mean": np.mean, "max": np.max}[job.pooling]
    for i in range(done, len(c.rows)):
        vectors[i], there = np.nan, _there(work, c.rows[i], c.size)
        for js, features in _features(job, work, i):
            for j, image in zip(js, features, strict=True):
                vectors[i, j] = pool(image[there[:, c.columns[j] : c.columns[j] + c.size]], axis=0)
                bar.update()
        _keep(job, piece, vectors, i + 1)
    return vectors


def _features(job: Job, work: Work, i: int) -> Iterator[tuple[list[int], np.ndarray]]:
    """Columns of windows of row `i`, and what one layer says of them, ``[B, s, s, D]`` float32."""
    strip, size = feeding.read(work, i), work.cut.size
    for batch in feeding.batches(job.network, work, i, job.batch_size):
        js = [j for _, j in batch]
        values, _ = feeding.encode(job.network, work, i, js, strip)  # a backbone sees all patches: the mean where an input has no data
        x = np.asarray(backbone.features(job.network.module, job.network.variables, values)[job.layer], np.float32)
        js = list(dict.fromkeys(js))
        yield js, x.reshape(len(x), size, size, -1)[: len(js)]


def _there(work: Work, row: int, height: int) -> np.ndarray:
    """Patches with any data in rows of patches: ``[height, w]`` bool."""
    return reading.seen(work.missing(row * PATCH, height * PATCH))


def _on_disk(job: Job, work: Work, shape: tuple[int, ...]) -> np.ndarray:
    path = job.journal.folder_of(work.name) / "vectors.npy"
    return writing.mapped(path, np.float32, shape, goes_on=bool(job.journal.get(work.name, "vectors")))


def _keep(job: Job, piece: tuple[str, ...], vectors: np.ndarray, count: int) -> None:
    with writing.space(job.journal.folder):
        vectors.flush()
    job.journal.set(*piece, count=count)


# ---- files ----


def _write_raster(job: Job, scene: Scene, vectors: np.ndarray, path: Path) -> None:
    """A pixel a patch, a band a dimension, on the scene's grid made coarser."""
    a, b, c, d, e, f = scene.place.transform
    transform = (a * PATCH, b * PATCH, c, d * PATCH, e * PATCH, f)
    place = geo.Place(scene.place.crs, transform, *vectors.shape[:2])
    bands = tuple(f"embedding {i}" for i in range(vectors.shape[2]))
    layer = writing.Layer(place, bands, "float32", "", np.nan, job.journal.tags(scene.name))
    part = job.journal.folder_of(scene.name) / "part.tif"
    writing.create(part, layer)
    for row in range(0, len(vectors), ROWS):
        writing.write_rows(part, row, vectors[row : row + ROWS])
    writing.finish(part, path, layer)


def _write_table(job: Job, scene: Scene, vectors: np.ndarray, starts: tuple[Sequence[int], Sequence[int]], side: int, path: Path) -> None:
    """A row a patch or window with data: scene, first pixel row and column, embedding, and the polygon of what it covers.

    `starts` are their first rows and columns of patches, `side` how many they have.
    """
    geopandas, shapely = libraries()
    rows, columns = np.nonzero(np.isfinite(vectors).all(-1))
    tops, lefts = (np.asarray(first, np.int64)[which] * PATCH for first, which in zip(starts, (rows, columns), strict=True))
    place, side = scene.place, side * PATCH
    bottoms, rights = np.minimum(tops + side, place.height), np.minimum(lefts + side, place.width)
    corners = [place.xy(y, x) for y, x in ((tops, lefts), (tops, rights), (bottoms, rights), (bottoms, lefts))]
    frame = geopandas.GeoDataFrame(
        {"scene": scene.name, "row": tops, "column": lefts, "embedding": list(vectors[rows, columns])},
        geometry=shapely.polygons(np.stack([np.stack(corner, axis=-1) for corner in corners], axis=1)),
        crs=place.crs or None,
    )
    frame.attrs = job.journal.tags(scene.name)
    whole = job.journal.folder_of(scene.name) / path.name
    with writing.space(path):
        frame.to_parquet(whole)
        os.replace(whole, path)


def libraries():
    """GeoPandas and Shapely, which the extra ``geo`` installs."""
    try:
        import geopandas
        import shapely
    except ImportError:
        raise ImportError("A table needs GeoPandas, which is not installed: pip install 'terramind-jax[geo]'.") from None
    return geopandas, shapely
