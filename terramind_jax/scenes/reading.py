"""What a scene's rasters hold, window by window: values as a model takes them, and where there are none."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from terramind_jax import geo, modalities
from terramind_jax.bands import fill_missing
from terramind_jax.data.stored import LULC_CODES, is_nodata, to_stored
from terramind_jax.scenes.windows import Cut

PATCH = modalities.PATCH_SIZE
SUFFIXES = (".tif", ".tiff")


@dataclasses.dataclass(frozen=True)
class Scene:
    """Rasters of one place on one grid by user name; ``coords`` is a raster that only gives its position."""

    name: str
    paths: Mapping[str, Path]
    place: geo.Place
    nodata: Mapping[str, float | None]  # what each file says
    lulc_codes: str | None = None
    bands: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)  # of those rasters that lack some of their modality's

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches; the last ones may reach over the edge."""
        return -(-self.place.height // PATCH), -(-self.place.width // PATCH)

    @property
    def images(self) -> list[str]:
        return [name for name in self.paths if modalities.input_stream(name).kind != "sequence"]


def find(inputs: Mapping[str, str | os.PathLike]) -> dict[str, dict[str, Path]]:
    """``{scene: {modality: file}}`` of files, which make one scene, or of folders, whose equal file names do."""
    paths = {name: Path(path) for name, path in inputs.items()}
    missing = [path for path in paths.values() if not path.exists()]
    if missing:
        raise FileNotFoundError(f"There is no file or folder {missing[0]}; expected a GeoTIFF or a folder of GeoTIFFs.")
    if all(path.is_file() for path in paths.values()):
        return {next(iter(paths.values())).stem: paths}
    if any(path.is_file() for path in paths.values()):
        raise ValueError("The inputs mix files and folders; give files for one scene, or folders for many.")
    files = {name: _of_folder(path) for name, path in paths.items()}
    empty = [(paths[name], paths[name] / name) for name, found in files.items() if not found]
    if empty:
        folder, inner = empty[0]
        hint = f"; did you mean {inner}?" if inner.is_dir() else "."
        raise ValueError(f"The folder {folder} holds no GeoTIFF ({', '.join(SUFFIXES)}){hint}")
    shared = sorted(set.intersection(*(set(found) for found in files.values())))
    if not shared:
        raise ValueError(f"The folders {', '.join(map(str, paths.values()))} share no file name; a scene has one name in all of them.")
    alone = sorted(set.union(*(set(found) for found in files.values())) - {*shared})
    if alone:
        folders = ", ".join(map(str, paths.values()))
        print(f"Left out: {len(alone)} scenes that are not in all of {folders}; the first is {alone[0]}.", flush=True)
    return {scene: {name: found[scene] for name, found in files.items()} for scene in shared}


def _of_folder(folder: Path) -> dict[str, Path]:
    """GeoTIFFs by scene; a ValueError for two of one."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and found.setdefault(path.stem, path) != path:
            raise ValueError(f"{found[path.stem]} and {path} are of one scene, {path.stem}; rename one of them, or take it away.")
    return found


def check_names(inputs: Mapping[str, object], lulc_codes: str | None) -> None:
    """Raises a ValueError for modalities that are no rasters, and for undeclared codes of land cover."""
    if not inputs:
        raise ValueError("No input is named; at least one is needed.")
    if lulc_codes is not None and lulc_codes not in LULC_CODES:
        raise ValueError(f"Unknown LULC codes {lulc_codes!r}; expected one of {', '.join(LULC_CODES)}.")
    for name in inputs:
        modality = modalities.input_stream(name).modality
        if modality == "caption":
            raise ValueError("A caption is text, which this command neither reads nor writes; load the model in Python for it.")
        if modality == "LULC" and lulc_codes is None:
            raise ValueError(f"The codes of {name} are not declared; say with --lulc_codes what they are: {', '.join(LULC_CODES)}.")


def known_bands(inputs: Iterable[str], bands: Mapping[str, Sequence[str]] | None) -> dict[str, list[str]]:
    """Which bands files have, by input, in the names of `modalities`, unless all in their order.

    Sentinel-2's may be given as B01 ... B12. Raises a ValueError for what is no input, or no bands of it.
    """
    found = {}
    for name, given in (bands or {}).items():
        if name not in inputs:
            raise ValueError(f"Bands are given for {name}, which is no input; inputs: {', '.join(inputs)}.")
        known = modalities.get(modalities.input_stream(name).modality).bands
        found[name] = [geo.band_name(band) for band in given]
        if not given or len(set(found[name])) < len(given) or not {*found[name]} <= {*known}:
            told = f"expected some of {', '.join(known)}, each once" if known else "it has none"
            raise ValueError(f"The bands given for {name} are {', '.join(given) or 'none'}; {told}.")
        if found[name] == [*known]:
            del found[name]
    return found


def open_scene(
    name: str, paths: Mapping[str, Path], lulc_codes: str | None = None, bands: Mapping[str, Sequence[str]] | None = None
) -> Scene:
    """One scene, checked without reading pixels: bands, one grid for all, and a CRS where a raster shall give its position.

    `bands` are those of files that lack some of their modality's, as `known_bands` has them, in the order of the file.
    """
    first, nodata, bands = None, {}, bands or {}
    for modality, path in paths.items():
        stream = modalities.input_stream(modality)
        header = geo.read_header(path)
        if stream.kind != "sequence":
            _check_bands(path, header, modality, stream.modality, bands.get(modality))
        if stream.kind == "sequence" and not header.place.crs:
            raise ValueError(f"{path} does not say where on Earth it lies (it has no CRS), so it gives no {modality}.")
        first, nodata[modality] = first or (path, header.place), header.nodata
        if not geo.same_grid(header.place, first[1]):
            raise ValueError(f"{path} and {first[0]} do not lie on one grid; resample one of them to the other.")
    return Scene(name, paths, first[1], nodata, lulc_codes, bands)


def _check_bands(path: Path, header: geo.Header, name: str, modality: str, given: Sequence[str] | None) -> None:
    """Raises a ValueError unless the file of an input has the bands that are `given`, or all of its modality."""
    known = modalities.get(modality).bands
    hint = ""
    if given is None and 0 < header.bands < len(known):
        hint = f"generate and embed take some of them if told which, in the file's order: --bands {name}={known[0]},..."
    geo.check_names(path, header, known if given is None else given, modality, hint)


def check_size(scene: Scene, side: int) -> None:
    """Raises a ValueError unless a window of `side` pixels fits."""
    path, place = next(iter(scene.paths.values())), scene.place
    if min(place.height, place.width) < side:
        raise ValueError(f"{path} is {place.height}x{place.width} pixels; expected at least {side}x{side}.")


def tell_place(scene: Scene) -> None:
    """Says of a scene without a CRS that nobody will know where its outputs lie."""
    if not scene.place.crs:
        print(f"{scene.name}: the input does not say where it lies (it has no CRS), so the outputs do not either.", flush=True)


def read(scene: Scene, name: str, row: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of pixels of one raster ``[height, w, C]`` as shards store it, and where it has no data, ``[height, w]`` bool.

    Both reach to the end of the grid of patches, where the image is mirrored. Pixels without data hold the mean of their band, of class
    maps class 0; generation does not see patches of nothing else (`seen`). Values are checked, and rounded, as `data.pack` does, so that a
    model sees what it was trained on. C are the bands of the file; `feeding.encode` fills those that it lacks.
    """
    inside, width = min(height, scene.place.height - row), scene.place.width
    stored, missing = _values(scene, name, geo.read_window(scene.paths[name], row, 0, inside, width))
    over = [(0, height - inside), (0, scene.grid[1] * PATCH - width)]
    return np.pad(stored, [*over, (0, 0)], mode="reflect"), np.pad(missing, over, mode="reflect")


def glance(scene: Scene, name: str, side: int) -> np.ndarray:
    """One raster for a picture, thinned to `side` pixels at most: ``[h, w, C]``, NaN where there is no data, of class maps class 0."""
    stored, missing = _values(scene, name, geo.read_thinned(scene.paths[name], side))
    if name in scene.bands:
        stored = fill_missing(modalities.input_stream(name).modality, stored, scene.bands[name])
    return stored if _is_class_map(name) else np.where(missing[..., None], np.nan, stored)


def _values(scene: Scene, name: str, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of a file as shards store them, filled, and where they have no data."""
    m, nodata, path = modalities.get(modalities.input_stream(name).modality), scene.nodata[name], str(scene.paths[name])
    if _is_class_map(name):
        missing, fill = np.zeros(pixels.shape[:2], bool) if nodata is None else (pixels == nodata).any(-1), 0
    else:
        missing = modalities.missing(m.name, pixels) | is_nodata(m.name, pixels, nodata).any(-1)
        mean = np.array([m.mean[m.bands.index(band)] for band in scene.bands.get(name, m.bands)] if m.mean else 0.0)
        fill = np.rint(mean) if np.dtype(m.dtype).kind in "iu" else mean
    if missing.any():
        pixels = np.where(missing[..., None], np.asarray(fill, pixels.dtype), pixels)
    stored = to_stored(pixels, m.name, path, lulc_codes=scene.lulc_codes)
    if _is_class_map(name):
        stored[missing] = 0
    return stored, missing


def _is_class_map(name: str) -> bool:
    return modalities.get(modalities.input_stream(name).modality).kind == "classes"


def seen(missing: np.ndarray, whole: bool = False) -> np.ndarray:
    """Which patches hold any data, or, if `whole`, nothing else: ``[h / 16, w / 16]`` bool, of the pixels ``[h, w]`` that have none."""
    patches = missing.reshape(len(missing) // PATCH, PATCH, -1, PATCH)
    return ~(patches.any((1, 3)) if whole else patches.all((1, 3)))


def missing(scene: Scene, row: int, height: int) -> np.ndarray:
    """Where no raster of a scene has data, in rows of pixels: ``[height, w]`` bool as `read` gives it. Without images, nowhere."""
    found = [read(scene, name, row, height)[1] for name in scene.images]
    return np.logical_and.reduce(found) if found else np.zeros((height, scene.grid[1] * PATCH), bool)


def measured(scene: Scene, cut: Cut) -> np.ndarray:
    """Which windows hold any data: ``[rows, columns]`` bool. Reads all once, and so finds what cannot be read before work begins.

    Raises a ValueError for a scene without any.
    """
    patches = np.zeros(scene.grid, bool)
    for row in range(0, scene.grid[0], cut.size):
        n = min(cut.size, scene.grid[0] - row)
        patches[row : row + n] = seen(missing(scene, row * PATCH, n * PATCH))
    if not patches.any():
        raise ValueError(f"{next(iter(scene.paths.values()))} is empty: none of its pixels has data.")
    return np.array([[patches[r : r + cut.size, c : c + cut.size].any() for c in cut.columns] for r in cut.rows])
