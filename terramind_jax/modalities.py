"""Facts about TerraMind's modalities: names, bands, classes, statistics and vocabularies (spec section 1).

A *modality* is what a user has: ``S2L2A``, ``LULC``, ``coords``. A *stream* is how the transformer sees one: as raw pixels
(``untok_sen2l2a@224``) or as tokens (``tok_sen2l2a@224``). Keys of streams are the reference's, so weights exchange by name.

`terramind_jax.declarations` adds modalities of a user's own.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import warnings
from collections.abc import Mapping
from typing import Literal

import numpy as np

IMAGE_SIZE = 224
PATCH_SIZE = 16

S2L2A_BANDS = (
    "COASTAL_AEROSOL",
    "BLUE",
    "GREEN",
    "RED",
    "RED_EDGE_1",
    "RED_EDGE_2",
    "RED_EDGE_3",
    "NIR_BROAD",
    "NIR_NARROW",
    "WATER_VAPOR",
    "SWIR_1",
    "SWIR_2",
)
S2L1C_BANDS = (*S2L2A_BANDS[:10], "CIRRUS", *S2L2A_BANDS[10:])

LULC_CLASSES = (
    "no data",
    "water",
    "trees",
    "flooded vegetation",
    "crops",
    "built area",
    "bare ground",
    "snow/ice",
    "clouds",
    "rangeland",
)


Kind = Literal["continuous", "classes", "sar"]  # how pixels are resampled and drawn; sar is backscatter in dB


@dataclasses.dataclass(frozen=True)
class Modality:
    """One modality as users name it. ``dtype`` is how shards store it; statistics are v1's, one value a band (spec 1.4)."""

    name: str
    bands: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    dtype: str = ""
    unit: str = ""
    pixels: str = ""  # key of the raw-pixel stream; empty: only its tokens enter the transformer
    tokens: str = ""  # key of the token stream; empty: input only
    levels: tuple[int, ...] = ()  # FSQ levels of its tokenizer
    channels: int = 0  # channels that its tokenizer sees; classes are one-hot
    kind: Kind = "continuous"
    valid: tuple[float, float] = (0, 0)  # lowest and highest value that can be stored, in its unit
    classes: tuple[str, ...] = ()  # names of a class map's values 0, 1, 2, ...
    nodata: float | None = None  # what all bands hold where nothing was measured

    @property
    def is_image(self) -> bool:
        return bool(self.bands)


_V1_LEVELS = (8, 8, 8, 6, 5)

MODALITIES: dict[str, Modality] = {
    m.name: m
    for m in (
        Modality(
            name="S2L2A",
            bands=S2L2A_BANDS,
            mean=(1390.458, 1503.317, 1718.197, 1853.91, 2199.1, 2779.975, 2987.011, 3083.234, 3132.22, 3162.988, 2424.884, 1857.648),
            std=(2106.761, 2141.107, 2038.973, 2134.138, 2085.321, 1889.926, 1820.257, 1871.918, 1753.829, 1797.379, 1434.261, 1334.311),
            dtype="uint16",
            unit="reflectance x 10000",
            pixels="untok_sen2l2a@224",
            tokens="tok_sen2l2a@224",
            levels=_V1_LEVELS,
            channels=12,
            valid=(0, 32767),
            nodata=0,
        ),
        Modality(
            name="S2L1C",
            bands=S2L1C_BANDS,
            mean=(
                2357.089,
                2137.385,
                2018.788,
                2082.986,
                2295.651,
                2854.537,
                3122.849,
                3040.56,
                3306.481,
                1473.847,
                506.07,
                2472.825,
                1838.929,
            ),
            std=(
                1624.683,
                1675.806,
                1557.708,
                1833.702,
                1823.738,
                1733.977,
                1732.131,
                1679.732,
                1727.26,
                1024.687,
                442.165,
                1331.411,
                1160.419,
            ),
            dtype="uint16",
            unit="reflectance x 10000",
            pixels="untok_sen2l1c@224",
            channels=13,
            valid=(0, 32767),
            nodata=0,
        ),
        Modality(
            name="S2RGB",
            bands=("RED", "GREEN", "BLUE"),
            mean=(87.271, 80.931, 66.667),
            std=(58.767, 47.663, 42.631),
            dtype="uint8",
            unit="0-255",
            pixels="untok_sen2rgb@224",
            channels=3,
            valid=(0, 255),
        ),
        Modality(
            name="S1GRD",
            bands=("VV", "VH"),
            mean=(-12.599, -20.293),
            std=(5.195, 5.890),
            dtype="float16",
            unit="dB",
            pixels="untok_sen1grd@224",
            tokens="tok_sen1grd@224",
            levels=_V1_LEVELS,
            channels=2,
            kind="sar",
            valid=(-100, 60),
        ),
        Modality(
            name="S1RTC",
            bands=("VV", "VH"),
            mean=(-10.93, -17.329),
            std=(4.391, 4.459),
            dtype="float16",
            unit="dB",
            pixels="untok_sen1rtc@224",
            tokens="tok_sen1rtc@224",
            levels=_V1_LEVELS,
            channels=2,
            kind="sar",
            valid=(-100, 60),
        ),
        Modality(
            name="DEM",
            bands=("DEM",),
            mean=(670.665,),
            std=(951.272,),
            dtype="int16",
            unit="m",
            pixels="untok_dem@224",
            tokens="tok_dem@224",
            levels=_V1_LEVELS,
            channels=1,
            valid=(-500, 9000),
        ),
        Modality(
            name="LULC",
            bands=("LULC",),
            mean=(0.0,),
            std=(1.0,),
            dtype="uint8",
            unit="class",
            tokens="tok_lulc@224",
            levels=(7, 5, 5, 5, 5),
            channels=len(LULC_CLASSES),
            kind="classes",
            valid=(0, len(LULC_CLASSES) - 1),
            classes=LULC_CLASSES,
        ),
        Modality(
            name="NDVI",
            bands=("NDVI",),
            mean=(0.327,),
            std=(0.322,),
            dtype="float16",
            unit="1",
            tokens="tok_ndvi@224",
            levels=_V1_LEVELS,
            channels=1,
            valid=(-2, 2),  # it leaves [-1, 1] where offset-corrected reflectances turn negative
        ),
        Modality(name="coords", tokens="coords", unit="degrees"),
        Modality(name="caption", tokens="caption", unit="text"),  # v0.1 alone
    )
}

