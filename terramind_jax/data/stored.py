"""From the values of a raster file to those that shards store: what they look like, how they are converted, what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np

from terramind_jax import geo
from terramind_jax import modalities as registry

_LOOK = 128  # side of the windows in which a file's values are looked at, before anything is packed

# From a product's codes to the classes of spec 1.6: 0 no data, 1 water, 2 trees, 3 flooded vegetation, 4 crops, 5 built area,
# 6 bare ground, 7 snow/ice, 8 clouds, 9 rangeland.
LULC_CODES: dict[str, dict[int, int]] = {
    "terramesh": {i: i for i in range(len(registry.LULC_CLASSES))},
    "esri": {0: 0, 1: 1, 2: 2, 4: 3, 5: 4, 7: 5, 8: 6, 9: 7, 10: 8, 11: 9},
    "dynamicworld": {0: 1, 1: 2, 2: 9, 3: 3, 4: 4, 5: 9, 6: 5, 7: 6, 8: 7},  # grass and shrub are both rangeland
}


@dataclasses.dataclass(frozen=True)
class File:
    """One raster, and what is done to its values: ``(value * scale + offset)``, of a radar in linear power its decibels."""

    path: str
    header: geo.Header
    is_linear: bool = False
    scale: float = 1.0
    offset: float = 0.0

    @property
    def is_changed(self) -> bool:
        return self.is_linear or self.scale != 1 or self.offset != 0


def look(modality: str, file: File) -> tuple[File, str]:
    """A file with what its values must be converted from, and what is to be said of it, by a few windows; "" for what is as expected."""
    m, place = registry.get(modality), file.header.place
    if m.kind == "classes" or (m.kind != "sar" and modality in registry.RELEASED and not file.header.dtype.startswith("float")):
        return file, ""
    size = min(_LOOK, place.height), min(_LOOK, place.width)
    quarters = [(2, 2)] if max(place.height, place.width) < 4 * _LOOK else [(0, 0), (1, 3), (2, 2), (3, 1), (4, 4)]
    at = [((place.height - size[0]) * r // 4, (place.width - size[1]) * c // 4) for r, c in quarters]
    values = np.concatenate([known(modality, file, geo.read_window(file.path, *p, *size)).reshape(-1, len(m.bands)) for p in at])
    values = values[np.isfinite(values).all(1)]
    if not len(values):
        return file, ""
    if m.kind == "sar" and _is_power(values):
        doubt = "has hardly a negative value, so it is taken for linear power, and stored as decibels."
        return dataclasses.replace(file, is_linear=True), doubt
    if modality in ("S2L2A", "S2L1C") and 0 < values.max() <= 2:
        doubt = "has no value above 2, so it is taken for reflectance of 0-1, and multiplied by 10000."
        return dataclasses.replace(file, scale=10_000.0), doubt
    return file, _doubt(m, values + file.offset) if m.std else ""


def _is_power(values: np.ndarray) -> bool:
    """Whether values of a radar are linear power: noise removal leaves a few of it below 0, but of decibels almost all are."""
    return np.count_nonzero(values < 0) <= 0.01 * np.count_nonzero(values)


def _doubt(m: registry.Modality, values: np.ndarray) -> str:
    """What is strange about values ``[n, C]``, beside the statistics of the modality."""
    mean, std, most = np.array(m.mean), np.array(m.std), np.abs(values).max()
    if std.min() >= 50 and most < 10 and (values != np.rint(values)).any():
        return f"has no value beyond {most:.3g}, so it looks standardised already; {_expectation(m.name)} is expected."
    far = np.abs(values.mean(0) - mean) / std
    i = int(far.argmax())
    if far[i] > 8:
        usual = f"{mean[i]:.4g} +- {std[i]:.4g} {m.unit}"
        return f"has a mean of {values.mean(0)[i]:.4g} in {m.bands[i]}, far from {usual}, so it may be in another unit."
    return ""


def known(modality: str, file: File, pixels: np.ndarray) -> np.ndarray:
    """As float32, NaN in all bands of pixels without data."""
    values = pixels.astype(np.float32)
    values[registry.missing(modality, pixels) | is_nodata(modality, pixels, file.header.nodata).any(-1)] = np.nan
    return values


def is_nodata(modality: str, pixels: np.ndarray, nodata: float | None) -> np.ndarray:
    """Where a file says that it has no data ``[..., C]``, unless that is what `registry.missing` judges by all bands together."""
    if nodata is None or nodata == registry.get(modality).nodata or registry.get(modality).classes:
        return np.zeros(pixels.shape, bool)
    return pixels == nodata


def converted(m: registry.Modality, file: File, values: np.ndarray) -> np.ndarray:
    """float32 values of a file in the modality's unit."""
    values = decibels(values) if file.is_linear else values
    if file.scale == 1 and not file.offset:
        return values
    values = np.maximum(values * np.float32(file.scale) + np.float32(file.offset), np.float32(m.valid[0]))
    return np.rint(values) if np.dtype(m.dtype).kind in "iu" else values


