"""GeoTIFF in and out, and where a pixel lies on Earth. Arrays are channels last, in the unit and dtype of the file."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import rasterio
import rasterio.warp
import rasterio.windows
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.transform import Affine

from terramind_jax import modalities as registry

PIXEL = 10.0  # metres: of the grids that models are trained on
_SENTINEL2 = dict(zip("B01 B02 B03 B04 B05 B06 B07 B08 B8A B09 B10 B11 B12".split(), registry.S2L1C_BANDS, strict=True))
_ALIASES = _SENTINEL2 | {k.replace("B0", "B"): v for k, v in _SENTINEL2.items()}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a raster lies: `crs` as "EPSG:n" or WKT (empty: unknown), affine `transform` (a, b, c, d, e, f) of pixel corners, size."""

    crs: str
    transform: tuple[float, float, float, float, float, float]
    height: int
    width: int

    def window(self, row: int, column: int, height: int, width: int) -> Place:
        """The place of the pixels ``[row : row + height, column : column + width]``."""
        x, y = self.xy(row, column)
        a, b, _, d, e, _ = self.transform
        return Place(self.crs, (a, b, x, d, e, y), height, width)

    def xy(self, row: float, column: float) -> tuple[float, float]:
        """Map coordinates of a corner; (0, 0) is the upper left of the upper left pixel."""
        a, b, c, d, e, f = self.transform
        return a * column + b * row + c, d * column + e * row + f


class Raster(np.ndarray):
    """An array [H, W, C] that came from a file and still knows its `place`.

    Only the array that `read` returned has a place: whatever is computed from it has None, because a slice or a flip lies elsewhere.
    """

    place: Place | None = None


@dataclasses.dataclass(frozen=True)
class Header:
    """What a raster file says of itself before any pixel is read."""

    place: Place
    bands: int
    dtype: str
    nodata: float | None
    descriptions: tuple[str | None, ...]
    tags: dict[str, str]


# ---- reading ----------------------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike, modality: str | None = None) -> Raster:
    """A raster as [H, W, C] in the file's dtype, with its `place`.

    With `modality` the number of bands is checked, and their order wherever the file names them; values are never changed.
    Raises FileNotFoundError, or ValueError for a file that is no raster, an unknown modality or wrong bands.
    """
    with _open(path) as source:
        header = _header(source)
        check_bands(path, header, modality)
        array = np.moveaxis(source.read(), 0, -1).view(Raster)
    array.place = header.place
    return array


def read_header(path: str | os.PathLike, modality: str | None = None) -> Header:
    """Size, grid, dtype and band names of a raster, checked against `modality` as `read` does."""
    with _open(path) as source:
        header = _header(source)
    check_bands(path, header, modality)
    return header


def read_window(path: str | os.PathLike, row: int, column: int, height: int, width: int) -> np.ndarray:
    """[height, width, C] from the middle of a raster, without reading the rest."""
    with _open(path) as source:
        return np.moveaxis(source.read(window=rasterio.windows.Window(column, row, width, height)), 0, -1)


def read_thinned(path: str | os.PathLike, side: int) -> np.ndarray:
    """A raster for a look at it: every n-th pixel, or of its overviews, at most `side` along each side, ``[h, w, C]``."""
    with _open(path) as source:
        step = max(1.0, max(source.height, source.width) / side)
        size = [max(1, round(n / step)) for n in (source.height, source.width)]
        return np.moveaxis(source.read(out_shape=(source.count, *size)), 0, -1)


