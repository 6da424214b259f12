"""``data synthesize``: shards of the embedded world, in the layout and formats of TerraMesh; and the same scenes as GeoTIFFs."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterator

import numpy as np
import rasterio.warp
from tqdm import tqdm

from terramind_jax import geo
from terramind_jax.data import shards, world
from terramind_jax.data.world.draws import PIXEL
from terramind_jax.data.world.scene import SUBSETS, subset_of

INFO = "dataset_info.json"


@dataclasses.dataclass(frozen=True)
class _Job:
    seed: int
    split: str
    subset: str
    shard: int
    index: int
    size: int


def synthesize(
    out: str,
    *,
    scenes: int = 512,
    val_scenes: int = 64,
    seed: int = 0,
    size: int = 264,
    workers: int | None = None,
    shard_size: int = 64,
) -> None:
    """Writes `scenes` training and `val_scenes` validation scenes to ``{out}/{split}/{modality}/{subset}_shard_{number}.tar``.

    Every modality stores ``bands [1, C, y, x]``, its place and time; Sentinel-2 also ``cloud_mask``, noisy modalities ``truth``, the
    expected value without sensor noise and speckle. Sentinel-2's attribute ``offset`` is what was added to stored values. The
    arrays do not depend on `workers` (default: all cores). `out` appears only when it is complete; if it is already there with the
    same arguments nothing is done, and any other content of `out` is a FileExistsError.
    """
    arguments = dict(scenes=scenes, val_scenes=val_scenes, seed=seed, size=size, shard_size=shard_size)
    if scenes < 1 or val_scenes < 0 or shard_size < 1 or seed < 0:
        raise ValueError(f"Cannot synthesize {arguments}: scenes and shard_size are at least 1, val_scenes and seed at least 0.")
    world.check_size(size)
    if _finished(out, arguments):
        print(f"{out} already holds this synthesis; nothing to do.")
        return
    jobs = [*_jobs("train", scenes, seed, size, shard_size), *_jobs("val", val_scenes, seed, size, shard_size)]
    with shards.new_folder(out) as partial, tqdm(total=len(jobs), desc="synthesize", unit="scene") as bar:
        for (split, subset, number), group in itertools.groupby(_samples(jobs, workers), key=lambda pair: _shard(pair[0])):
            _write_shard(partial, split, subset, number, group, bar)
        _write_info(partial, arguments, jobs)


def write_tiles(out: str | os.PathLike, *, count: int = 4, size: int = 264, seed: int = 0) -> list[str]:
    """Writes `count` validation scenes with Sentinel-1 GRD as GeoTIFFs, ``{out}/{modality}/{name}.tif``, and returns their names.

    They stand for a user's own tiles: `pack`, ``generate``, ``embed`` and the notebooks read such a folder. `size` is in pixels, a multiple
    of 6, 48 at least. `out` appears only when it is complete; a ValueError says which numbers are wrong, FileExistsError that `out` holds
    something.
    """
    if count < 1 or seed < 0:
        raise ValueError(f"Cannot make {count} tiles under seed {seed}; count is at least 1, seed at least 0.")
    world.check_size(size)
    indices = itertools.islice((i for i in itertools.count() if subset_of(i) == "ssl4eos12"), count)
    names = []
    with shards.new_folder(os.fspath(out)) as partial:
        for index in indices:
            scene = world.scene(seed, index, "val", size)
            for name, array in scene.arrays.items():
                geo.write(os.path.join(partial, name, f"{scene.key}.tif"), array, _place(scene, size), modality=name)
            names.append(scene.key)
    return names


def _finished(out: str, arguments: dict) -> bool:
    """True if `out` holds this very synthesis, False if it is free; anything else in it is an error."""
    if not os.path.exists(out) or (os.path.isdir(out) and not os.listdir(out)):
        return False
    path = os.path.join(out, INFO)
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as f:
            info = json.load(f)
        if info.get("arguments") == arguments:
            return True
        raise FileExistsError(f"{out} holds a data set made with {info.get('arguments')}, not {arguments}; choose another folder.")
    raise FileExistsError(f"{out} is not empty and holds no {INFO} of a finished synthesis; choose another folder.")


def _jobs(split: str, count: int, seed: int, size: int, shard_size: int) -> Iterator[_Job]:
    """Scenes in shard order: numbers count from 1 through ``majortom`` and on through ``ssl4eos12``, as published."""
    number = 0
    for subset in SUBSETS:
        for i, index in enumerate(k for k in range(count) if subset_of(k) == subset):
            number += i % shard_size == 0
            yield _Job(seed, split, subset, number, index, size)


def _shard(job: _Job) -> tuple[str, str, int]:
    return job.split, job.subset, job.shard


def _samples(jobs: list[_Job], workers: int | None) -> Iterator[tuple[_Job, tuple[str, dict[str, bytes]]]]:
    """(job, (key, payload by modality)) in the order of `jobs`, made by `workers` processes."""
    workers = min(len(jobs), len(os.sched_getaffinity(0)) if workers is None and hasattr(os, "sched_getaffinity") else workers or 1)
    if workers <= 1:
        yield from ((job, _make(job)) for job in jobs)
        return
    # Not fork: the caller may have started JAX, whose threads do not survive one.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from zip(jobs, pool.imap(_make, jobs, chunksize=1), strict=True)
        pool.close()
        pool.join()


def _make(job: _Job) -> tuple[str, dict[str, bytes]]:
    scene = world.scene(job.seed, job.index, job.split, job.size)
    place = geo.place_to_attributes(_place(scene, job.size))
    return scene.key, {name: _payload(scene, name, place) for name in scene.arrays}


def _place(scene: world.Scene, size: int) -> geo.Place:
    """The scene's grid: 10 m pixels of its UTM zone."""
    crs = geo.utm(scene.lon, scene.lat)
    (x,), (y,) = rasterio.warp.transform("EPSG:4326", crs, [scene.lon], [scene.lat])
    west, north = round(x / PIXEL - size / 2) * PIXEL, round(y / PIXEL + size / 2) * PIXEL
    return geo.Place(crs, (PIXEL, 0.0, west, 0.0, -PIXEL, north), size, size)