# What v0.1 has otherwise (spec 1.4, 1.6): statistics of other data, and Dynamic World's nine classes.
_V01: dict[str, Modality] = {
    "S2L2A": dataclasses.replace(
        MODALITIES["S2L2A"],
        mean=(794.311, 925.161, 1183.128, 1338.041, 1667.254, 2233.633, 2460.96, 2555.569, 2619.542, 2703.298, 2406.497, 1841.645),
        std=(1164.883, 1205.586, 1223.713, 1399.638, 1403.298, 1378.513, 1434.924, 1491.141, 1454.089, 1660.395, 1473.248, 1365.080),
    ),
    "DEM": dataclasses.replace(MODALITIES["DEM"], mean=(435.726,), std=(560.326,)),
    "LULC": dataclasses.replace(MODALITIES["LULC"], channels=9),
}


@dataclasses.dataclass(frozen=True)
class Stream:
    """How the transformer sees one modality: the shape of one registry entry (spec 1.2)."""

    key: str
    modality: str  # user name, a key of MODALITIES; in feature extractors also a new one without statistics
    kind: Literal["pixels", "tokens", "sequence"]
    channels: int = 0  # pixels: bands
    vocab_size: int = 0  # tokens and sequences
    max_tokens: int = (IMAGE_SIZE // PATCH_SIZE) ** 2
    num_codebooks: int = 1  # tokens: codes a patch, each of the vocabulary; ids of several, K, are [..., K]

    @property
    def codes(self) -> tuple[int, ...]:
        """The last axis of ids: ``(K,)`` of several codebooks, ``()`` of one."""
        return (self.num_codebooks,) if self.num_codebooks > 1 else ()

    def grid_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """``(h, w)`` or ``(n,)`` of ids of `shape` ``[B, h, w]`` or ``[B, n]``, of K codebooks ``[..., K]``; empty if these are not K."""
        end = len(shape) - len(self.codes)
        return tuple(shape[1:end]) if tuple(shape[end:]) == self.codes else ()


def image_streams(m: Modality) -> list[Stream]:
    """The streams of an image modality: of its pixels, of its tokens, or both."""
    pixels = [Stream(m.pixels, m.name, "pixels", channels=len(m.bands))] if m.pixels else []
    return pixels + ([Stream(m.tokens, m.name, "tokens", vocab_size=int(np.prod(m.levels)))] if m.tokens and m.is_image else [])


def _streams() -> dict[str, Stream]:
    streams = [s for m in MODALITIES.values() for s in image_streams(m)]
    streams.append(Stream("coords", "coords", "sequence", vocab_size=30_000, max_tokens=4))
    streams.append(Stream("caption", "caption", "sequence", vocab_size=30_000, max_tokens=256))
    return {s.key: s for s in streams}


STREAMS: dict[str, Stream] = _streams()
RELEASED, RELEASED_STREAMS = frozenset(MODALITIES), frozenset(STREAMS)  # TerraMind's; `declarations.declare` adds others

# The released v1 transformers: 13 streams enter the encoder, 7 are targets (spec 10.2). Alphabetical, as 4M's masking orders them.
ENCODER_STREAMS: tuple[Stream, ...] = tuple(STREAMS[k] for k in sorted(STREAMS) if k != "caption")
DECODER_STREAMS: tuple[Stream, ...] = tuple(s for s in ENCODER_STREAMS if s.kind != "pixels")

# Of v0.1 at least these (spec 10.2): its file may hold more.
V01_DECODER_STREAMS: tuple[Stream, ...] = tuple(
    STREAMS[k] for k in ("caption", *(f"tok_{m}@224" for m in ("dem", "lulc", "sen1grd", "sen2l2a")))
)
V01_ENCODER_STREAMS: tuple[Stream, ...] = (*V01_DECODER_STREAMS, STREAMS["untok_sen2l2a@224"])


def stream_id(key: str) -> int:
    """The reference's integer label of a stream: SHA-256 of the key, modulo 2**15 (spec 1.1)."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 2**15


def get(name: str, version: str = "v1") -> Modality:
    """The modality called `name` as a `version` of the models has it, v1 or v01; an unknown name is a ValueError with the known ones."""
    if name not in MODALITIES:
        close = difflib.get_close_matches(name.upper(), MODALITIES, n=1)
        hint = f"did you mean {close[0]}? Known" if close else "known"
        raise ValueError(f"Unknown modality {name!r}; {hint} modalities: {', '.join(MODALITIES)}.")
    return _V01.get(name, MODALITIES[name]) if version == "v01" else MODALITIES[name]


_INPUT_RULES = (
    ("sen2l2a", "untok_sen2l2a@224"),
    ("sen2l1c", "untok_sen2l1c@224"),
    ("sen1rtc", "untok_sen1rtc@224"),
    ("sen1", "untok_sen1grd@224"),
    ("rgb", "untok_sen2rgb@224"),
    ("dem", "untok_dem@224"),
    ("lulc", "tok_lulc@224"),
    ("ndvi", "tok_ndvi@224"),
    ("caption", "caption"),
    ("coord", "coords"),
)
_OUTPUT_RULES = (
    ("sen2", "tok_sen2l2a@224"),
    ("sen1rtc", "tok_sen1rtc@224"),
    ("sen1", "tok_sen1grd@224"),
    ("dem", "tok_dem@224"),
    ("lulc", "tok_lulc@224"),
    ("ndvi", "tok_ndvi@224"),
    ("caption", "caption"),
    ("coord", "coords"),
)


def _resolve(name: str, rules: tuple[tuple[str, str], ...], role: str) -> Stream:
    if name in STREAMS:
        return STREAMS[name]
    if name in MODALITIES and name not in RELEASED:
        m = MODALITIES[name]
        if role == "output" and not m.tokens:
            raise ValueError(f"{name} enters as pixels alone, so it cannot be a target or generated; declare levels of a tokenizer for it.")
        return STREAMS[m.tokens if role == "output" else m.pixels or m.tokens]
    text = name.lower().replace("s2", "sen2").replace("s1", "sen1").replace("location", "coords")
    for part, key in rules:
        if part in text:
            return STREAMS[key]
    raise ValueError(f"Unknown {role} modality {name!r}; known modalities: {', '.join(MODALITIES)}.")


def input_stream(name: str) -> Stream:
    """The stream through which `name` enters the encoder, by the reference's substring rules (spec 1.3): ``S2L1C_L8`` is S2L1C."""
    return _resolve(name, _INPUT_RULES, "input")


def output_stream(name: str) -> Stream:
    """The token stream that `name` is generated as (spec 1.3). Any Sentinel-2 name is S2L2A, as in the reference."""
    stream = _resolve(name, _OUTPUT_RULES, "output")
    if stream.kind == "pixels":
        raise ValueError(f"{name!r} is a stream of pixels, which is never generated; name a modality, such as {stream.modality}.")
    return stream


def check_generated(name: str) -> Stream:
    """`output_stream`; a ValueError for a modality that another one would be generated for."""
    stream = output_stream(name)
    if name in MODALITIES and name != stream.modality:
        raise ValueError(f"No model generates {name}; {stream.modality} is the nearest that there is.")
    return stream


def check_distinct(streams: Mapping[str, Stream]) -> None:
    """Raises a ValueError if two inputs, by user name, are one stream: one would hide the other."""
    first: dict[str, str] = {}
    for name, stream in streams.items():
        if first.setdefault(stream.key, name) != name:
            raise ValueError(f"The inputs {first[stream.key]} and {name} are one stream, {stream.key}; give one of them.")


def check_image(name: str, image: np.ndarray, patch_size: int = PATCH_SIZE) -> None:
    """Raises a ValueError unless `image` is a usable ``[..., H, W, C]`` array of modality `name`.

    Checks: channels last with the right number of bands, sides that are multiples of `patch_size`, no NaN.
    """
    bands = len(get(name).bands)
    shape = tuple(image.shape)
    if len(shape) < 3:
        raise ValueError(f"{name} has shape {shape}, expected [..., H, W, {bands}].")
    if shape[-1] != bands:
        if shape[-3] == bands:
            raise ValueError(f"{name} has shape {shape}, which looks channels-first; expected channels last, [..., H, W, {bands}].")
        raise ValueError(f"{name} has {shape[-1]} bands, expected {bands} ({', '.join(get(name).bands)}).")
    if shape[-3] % patch_size or shape[-2] % patch_size:
        raise ValueError(f"{name} is {shape[-3]}x{shape[-2]} pixels; both sides must be multiples of the patch size {patch_size}.")
    check_finite(name, image)


def missing(name: str, image: np.ndarray) -> np.ndarray:
    """Where an array ``[..., C]`` of the host, as stored, holds no data: ``[...]`` bool. A band is not finite, or all hold `nodata`."""
    nodata, floating = get(name).nodata, image.dtype.kind == "f"
    found = ~np.isfinite(image).all(-1) if floating else np.zeros(image.shape[:-1], bool)
    return found if nodata is None else found | (image == nodata).all(-1)


def check_finite(name: str, image) -> None:
    """Raises a ValueError for NaN in an array of the host; arrays on devices are not fetched."""
    if isinstance(image, np.ndarray) and image.dtype.kind == "f" and np.isnan(image).any():
        raise ValueError(f"{name} has {int(np.isnan(image).sum())} NaN pixels; fill or crop them first.")


def check_scale(name: str, image, *, standardised: bool) -> None:
    """Warns of an array of the host whose values are not on the scale that is expected: standardised, or in the modality's unit."""
    m = get(name)
    if not isinstance(image, np.ndarray) or not image.size or m.kind == "classes":
        return
    low, high, middle = image.min(), image.max(), image.mean(dtype=np.float64)
    wanted = "standardised values" if standardised else m.unit or "its own unit"
    if standardised and abs(middle) > 10:
        looks = f"looks unstandardised (its mean is {middle:.4g}); standardise it"
    elif m.kind == "sar" and 0 <= low and high > 0:
        looks = "has no negative value, like linear power; take 10 log10 of it first"
    elif name in ("S2L2A", "S2L1C") and image.dtype.kind == "f" and 0 <= low and 0 < high <= (1 if standardised else 2):
        looks = "looks like reflectance of 0-1; multiply it by 10000 first"
    else:
        return
    warnings.warn(f"{name} {looks}: {wanted} are expected.", stacklevel=4)


def statistics(name: str, version: str = "v1", offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Mean, moved by `offset`, and standard deviation a band, ``[C]`` float32, in the modality's unit; a ValueError without."""
    m = get(name, version)
    if not m.std:
        found = f"terramind-jax data stats ROOT --modality={name}"
        raise ValueError(f"{name} is declared without mean and std; add those that `{found}` prints to its declaration.")
    return np.asarray(np.asarray(m.mean) + offset, np.float32), np.asarray(m.std, np.float32)


def standardize(name: str, x, version: str = "v1", offset: float = 0.0):
    """``[..., C]`` in the modality's unit -> float32, zero mean and unit variance a band (spec 1.4). Takes NumPy or JAX arrays."""
    mean, std = statistics(name, version, offset)
    return (x.astype(np.float32) - mean) / std


def destandardize(name: str, x, version: str = "v1", offset: float = 0.0):
    """The inverse of `standardize`: ``[..., C]`` standardised -> float32 in the modality's unit."""
    mean, std = statistics(name, version, offset)
    return x.astype(np.float32) * std + mean