def read_onto(
    path: str | os.PathLike, where: Place, kind: registry.Kind = "continuous", prepare: Callable[[np.ndarray], np.ndarray] = np.float32
) -> np.ndarray:
    """A raster on another grid, ``[H, W, C]`` float32, NaN where it has no data; only what is needed of it is read.

    Classes are taken from the nearest pixel, other kinds interpolated bilinearly, from means where pixels are much smaller than the grid's.

    Args:
      prepare: of what is read ``[h, w, C]``: float32 values that may be averaged, NaN where there is no data.
    """
    with _open(path) as source:
        header = _header(source)
        if not header.place.crs or not where.crs:
            raise ValueError(f"{os.fspath(path)} does not say where it lies (it has no CRS), so it cannot be brought to another grid.")
        window = _window_under(header.place, where)
        if window is None:
            return np.full((where.height, where.width, header.bands), np.nan, np.float32)
        size = [math.ceil(n / _decimation(window, where, kind)) for n in (window.height, window.width)]
        how = Resampling.nearest if kind == "classes" else Resampling.average
        pixels = source.read(window=window, out_shape=(header.bands, *size), resampling=how)
    part = header.place.window(window.row_off, window.col_off, window.height, window.width)
    x, y = window.width / size[1], window.height / size[0]  # source pixels a pixel that was read
    a, b, c, d, e, f = part.transform
    out = np.full((header.bands, where.height, where.width), np.nan, np.float32)
    rasterio.warp.reproject(
        np.ascontiguousarray(np.moveaxis(prepare(np.moveaxis(pixels, 0, -1)), -1, 0), np.float32),
        out,
        src_transform=Affine(a * x, b * y, c, d * x, e * y, f),
        src_crs=CRS.from_user_input(part.crs),
        src_nodata=np.nan,
        dst_transform=Affine(*where.transform),
        dst_crs=CRS.from_user_input(where.crs),
        dst_nodata=np.nan,
        resampling=Resampling.nearest if kind == "classes" else Resampling.bilinear,
    )
    return np.moveaxis(out, 0, -1)


def _window_under(source: Place, where: Place) -> rasterio.windows.Window | None:
    """The pixels of `source` that lie under `where`, with a few around them; None if there are none."""
    edges = np.linspace(0, 1, 9)
    rows, columns = np.meshgrid(edges * where.height, edges * where.width)
    a, b, c, d, e, f = where.transform
    xs, ys = a * columns + b * rows + c, d * columns + e * rows + f
    x, y = rasterio.warp.transform(CRS.from_user_input(where.crs), CRS.from_user_input(source.crs), xs.ravel(), ys.ravel())
    a, b, c, d, e, f = source.transform
    x, y, area = np.array(x) - c, np.array(y) - f, a * e - b * d
    column, row = (e * x - b * y) / area, (a * y - d * x) / area
    if not (np.isfinite(column).all() and np.isfinite(row).all()):
        return None
    margin = 2 + math.ceil(2 * max(np.ptp(column) / where.width, np.ptp(row) / where.height))
    top, left = (max(math.floor(v.min()) - margin, 0) for v in (row, column))
    bottom, right = (min(math.ceil(v.max()) + margin, n) for v, n in ((row, source.height), (column, source.width)))
    return rasterio.windows.Window(left, top, right - left, bottom - top) if bottom > top and right > left else None


def _decimation(window: rasterio.windows.Window, where: Place, kind: registry.Kind) -> int:
    """How many pixels of a side are read as one, so that two remain for each of the grid: of radar one, as decibels have no mean."""
    return 1 if kind == "sar" else max(1, int(min(window.height / where.height, window.width / where.width) / 2))


def read_valid(
    path: str | os.PathLike, names: Sequence[str], what: str, use: Sequence[str] | None = None, rows: tuple[int, int] | None = None
) -> np.ndarray:
    """The bands `use` (default: all, of `names`) of a raster as [H, W, C] float32, NaN where the file has no data.

    `names` are the bands that the file is said to hold, `what` what it is for errors; both are checked as `read` does. Of `rows`, first and
    end, nothing else is read.
    """
    with _open(path) as source:
        check_names(path, _header(source), names, what)
        indices = [names.index(name) + 1 for name in (names if use is None else use)]
        window = rows and rasterio.windows.Window(0, rows[0], source.width, rows[1] - rows[0])
        pixels, nodata = source.read(indices, window=window).astype(np.float32), [source.nodatavals[i - 1] for i in indices]
    for plane, value in zip(pixels, nodata, strict=True):
        if value is not None:
            plane[plane == np.float32(value)] = np.nan
    return np.moveaxis(pixels, 0, -1)


def place(path: str | os.PathLike) -> Place:
    """Where a raster file lies."""
    return read_header(path).place


@contextlib.contextmanager
def _open(path: str | os.PathLike):
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no file {os.fspath(path)}; expected a GeoTIFF.")
    try:
        with unplaced():
            source = rasterio.open(path)
    except rasterio.errors.RasterioIOError as error:
        raise ValueError(f"{os.fspath(path)} is no raster that GDAL can read; expected a GeoTIFF.") from error
    try:
        with source:
            yield source
    except rasterio.errors.RasterioIOError as error:
        raise ValueError(f"{os.fspath(path)} is damaged or truncated: its pixels cannot be read.") from error


