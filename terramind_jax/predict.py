"""GeoTIFFs in, generated GeoTIFFs and pictures out: what the command ``generate`` does."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from terramind_jax import generate, geo, modalities, plot, sources, zoo
from terramind_jax.convert.files import check_free
from terramind_jax.data.stored import LULC_CODES, to_stored
from terramind_jax.model import TerraMind
from terramind_jax.train import pretrain, tokenizer
from terramind_jax.weights import load

CENTRE_ONLY = 1.25  # a side shorter than this many tiles, as TerraMesh's 264 pixels, gives its centre; a longer one is covered
BATCH_SIZE = 8
SUFFIXES = (".tif", ".tiff")


def run(
    *,
    weights: str | os.PathLike,
    inputs: Mapping[str, str | os.PathLike],
    to: Sequence[str],
    out: str | os.PathLike,
    tokenizers: str | os.PathLike | None = None,
    model: str | None = None,
    lulc_codes: str | None = None,
    seed: int = 0,
    timesteps: int = 10,
    **options,
) -> list[Path]:
    """Generates modalities of one scene, or of every scene of a folder.

    Writes ``{out}/{modality}/{scene}.tif`` on the input's grid, float32 in the modality's unit (LULC: uint8 classes),
    ``{out}/coords/{scene}.json``, and the picture ``{out}/{scene}.png``. Scenes are cut into tiles of the size the model was trained at.
    A side shorter than 1.25 tiles gives its centre tile; a longer one is covered, its last tile shifted back to the edge. Nothing that
    exists is replaced.

    Args:
      weights: work directory of a pretrained model, or a folder that holds one as ``model``; with `model`, what `weights.load` takes.
      inputs: GeoTIFF, or folder of GeoTIFFs that share their file names, by modality. For ``coords`` a raster gives its position.
      to: modalities in the order of generation; each conditions the next.
      tokenizers: folder with one tokenizer a modality; by default ``tokenizers`` in or beside `weights`.
      model: name of a released model, such as ``terramind_v1_base``; a work directory knows what it is.
      lulc_codes: what the codes of land-cover rasters mean, see `data.pack.LULC_CODES`; needed if LULC is an input.
      seed: of the first tile of a scene; the tiles after it count on from there.
      timesteps: steps of a diffusion decoder; decoders that have none ignore it.
      **options: of `decoding.generate_tokens`, such as steps and temperature.

    Returns:
      The paths of the GeoTIFFs and JSON files.

    Raises:
      FileExistsError: an output exists already.
      FileNotFoundError: no model, tokenizer or raster where one is expected.
      ValueError: unknown modalities, rasters of the wrong bands or grid, too small, or with NaN.
    """
    sources.declare(_workdir(weights))
    _check_names(inputs, to, lulc_codes)
    scenes = find_scenes(inputs)
    for path in (p for name in scenes for p in outputs(Path(out), name, to)):
        check_free(path)
    print(f"Loading {model or weights}", flush=True)
    if model is None:
        tile, make = _trained(weights, list(inputs), list(to), tokenizers)
    else:
        tile, make = _released(model, weights, list(inputs), list(to), tokenizers)
    make = functools.partial(make, timesteps=timesteps, **options)
    written = []
    for name, paths in scenes.items():
        arrays, place, whole = read_scene(paths, tile, lulc_codes)
        if (place.height, place.width) != (whole.height, whole.width):
            print(f"{name}: of {whole.height}x{whole.width} pixels only {place.height}x{place.width} in the middle", flush=True)
        made = _generate_scene(make, arrays, place, tile, seed)
        written += write_scene(Path(out), name, made, place)
        _draw(Path(out) / f"{name}.png", name, arrays, made)
        print(f"{name}: {', '.join(to)} -> {out}", flush=True)
    return written


# ---- models: the size of a tile, and a function of (inputs, seed) ----


def _trained(weights: str | os.PathLike, inputs: list[str], to: list[str], tokenizers: str | os.PathLike | None):
    if not Path(weights).exists():
        hint = "; to generate with hub or random weights say which model with --model" if weights in ("hub", "random") else ""
        raise FileNotFoundError(f"There is no work directory {weights}{hint}.")
    module, variables, _ = pretrain.load(_workdir(weights))
    loaded = load_tokenizers(module, inputs, to, Path(tokenizers) if tokenizers else _tokenizer_folder(weights))
    return module.config.image_size, functools.partial(generate.generate, module, variables, loaded, outputs=to)


def _released(name: str, weights: str | os.PathLike, inputs: list[str], to: list[str], tokenizers: str | os.PathLike | None):
    entry = zoo.get(name)
    if entry.kind not in ("backbone", "generate"):
        raise ValueError(f"{name} does not generate; choose one such as terramind_v1_base.")
    name = f"{name.removesuffix('_generate')}_generate"
    options = {} if tokenizers is None else {"tokenizers": tokenizers}
    model = load(name, weights, modalities=inputs, output_modalities=to, standardize=True, **options)
    return model.module.config.image_size, model.generate


# ---- what is read ----


def find_scenes(inputs: Mapping[str, str | os.PathLike]) -> dict[str, dict[str, Path]]:
    """``{scene: {modality: file}}`` of files, which make one scene, or of folders, whose equal file names do."""
    paths = {name: Path(path) for name, path in inputs.items()}
    missing = [path for path in paths.values() if not path.exists()]
    if missing:
        raise FileNotFoundError(f"There is no file or folder {missing[0]}; expected a GeoTIFF or a folder of GeoTIFFs.")
    if all(path.is_file() for path in paths.values()):
        return {next(iter(paths.values())).stem: paths}
    if any(path.is_file() for path in paths.values()):
        raise ValueError("The inputs mix files and folders; give files for one scene, or folders for many.")
    files = {name: {p.stem: p for p in sorted(path.iterdir()) if p.suffix.lower() in SUFFIXES} for name, path in paths.items()}
    empty = [str(paths[name]) for name, found in files.items() if not found]
    if empty:
        raise ValueError(f"The folder {empty[0]} is empty: it holds no GeoTIFF ({', '.join(SUFFIXES)}).")
    shared = sorted(set.intersection(*(set(found) for found in files.values())))
    if not shared:
        raise ValueError(f"The folders {', '.join(map(str, paths.values()))} share no file name; a scene has one name in all of them.")
    return {scene: {name: found[scene] for name, found in files.items()} for scene in shared}


def read_scene(paths: Mapping[str, Path], tile: int, lulc_codes: str | None = None) -> tuple[dict[str, np.ndarray], geo.Place, geo.Place]:
    """Arrays ``[H, W, C]`` of one scene, cut to the part that tiles will cover, its place and that of the whole; ``coords`` is left empty.

    Values are checked, and rounded, as `data.pack` does, so that a model sees what it was trained on.
    """
    arrays, first = {}, None
    for name, path in paths.items():
        stream = modalities.input_stream(name)
        if stream.kind == "sequence":
            place, arrays[name] = geo.place(path), np.empty(0)
        else:
            raster = geo.read(path, stream.modality)
            place, arrays[name] = raster.place, np.asarray(raster)
        if first is not None and not geo.same_grid(place, first[1]):
            raise ValueError(f"{path} and {first[0]} do not lie on one grid; resample one of them to the other.")
        first = first or (path, place)
    path, place = first
    if min(place.height, place.width) < tile:
        raise ValueError(f"{path} is {place.height}x{place.width} pixels; expected at least {tile}x{tile}.")
    (top, height), (left, width) = (_covered(side, tile) for side in (place.height, place.width))
    for name, array in arrays.items():
        if array.size:
            part, modality = array[top : top + height, left : left + width], modalities.input_stream(name).modality
            nodata = geo.read_header(paths[name], modality).nodata
            arrays[name] = to_stored(part, modality, str(paths[name]), nodata=nodata, lulc_codes=lulc_codes)
    return arrays, place.window(top, left, height, width), place


def load_tokenizers(module: TerraMind, inputs: Sequence[str], to: Sequence[str], folder: Path) -> dict[str, tuple]:
    """The tokenizers that generating `to` from `inputs` needs, from ``{folder}/{modality}``, checked against the model."""
    known = {stream.key: stream for stream in module.config.streams}
    needed = [known.get(stream.key, stream) for stream in (*map(modalities.input_stream, inputs), *map(modalities.output_stream, to))]
    loaded = {}
    for stream in needed:
        path = folder / stream.modality
        if stream.kind != "tokens" or stream.modality in loaded or stream.key not in known:
            continue  # a stream that the model lacks is what `generate` objects to
        if not path.is_dir():
            raise FileNotFoundError(f"There is no tokenizer {path}; expected the work directory of a trained tokenizer.")
        loaded[stream.modality] = tokenizer.load(path)
        size = loaded[stream.modality][0].config.codebook_size
        if size != stream.vocab_size:
            raise ValueError(f"The tokenizer {path} has {size} codes, but the model was trained with {stream.vocab_size}.")
    return loaded


def _check_names(inputs: Mapping[str, object], to: Sequence[str], lulc_codes: str | None) -> None:
    if not inputs or not to:
        raise ValueError(f"{'No input' if not inputs else 'No output'} is named; generation needs at least one of each.")
    if lulc_codes is not None and lulc_codes not in LULC_CODES:
        raise ValueError(f"Unknown LULC codes {lulc_codes!r}; expected one of {', '.join(LULC_CODES)}.")
    streams = (*map(modalities.input_stream, inputs), *map(modalities.output_stream, to))
    if any(stream.modality == "caption" for stream in streams):
        raise ValueError("A caption is text, which this command neither reads nor writes; load the model in Python for it.")
    for name in inputs:
        if modalities.input_stream(name).modality == "LULC" and lulc_codes is None:
            raise ValueError(f"The codes of {name} are not declared; say with --lulc_codes what they are: {', '.join(LULC_CODES)}.")
    for name in to:
        stream = modalities.output_stream(name)
        if name in modalities.MODALITIES and name != stream.modality:
            raise ValueError(f"No model generates {name}; {stream.modality} is the nearest that there is.")


def _workdir(weights: str | os.PathLike) -> Path:
    return Path(weights) / "model" if (Path(weights) / "model" / "config.json").is_file() else Path(weights)


def _tokenizer_folder(weights: str | os.PathLike) -> Path:
    inside, beside = Path(weights) / "tokenizers", Path(weights).resolve().parent / "tokenizers"
    return inside if inside.is_dir() else beside


# ---- tiles ----


def _covered(side: int, tile: int) -> tuple[int, int]:
    """First pixel and length of what is used of a side."""
    return ((side - tile) // 2, tile) if side < CENTRE_ONLY * tile else (0, side)


def tiles(height: int, width: int, tile: int) -> Iterator[tuple[slice, slice]]:
    """Windows that cover an image, row by row; the last of a row or column is shifted back to the edge."""
    rows, columns = (sorted({min(start, side - tile) for start in range(0, side, tile)}) for side in (height, width))
    for row in rows:
        for column in columns:
            yield slice(row, row + tile), slice(column, column + tile)


def _generate_scene(make, arrays: Mapping[str, np.ndarray], place: geo.Place, tile: int, seed: int) -> dict[str, np.ndarray]:
    """Every output of one scene ``[H, W, C]``, LULC as ``[H, W]`` uint8 classes, coords ``[tiles, 2]``."""
    windows = list(tiles(place.height, place.width, tile))
    progress = tqdm(total=len(windows), unit="tile", dynamic_ncols=True, disable=len(windows) == 1)
    batch_size = min(BATCH_SIZE, len(windows))
    made: dict[str, np.ndarray] = {}
    for start in range(0, len(windows), batch_size):
        # The last batch repeats the last tile: one shape, one program.
        at = np.minimum(np.arange(start, start + batch_size), len(windows) - 1)
        batch = {name: _batch(array, place, [windows[i] for i in at]) for name, array in arrays.items()}
        for name, tiles_made in make(inputs=batch, seed=seed + at).items():
            for i, x in zip(at, tiles_made, strict=True):
                _put(made, name, x, windows[i], i, (len(windows), place.height, place.width))
        progress.update(min(batch_size, len(windows) - start))
    progress.close()
    return made


def _batch(array: np.ndarray, place: geo.Place, windows: Sequence[tuple[slice, slice]]) -> np.ndarray:
    if array.size:
        return np.stack([array[window] for window in windows])
    middles = [((rows.start + rows.stop) / 2, (columns.start + columns.stop) / 2) for rows, columns in windows]
    return np.array([geo.lonlat(place, *middle) for middle in middles])


def _put(made: dict[str, np.ndarray], name: str, x: np.ndarray, window, i: int, shape: tuple[int, int, int]) -> None:
    """Writes one generated tile into its scene; `shape` is the number of tiles and the scene's size."""
    stream = modalities.output_stream(name)
    is_image = stream.kind != "sequence"
    x = x.argmax(-1).astype(np.uint8) if is_image and modalities.get(stream.modality).kind == "classes" else x
    if name not in made:
        made[name] = np.zeros((*shape[1:], *x.shape[2:]) if is_image else (shape[0], *x.shape), x.dtype)
    made[name][window if is_image else i] = x


