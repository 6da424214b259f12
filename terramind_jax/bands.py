"""Images that lack bands of their modality, such as Sentinel-2 at 10 and 20 m alone, completed so that a generator can read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from terramind_jax import modalities

FillBands = Literal["neighbours", "zeros"]

# Sentinel-2's central wavelengths in nm. CIRRUS is left out: what it sees is above the ground, so that it is like no other band.
WAVELENGTHS = {
    "COASTAL_AEROSOL": 443,
    "BLUE": 490,
    "GREEN": 560,
    "RED": 665,
    "RED_EDGE_1": 705,
    "RED_EDGE_2": 740,
    "RED_EDGE_3": 783,
    "NIR_BROAD": 842,
    "NIR_NARROW": 865,
    "WATER_VAPOR": 945,
    "SWIR_1": 1610,
    "SWIR_2": 2190,
}


def fill_missing(
    name: str,
    image: np.ndarray,
    bands: Sequence[str],
    how: FillBands = "neighbours",
    *,
    standardised: bool = False,
    version: str = "v1",
    offset: float = 0.0,
) -> np.ndarray:
    """All bands of modality `name`, float32 ``[..., C]``, from an image ``[..., len(bands)]`` of some, in any order.

    Args:
      how: "neighbours" copies the standardised values of the given band that is nearest in wavelength: B02 serves for B01, B8A for B09.
        "zeros" leaves the mean, which is 0 when standardised, as do bands without a wavelength: Sentinel-1's and Sentinel-2's B10.
      standardised, version, offset: of the image, and whose statistics standardise; see `modalities.statistics`.

    Raises:
      ValueError: bands that the modality lacks or that are named twice, another number of channels, or an unknown `how`.
    """
    known = modalities.get(name).bands
    unknown = [band for band in bands if band not in known]
    if unknown or not bands or len(set(bands)) < len(bands):
        raise ValueError(f"The bands given for {name} are {', '.join(bands) or 'none'}; expected some of {', '.join(known)}, each once.")
    if image.shape[-1] != len(bands):
        raise ValueError(f"{name} has shape {tuple(image.shape)}; expected {len(bands)} bands last, {', '.join(bands)}.")
    if how not in get_args(FillBands):
        raise ValueError(f"Unknown fill_bands {how!r}; known ways: {', '.join(get_args(FillBands))}.")
    one, zero = np.ones(len(known), np.float32), np.zeros(len(known), np.float32)
    mean, std = (zero, one) if standardised else modalities.statistics(name, version, offset)
    full = np.empty((*image.shape[:-1], len(known)), np.float32)
    for j, band in enumerate(known):
        source = band if band in bands else _neighbour(band, bands) if how == "neighbours" else None
        if source is None:
            full[..., j] = mean[j]
            continue
        i, values = known.index(source), image[..., list(bands).index(source)]
        full[..., j] = values if i == j else (values - mean[i]) / std[i] * std[j] + mean[j]
    return full


def _neighbour(band: str, bands: Sequence[str]) -> str | None:
    """The one of `bands` whose wavelength is nearest to that of `band`."""
    near = [other for other in bands if other in WAVELENGTHS]
    return min(near, key=lambda other: abs(WAVELENGTHS[other] - WAVELENGTHS[band])) if band in WAVELENGTHS and near else None
