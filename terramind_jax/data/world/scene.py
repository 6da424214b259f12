"""One scene of the embedded world: every modality of one place, a pure function of (seed, split, index)."""

from __future__ import annotations

import dataclasses

import numpy as np

from terramind_jax.data import clouds
from terramind_jax.data.world import draws, landcover, optics, place, radar, terrain

SUBSETS = ("majortom", "ssl4eos12")
_DAY = 86_400 * 10**9


@dataclasses.dataclass(frozen=True)
class Scene:
    """Arrays are channels-last ``[S, S, C]`` in the published dtypes.

    `truth` holds, for each noisy modality, its expected value without sensor noise and speckle (dB of the mean power for radar).
    `times` are int64 nanoseconds since 1970; `offsets` what was added to stored Sentinel-2 values.
    """

    key: str
    subset: str
    arrays: dict[str, np.ndarray]
    truth: dict[str, np.ndarray]
    cloud_mask: np.ndarray
    lon: float
    lat: float
    times: dict[str, int]
    offsets: dict[str, int]
    place: place.Place


def subset_of(index: int) -> str:
    """Every other scene is of ``ssl4eos12`` (with S1GRD), the rest of ``majortom`` (with S1RTC), so that few scenes teach both."""
    return SUBSETS[index % 2]


def check_size(size: int) -> None:
    """Raises a ValueError unless scenes can be `size` pixels wide."""
    if size % 6 or size < 48:
        raise ValueError(f"Scene size {size} is not a multiple of 6 pixels (60 m bands) of at least 48.")


def scene(seed: int, index: int, split: str = "train", size: int = 264) -> Scene:
    """Scene `index` of `split` ("train" or "val") in the world of `seed`; `size` is a multiple of 6, at least 48."""
    check_size(size)
    if split not in draws.SPLITS:
        raise ValueError(f"Unknown split {split!r}; scenes are made for {' and '.join(draws.SPLITS)}.")
    here = place.draw(seed, split, index)
    rng = {purpose: draws.stream(seed, split, index, purpose) for purpose in draws.PURPOSES}
    ground = terrain.make(rng["terrain"], here, size)
    cover = landcover.make(rng["cover"], here, ground, size)
    sky = optics.sky(rng["clouds"], here, size)
    arrays, truth = optics.products(rng["optics"], here, ground, cover, sky, size)
    mask = optics.cloud_mask(cover, sky)
    subset = subset_of(index)
    sar = "S1GRD" if subset == "ssl4eos12" else "S1RTC"
    arrays[sar], truth[sar] = radar.product(rng["radar"], here, ground, cover, size, grd=sar == "S1GRD")
    arrays["DEM"] = np.rint(ground.elevation)[None].astype(np.int16)
    arrays["LULC"] = landcover.annual_map(rng["cover"], cover.classes, mask == clouds.THICK_CLOUD)[None]
    optical = place.nanoseconds(here)
    times = dict.fromkeys(arrays, optical) | {sar: optical + here.radar_days * _DAY, "DEM": 0}
    return Scene(
        key=f"{subset}_{split}_{index:07d}",
        subset=subset,
        arrays={name: np.moveaxis(a, 0, -1) for name, a in arrays.items()},
        truth={name: np.moveaxis(a, 0, -1) for name, a in truth.items()},
        cloud_mask=mask,
        lon=here.lon,
        lat=here.lat,
        times=times,
        offsets=here.offsets,
        place=here,
    )