# ---- what is written ----


def outputs(out: Path, name: str, to: Sequence[str]) -> list[Path]:
    """The files of one scene: its picture, and for each of `to` a GeoTIFF, of sequences JSON."""
    suffix = {modality: "json" if modalities.output_stream(modality).kind == "sequence" else "tif" for modality in to}
    return [out / f"{name}.png", *(out / modality / f"{name}.{suffix[modality]}" for modality in to)]


def write_scene(out: Path, name: str, made: Mapping[str, np.ndarray], place: geo.Place) -> list[Path]:
    """One file a modality: GeoTIFF, or for coords JSON with one ``{"lon", "lat"}`` a tile."""
    _, *written = outputs(out, name, list(made))
    for path, (modality, array) in zip(written, made.items(), strict=True):
        stream = modalities.output_stream(modality)
        path.parent.mkdir(parents=True, exist_ok=True)
        if stream.kind == "sequence":
            path.write_text(json.dumps([{"lon": _number(lon), "lat": _number(lat)} for lon, lat in array]) + "\n")
        else:
            geo.write(path, array, like=place, modality=stream.modality)
    return written


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _draw(path: Path, name: str, arrays: Mapping[str, np.ndarray], made: Mapping[str, np.ndarray]) -> None:
    inputs = {m: x for m, x in arrays.items() if x.size}
    outputs = {m: x for m, x in made.items() if modalities.output_stream(m).kind != "sequence"}
    if outputs:
        plot.contact_sheet(path, [plot.Scene(name, inputs, outputs)])