def _header(source: rasterio.DatasetReader) -> Header:
    crs = source.crs.to_string() if source.crs else ""
    where = Place(crs, tuple(source.transform)[:6], source.height, source.width)
    return Header(where, source.count, source.dtypes[0], source.nodata, tuple(source.descriptions), source.tags())


def check_bands(path: str | os.PathLike, header: Header, modality: str | None) -> None:
    """Raises a ValueError if a file cannot be `modality`: wrong number of bands, or names in another order.

    Descriptions that are no band names ("bands", none at all) say nothing about the order and are passed over.
    """
    if modality is None:
        return
    names = registry.get(modality).bands
    if not names:
        raise ValueError(f"{modality} is no image; it cannot be read from {os.fspath(path)}.")
    check_names(path, header, names, modality)


def check_names(path: str | os.PathLike, header: Header, names: Sequence[str], what: str, hint: str = "") -> None:
    """Raises a ValueError if a file has another number of bands than `names`, those of `what`, or names them in another order.

    `hint` tells what to do about the number.
    """
    if header.bands != len(names):
        end = f"; {hint}" if hint else "."
        raise ValueError(f"{os.fspath(path)} has {header.bands} bands, expected {len(names)} for {what} ({', '.join(names)}){end}")
    for position, (text, expected) in enumerate(zip(header.descriptions, names, strict=True), 1):
        found = band_name(text)
        if found in names and found != expected:
            raise ValueError(f"Band {position} of {os.fspath(path)} is named {text!r}, expected {expected}; {what} is {', '.join(names)}.")


def band_name(text: str | None) -> str:
    """A band's name as `modalities` has it: B02, B2 and blue are BLUE; any other text in upper case."""
    name = (text or "").strip().upper().replace(" ", "_").replace("-", "_")
    return _ALIASES.get(name, name)


# ---- writing ----------------------------------------------------------------------------------------------------------------


def write(
    path: str | os.PathLike,
    array: np.ndarray,
    like: str | os.PathLike | Place | Raster | None = None,
    *,
    modality: str | None = None,
    bands: Sequence[str] | None = None,
    nodata: float | None = None,
) -> None:
    """Writes [H, W, C] or [H, W] as a tiled, deflated GeoTIFF on the grid of `like`: a file, a `Place` or what `read` returned.

    Bands are described by `bands`, or by `modality`'s names. float16, bfloat16 and bool, which GeoTIFF lacks, become float32 and
    uint8. The file appears whole or not at all. Raises ValueError for another size than `like`'s, channels-first arrays, or a
    number of bands other than the modality's; OSError if the disk has no room for all of it.
    """
    if os.path.splitext(path)[1].lower() not in (".tif", ".tiff"):
        raise ValueError(f"{os.fspath(path)} is no name of a GeoTIFF; expected one that ends in .tif or .tiff.")
    if isinstance(like, (str, os.PathLike)) and os.path.exists(path) and os.path.samefile(path, like):
        raise FileExistsError(f"{os.fspath(path)} would replace the file that it is to be like; choose another name.")
    pixels = np.asarray(array)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    where = _place_of(like)
    names = tuple(bands) if bands is not None else registry.get(modality).bands if modality else ()
    _check_writable(path, pixels, where, names)
    pixels = pixels.astype(_writable_dtype(pixels.dtype), copy=False)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    temporary = f"{os.fspath(path)}.{os.getpid()}.{threading.get_ident()}.tmp"
    try:
        with unplaced():
            _write_file(temporary, pixels, where, names, nodata)
            check_whole(temporary, path)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _write_file(path: str, pixels: np.ndarray, where: Place | None, names: Sequence[str], nodata: float | None) -> None:
    height, width, count = pixels.shape
    profile: dict[str, Any] = dict(driver="GTiff", height=height, width=width, count=count, dtype=pixels.dtype, nodata=nodata)
    profile |= dict(compress="deflate", predictor=3 if pixels.dtype.kind == "f" else 2, bigtiff="if_safer")
    profile |= dict(tiled=True, blockxsize=256, blockysize=256)
    if where is not None:
        profile |= dict(crs=CRS.from_user_input(where.crs) if where.crs else None, transform=Affine(*where.transform))
    with rasterio.open(path, "w", **profile) as out:
        out.write(np.moveaxis(pixels, -1, 0))
        for i, name in enumerate(names, 1):
            out.set_band_description(i, name)


