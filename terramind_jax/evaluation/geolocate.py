"""``evaluate geolocate``: where on Earth a model says that an image was taken, and how far that is from where it was."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from terramind_jax import generate, generate_scenes, geo, modalities, sources
from terramind_jax.data.errors import DataError
from terramind_jax.data.index import Index, open_index
from terramind_jax.evaluation import generation, results
from terramind_jax.scenes import reading
from terramind_jax.scenes.feeding import padded

EARTH = 6371.0  # km, mean radius
WITHIN = (25, 200, 750, 2500)  # km: a city, a region, a country, a continent

Place = tuple[float, float]  # longitude and latitude in degrees
Sample = tuple[str, dict[str, np.ndarray], Place]


def run(
    *,
    weights: str | os.PathLike,
    data: str | os.PathLike,
    inputs: Sequence[str],
    out: str | os.PathLike,
    model: str | None = None,
    tokenizers: str | os.PathLike | None = None,
    split: str = "val",
    lulc_codes: str | None = None,
    limit: int | None = None,
    batch_size: int = generate_scenes.BATCH_SIZE,
    seed: int = 0,
    **options: Any,
) -> np.ndarray:
    """Writes ``{out}/report.md`` and ``places.csv``, and returns the distances ``[N]`` in km, infinite where no place was written.

    Args:
      weights, model, tokenizers, lulc_codes, seed: as of `generate_scenes.run`.
      data: root of shards that say where their samples are, or a folder ``MODALITY/NAME.tif``; the centre of an image is looked at.
      inputs: images. split: of shards. limit: the first so many samples; None: all.
      **options: of the generation, such as temperature.

    Raises:
      FileExistsError: `out` exists. FileNotFoundError: no model, or no sample that says where it is.
      ValueError: inputs that the model lacks, or a model that writes no coordinates.
    """
    sources.declare(generate_scenes.workdir(weights))
    rasters = generation.is_folder(data, inputs)
    reading.check_names(dict.fromkeys(inputs), lulc_codes if rasters else "terramesh")
    inputs = [modalities.input_stream(name).modality for name in inputs]
    generation.check_images(inputs)
    with results.folder(out) as partial:
        network = generate_scenes.load_network(weights, model, inputs, ["coords"], tokenizers)
        generate.check_names(network.module, inputs, ["coords"], network.tokenizers)
        side = network.module.config.image_size
        samples = _of_folder(Path(data), inputs, side, lulc_codes) if rasters else _of_shards(open_index(data, split), inputs, side)
        rows, samples = [], itertools.islice(samples, limit)
        with tqdm(desc="samples", unit="sample", dynamic_ncols=True) as bar:
            while batch := list(itertools.islice(samples, batch_size)):
                images = {name: np.stack([sample[1][name] for sample in padded(batch, batch_size)]) for name in inputs}
                made = generation.alone(network, images, "coords", seed, **options)
                rows += [_row(name, place, told) for (name, _, place), told in zip(batch, made, strict=False)]
                bar.update(len(batch))
        if not rows:
            raise FileNotFoundError(f"{data} has no sample with {', '.join(inputs)} that says where it is.")
        results.write_csv(partial / "places.csv", rows)
        places, far = np.array([[row["lon"], row["lat"]] for row in rows]), np.array([row["km"] for row in rows])
        compared = [summary(model or str(weights), far)]
        if len(rows) > 1:
            compared.append(summary("the place of another sample", distance(places, np.roll(places, len(rows) // 2, axis=0))))
        text = results.write_report(
            partial / "report.md",
            "Geolocation",
            f"Coordinates that were generated from {' + '.join(inputs)} of {len(rows)} samples. Distances are in km; tokens lie a quarter "
            "degree apart. Where a model writes no place, the distance is infinite.",
            results.compared("geolocate", compared),
        )
    print("\n" + text)
    return far


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Great-circle distance in km of places ``[..., 2]``, (lon, lat) in degrees; infinite where one is NaN."""
    (lon_a, lat_a), (lon_b, lat_b) = (np.moveaxis(np.radians(np.asarray(x, np.float64)), -1, 0) for x in (a, b))
    chord = np.sin((lat_b - lat_a) / 2) ** 2 + np.cos(lat_a) * np.cos(lat_b) * np.sin((lon_b - lon_a) / 2) ** 2  # haversine
    return np.nan_to_num(2 * EARTH * np.arcsin(np.sqrt(np.clip(chord, 0, 1))), nan=np.inf)


def summary(name: str, far: np.ndarray) -> dict[str, Any]:
    """Median, mean of what was written, and shares within so many km."""
    written = far[np.isfinite(far)]
    shares = {f"within {km} km": float((far <= km).mean()) for km in WITHIN}
    mean = float(written.mean()) if len(written) else float("nan")
    return {"places": name, "median km": float(np.median(far)), "mean km": mean, **shares, "written": len(written) / len(far)}


def _row(name: str, place: Place, told: np.ndarray) -> dict[str, Any]:
    lon, lat = map(float, told)
    return {
        "sample": name,
        "lon": place[0],
        "lat": place[1],
        "generated lon": lon,
        "generated lat": lat,
        "km": float(distance(place, told)),
    }


# ---- samples ----


def _of_shards(index: Index, inputs: Sequence[str], side: int) -> Iterator[Sample]:
    generation.check_there(index, inputs)
    for i in range(len(index)):
        place = index.coordinates(i)
        if place is None or not all(generation.has(index, i, name) for name in inputs):
            continue
        try:
            yield index.keys[i], {name: generation.center(index, i, name, side) for name in inputs}, place
        except DataError as error:
            print(f"Left out: {error}", flush=True)


def _of_folder(data: Path, inputs: Sequence[str], side: int, lulc_codes: str | None) -> Iterator[Sample]:
    for name, paths in reading.find({name: data / name for name in inputs}).items():
        scene = reading.open_scene(name, paths, lulc_codes)
        reading.check_size(scene, side)
        if scene.place.crs:
            yield name, _centre(scene, side), geo.lonlat(scene.place)


def _centre(scene: reading.Scene, side: int) -> Mapping[str, np.ndarray]:
    top, left = (scene.place.height - side) // 2, (scene.place.width - side) // 2
    images = {name: reading.read(scene, name, top, side)[0][:, left : left + side] for name in scene.paths}
    return {name: x[..., 0] if generation.is_class_map(name) else x.astype(np.float32) for name, x in images.items()}