def decibels(power: np.ndarray) -> np.ndarray:
    """10 log10; NaN where there is no power."""
    return 10 * np.log10(np.where(power > 0, power, np.nan))


def incomplete(pixels: np.ndarray, modality: str, path: str, nodata: float | None) -> str:
    """Which pixels of a file have no data, as a sentence; "" if all have."""
    advice = "fill them or cut the file to where it is complete."
    missing = int(np.count_nonzero(~np.isfinite(pixels))) if pixels.dtype.kind == "f" else 0
    if missing:
        return f"{path} has {missing} NaN or infinite pixel values; {advice}"
    count = int(np.count_nonzero(is_nodata(modality, pixels, nodata)))
    return f"{path} has {count} pixel values without data ({nodata:g}); {advice}" if count else ""


def to_stored(pixels: np.ndarray, modality: str, path: str, *, nodata: float | None = None, lulc_codes: str | None = None) -> np.ndarray:
    """[H, W, C] of a file -> the dtype that shards store, with every value kept (float16 and whole metres of elevation round).

    Raises a ValueError that names `path` for NaN or nodata pixels, values that the dtype or the modality cannot hold, reflectance
    as fractions, linear SAR power, and undeclared LULC codes.
    """
    if modality == "LULC":
        return _recode(pixels, path, lulc_codes or "terramesh")
    if reason := incomplete(pixels, modality, path, nodata):
        raise ValueError(reason)
    low, high = registry.get(modality).valid
    if pixels.min() < low or pixels.max() > high:
        raise ValueError(
            f"{path} holds values from {pixels.min():g} to {pixels.max():g}; {modality} is stored as {_expectation(modality)}."
        )
    if registry.get(modality).kind == "sar" and _is_power(pixels):
        doubt = "has hardly a negative value, so it looks like linear power"
        raise ValueError(f"{path} {doubt}; {modality} is stored as {_expectation(modality)}.")
    dtype = np.dtype(registry.get(modality).dtype)
    if dtype.kind in "iu" and pixels.dtype.kind == "f":
        rounded = np.rint(pixels)
        if modality != "DEM" and np.any(rounded != pixels):
            raise ValueError(f"{path} holds fractions (up to {pixels.max():g}); {modality} is stored as {_expectation(modality)}.")
        pixels = rounded
    return pixels.astype(dtype)


def _expectation(modality: str) -> str:
    low, high = registry.get(modality).valid
    return f"{registry.get(modality).unit}, {registry.get(modality).dtype} from {low} to {high}"


def _recode(pixels: np.ndarray, path: str, codes: str) -> np.ndarray:
    table = LULC_CODES[codes]
    found = np.unique(pixels)
    strange = [v for v in found.tolist() if v not in table]
    if strange:
        raise ValueError(f"{path} holds the value {strange[0]:g}, which is not among the declared {codes} codes {sorted(table)}.")
    lookup = np.zeros(max(table) + 1, np.uint8)
    lookup[list(table)] = list(table.values())
    return lookup[pixels.astype(np.intp)]