@contextlib.contextmanager
def unplaced() -> Iterator[None]:
    """Without rasterio's warning of a file that lies nowhere: what needs a place says so itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        yield


def check_whole(path: str | os.PathLike, name: str | os.PathLike) -> None:
    """Reads the last pixel of all bands, and of all overviews: an OSError with ENOSPC, for a file of this name, if it is not there.

    GDAL holds back what it writes until a file is closed, and nobody is told if the disk has no room for it then.
    """

    def read_last(**level: int) -> int:
        with rasterio.open(path, **level) as found:
            found.read(window=rasterio.windows.Window(found.width - 1, found.height - 1, 1, 1))
            return len(found.overviews(1))

    try:
        for i in range(read_last()):
            read_last(overview_level=i)
    except rasterio.errors.RasterioError as error:
        raise OSError(errno.ENOSPC, "No room for the end of the file", os.fspath(name)) from error


def _check_writable(path: str | os.PathLike, pixels: np.ndarray, where: Place | None, names: Sequence[str]) -> None:
    shape, count = pixels.shape, len(names)
    expected = f"[{where.height if where else 'H'}, {where.width if where else 'W'}, {count or 'C'}]"
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"Cannot write {os.fspath(path)}: the array has shape {shape}, expected {expected}.")
    size = (where.height, where.width) if where else shape[:2]
    channels_first = (where is not None and shape[:2] != size and shape[1:] == size) or (count and shape[2] != count and shape[0] == count)
    if channels_first:
        raise ValueError(f"Cannot write {os.fspath(path)}: shape {shape} looks channels-first; expected channels last, {expected}.")
    if shape[:2] != size or (count and shape[2] != count):
        raise ValueError(f"Cannot write {os.fspath(path)}: the array has shape {shape}, expected {expected}.")


def _writable_dtype(dtype: np.dtype) -> np.dtype:
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    if dtype.itemsize == 2 and dtype.kind in "fV":  # ml_dtypes' bfloat16 is of kind V
        return np.dtype(np.float32)
    return dtype


def _place_of(like: str | os.PathLike | Place | Raster | None) -> Place | None:
    if like is None or isinstance(like, Place):
        return like
    if isinstance(like, np.ndarray):
        if getattr(like, "place", None) is None:
            raise ValueError("`like` is an array without a place on Earth; pass the array that read() returned, its .place, or the path.")
        return like.place
    return place(like)


# ---- grids ------------------------------------------------------------------------------------------------------------------


def same_grid(a: Place, b: Place, tolerance: float = 0.1) -> bool:
    """Whether two rasters lie on one grid: the same size and CRS, and no corner further apart than `tolerance` pixels.

    The transforms of one tile's modalities differ by about 1e-10 m, so they are never compared for equality.
    """
    if (a.height, a.width) != (b.height, b.width) or not _same_crs(a.crs, b.crs):
        return False
    pixel = math.sqrt(abs(a.transform[0] * a.transform[4] - a.transform[1] * a.transform[3]))
    return all(math.dist(a.xy(r, c), b.xy(r, c)) <= tolerance * pixel for r in (0, a.height) for c in (0, a.width))


def _same_crs(a: str, b: str) -> bool:
    return a == b or bool(a and b and CRS.from_user_input(a) == CRS.from_user_input(b))


def overlap(a: Place, b: Place) -> bool:
    """Whether two rasters have ground in common; those that do not say where they lie have none."""
    return bool(a.crs and b.crs) and _window_under(a, b) is not None


def is_metric(where: Place) -> bool:
    """Whether a grid is north up and of 10 m pixels, also on the ground: within 3 %, which Web Mercator is only near the equator."""
    a, b, c, d, e, f = where.transform
    if not where.crs or b or d or abs(a - PIXEL) > 1e-3 or abs(e + PIXEL) > 1e-3 or not CRS.from_user_input(where.crs).is_projected:
        return False
    middle, east, south = ((where.height / 2 + r, where.width / 2 + c) for r, c in ((0, 0), (0, 100), (100, 0)))
    (lon, lat), *others = (lonlat(where, *p) for p in (middle, east, south))
    degree = 111_195.0  # metres
    sides = [degree * math.hypot(y - lat, (x - lon) * math.cos(math.radians(lat))) for x, y in others]
    return all(abs(side / (100 * PIXEL) - 1) < 0.03 for side in sides)


def utm(longitude: float, latitude: float) -> str:
    """The CRS of the UTM zone of a place; a ValueError near the poles, where there is none."""
    if not -80 <= latitude <= 84:
        raise ValueError(f"lies at latitude {latitude:.1f}, and UTM zones end at -80 and 84 degrees")
    return f"EPSG:{(32600 if latitude >= 0 else 32700) + int((longitude + 180) // 6) % 60 + 1}"


def metric_grids(where: Place) -> tuple[Place, Place | None]:
    """North-up grids of 10 m in the UTM zone of a raster's middle: all around it, and what it fills wholly, None if that is nothing.

    Raises a ValueError without a subject ("lies ...") for what cannot be brought there.
    """
    if not where.crs:
        raise ValueError("does not say where it lies: it has no CRS")
    crs, t = utm(*lonlat(where)), np.linspace(0, 1, 33)
    sides = [(t * 0, t), (t * 0 + 1, t), (t, t * 0), (t, t * 0 + 1)]  # (row, column) of top, bottom, left, right as parts of the size
    found = []
    for rows, columns in sides:
        x, y = zip(*(where.xy(r * where.height, c * where.width) for r, c in zip(rows, columns, strict=True)), strict=True)
        found.append(np.array(rasterio.warp.transform(CRS.from_user_input(where.crs), CRS.from_user_input(crs), x, y)))  # [2, n]
    points = np.concatenate(found, 1)
    if not np.isfinite(points).all() or np.ptp(points, axis=1).max() > 1e6:
        raise ValueError("is wider than 1000 km, which no UTM zone holds; cut it into parts")
    upright, level = [sorted((s for s in found if (np.ptp(s[0]) < np.ptp(s[1])) == up), key=lambda s: s.mean()) for up in (True, False)]
    outer = _grid_between(crs, *points.min(1), *points.max(1), math.floor, math.ceil)
    if len(upright) != 2:
        return outer, None
    left, bottom, right, top = upright[0][0].max(), level[0][1].max(), upright[1][0].min(), level[1][1].min()
    inner = _grid_between(crs, left, bottom, right, top, math.ceil, math.floor)
    return outer, inner if min(inner.height, inner.width) > 0 else None


def _grid_between(crs: str, left: float, bottom: float, right: float, top: float, first, last) -> Place:
    """Of whole multiples of 10 m; `first` and `last` round the lower and the upper ends."""
    west, south, east, north = (rounds(round(v / PIXEL, 3)) for rounds, v in ((first, left), (first, bottom), (last, right), (last, top)))
    return Place(crs, (PIXEL, 0.0, west * PIXEL, 0.0, -PIXEL, north * PIXEL), north - south, east - west)


def lonlat(where: Place, row: float | None = None, column: float | None = None) -> tuple[float, float]:
    """(longitude, latitude) in degrees (WGS 84) of the centre, or of a pixel corner; NaN where the CRS is unknown."""
    if not where.crs:
        return math.nan, math.nan
    x, y = where.xy(where.height / 2 if row is None else row, where.width / 2 if column is None else column)
    longitude, latitude = rasterio.warp.transform(CRS.from_user_input(where.crs), CRS.from_epsg(4326), [x], [y])
    return float(longitude[0]), float(latitude[0])


def place_to_attributes(where: Place) -> dict[str, str]:
    """The attributes of a ``spatial_ref`` variable, as CF and rioxarray write them."""
    a, b, c, d, e, f = where.transform
    wkt = CRS.from_user_input(where.crs).to_wkt() if where.crs else ""
    return {"crs_wkt": wkt, "spatial_ref": wkt, "GeoTransform": " ".join(repr(float(v)) for v in (c, a, b, f, d, e))}


def place_from_attributes(
    attributes: Mapping[str, Any], shape: tuple[int, int], x: np.ndarray | None = None, y: np.ndarray | None = None
) -> Place | None:
    """The inverse of `place_to_attributes`; a grid without GeoTransform is taken from its pixel centres `x` and `y`. None if neither."""
    wkt = attributes.get("crs_wkt") or attributes.get("spatial_ref") or ""
    crs = CRS.from_user_input(wkt).to_string() if wkt else ""
    height, width = shape
    if "GeoTransform" in attributes:
        c, a, b, f, d, e = map(float, str(attributes["GeoTransform"]).split())
        return Place(crs, (a, b, c, d, e, f), height, width)
    if x is None or y is None or x.shape != (width,) or y.shape != (height,) or min(shape) < 2:
        return None
    a, e = float(x[-1] - x[0]) / (width - 1), float(y[-1] - y[0]) / (height - 1)
    return Place(crs, (a, 0.0, float(x[0]) - a / 2, 0.0, e, float(y[0]) - e / 2), height, width)