def _payload(scene: world.Scene, name: str, place: dict[str, str]) -> bytes:
    arrays = {
        "bands": _planes(scene.arrays[name]),
        "center_lon": np.float64(scene.lon),
        "center_lat": np.float64(scene.lat),
        "time": np.array([scene.times[name]], np.int64),
        "spatial_ref": np.int64(0),
    }
    if name.startswith("S2"):
        arrays["cloud_mask"] = scene.cloud_mask[None]
    if name in scene.truth:
        arrays["truth"] = _planes(scene.truth[name])
    attributes = {"modality": name, "subset": scene.subset}
    if name in scene.offsets:
        attributes["offset"] = scene.offsets[name]
    return shards.write_sample(arrays, attrs=attributes, array_attrs={"bands": {"grid_mapping": "spatial_ref"}, "spatial_ref": place})


def _planes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(array, -1, 0))[None]  # [1, C, y, x]


def _write_shard(root: str, split: str, subset: str, number: int, group, bar: tqdm) -> None:
    with contextlib.ExitStack() as stack:
        writers: dict[str, shards.ShardWriter] = {}
        for _, (key, payloads) in group:
            for name, payload in payloads.items():
                if name not in writers:
                    writers[name] = stack.enter_context(shards.ShardWriter(root, split, name, subset, number))
                writers[name].add(key, payload)
            bar.update()


def _write_info(root: str, arguments: dict, jobs: list[_Job]) -> None:
    counts: dict[str, dict[str, int]] = {}
    for job in jobs:
        split = counts.setdefault(job.split, dict.fromkeys(SUBSETS, 0))
        split[job.subset] += 1
    info = {"description": "Procedural scenes of the embedded world, in TerraMesh's layout.", "arguments": arguments, "scenes": counts}
    with open(os.path.join(root, INFO), "w", encoding="utf-8") as f:
        json.dump(info, f, indent=2)
