"""GeoTIFF in and out: pixels, places and band names survive; what cannot be right is refused in one sentence."""

import errno
import math
import os

import ml_dtypes
import numpy as np
import pytest
import rasterio

from terramind_jax import geo
from terramind_jax.geo import Place
from terramind_jax.modalities import MODALITIES

PLACE = Place("EPSG:32632", (10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0), 20, 30)


def _pixels(bands, dtype=np.uint16, place=PLACE):
    return np.arange(place.height * place.width * bands).reshape(place.height, place.width, bands).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32", "float64"])
def test_write_then_read_is_the_same(tmp_path, dtype):
    path, pixels = tmp_path / "new" / "a.tif", _pixels(2, dtype)
    geo.write(path, pixels, PLACE, modality="S1GRD")
    found = geo.read(path, "S1GRD")
    np.testing.assert_array_equal(found, pixels)
    assert found.dtype == dtype and found.place == PLACE and geo.read_header(path).descriptions == ("VV", "VH")
    assert os.listdir(tmp_path / "new") == ["a.tif"]
    with rasterio.open(path) as source:
        assert source.profile["tiled"] and source.compression.name == "deflate"


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, bool])
def test_dtypes_that_geotiff_lacks(tmp_path, dtype):
    pixels = (_pixels(1) % 2).astype(dtype)
    geo.write(tmp_path / "a.tif", pixels, PLACE)
    found = geo.read(tmp_path / "a.tif")
    np.testing.assert_array_equal(found, pixels.astype(np.float32))


def test_a_file_without_its_end_is_told_and_the_old_one_stays(tmp_path, monkeypatch):
    """GDAL says nothing if what it writes when it closes a file finds no room."""
    path, write = tmp_path / "a.tif", geo._write_file
    geo.write(path, _pixels(3), PLACE)
    before = path.read_bytes()

    def cut(temporary, *arguments):
        write(temporary, *arguments)
        os.truncate(temporary, os.path.getsize(temporary) // 2)

    monkeypatch.setattr(geo, "_write_file", cut)
    with pytest.raises(OSError, match="No room for the end of the file") as error:
        geo.write(path, _pixels(3) + 1, PLACE)
    assert error.value.errno == errno.ENOSPC and path.read_bytes() == before and os.listdir(tmp_path) == ["a.tif"]


def test_like_takes_a_path_a_place_or_what_read_returned(tmp_path):
    geo.write(tmp_path / "a.tif", _pixels(3), PLACE)
    source = geo.read(tmp_path / "a.tif")
    for i, like in enumerate((tmp_path / "a.tif", source, source.place)):
        geo.write(tmp_path / f"{i}.tif", _pixels(1)[..., 0], like=like)
        assert geo.place(tmp_path / f"{i}.tif") == PLACE
    with pytest.raises(ValueError, match="without a place"):
        geo.write(tmp_path / "b.tif", _pixels(1), like=source[::-1])


def test_only_the_array_that_was_read_has_a_place(tmp_path):
    geo.write(tmp_path / "a.tif", _pixels(3), PLACE)
    source = geo.read(tmp_path / "a.tif")
    assert source.place == PLACE
    assert source[::-1].place is None and source[2:].place is None and (source + 1).place is None


def test_band_names_decide_the_order_only_where_they_are_names(tmp_path):
    names = MODALITIES["S2RGB"].bands
    for bands in (names, ("B04", "B03", "b2"), ("bands",) * 3, ("x", "GREEN", "y")):
        geo.write(tmp_path / "a.tif", _pixels(3), PLACE, bands=bands)
        assert geo.read(tmp_path / "a.tif", "S2RGB").shape == (20, 30, 3)
    for bands in (names[::-1], ("B02", "B03", "B04")):
        geo.write(tmp_path / "a.tif", _pixels(3), PLACE, bands=bands)
        with pytest.raises(ValueError, match=r"Band 1 of .*a.tif is named '\w+', expected RED"):
            geo.read(tmp_path / "a.tif", "S2RGB")


def test_reading_what_cannot_be_read(tmp_path):
    geo.write(tmp_path / "a.tif", _pixels(3), PLACE)
    with pytest.raises(ValueError, match="has 3 bands, expected 12 for S2L2A"):
        geo.read(tmp_path / "a.tif", "S2L2A")
    with pytest.raises(ValueError, match="Unknown modality 'S2L2'"):
        geo.read(tmp_path / "a.tif", "S2L2")
    with pytest.raises(ValueError, match="coords is no image"):
        geo.read(tmp_path / "a.tif", "coords")
    with pytest.raises(FileNotFoundError, match="no file .*b.tif"):
        geo.read(tmp_path / "b.tif")
    (tmp_path / "c.tif").write_text("not a raster")
    with pytest.raises(ValueError, match="c.tif is no raster"):
        geo.read(tmp_path / "c.tif", "DEM")


def test_a_truncated_geotiff(tmp_path):
    geo.write(tmp_path / "a.tif", np.random.default_rng(0).integers(0, 9999, (200, 300, 3)), None)
    data = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="damaged or truncated|no raster"):
        geo.read(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 20, 30), {"like": PLACE}, r"shape \(2, 20, 30\) looks channels-first; expected channels last, \[20, 30, C\]"),
        ((2, 16, 16), {"modality": "S1GRD"}, r"looks channels-first; expected channels last, \[H, W, 2\]"),
        ((20, 30, 3), {"like": PLACE, "modality": "S1GRD"}, r"shape \(20, 30, 3\), expected \[20, 30, 2\]"),
        ((16, 16, 1), {"like": PLACE}, r"shape \(16, 16, 1\), expected \[20, 30, C\]"),
        ((1, 20, 30, 1), {}, r"shape \(1, 20, 30, 1\), expected \[H, W, C\]"),
        ((20, 30, 2), {"modality": "S9"}, "Unknown modality 'S9'"),
    ],
)
def test_arrays_that_cannot_be_written(tmp_path, shape, options, message):
    with pytest.raises(ValueError, match=message):
        geo.write(tmp_path / "a.tif", np.zeros(shape, np.uint8), **options)
    assert os.listdir(tmp_path) == []


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    geo.write(tmp_path / "a.tif", _pixels(1), PLACE)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(geo, "_write_file", fail)
    with pytest.raises(OSError, match="disk full"):
        geo.write(tmp_path / "a.tif", _pixels(1) * 0, PLACE)
    assert os.listdir(tmp_path) == ["a.tif"] and geo.read(tmp_path / "a.tif").max() > 0


def test_same_grid_allows_a_tenth_of_a_pixel():
    def moved(x, **changes):
        a, b, c, d, e, f = PLACE.transform
        return Place(**{"crs": PLACE.crs, "transform": (a, b, c + x, d, e, f), "height": 20, "width": 30} | changes)

    assert geo.same_grid(PLACE, moved(1e-9)) and geo.same_grid(PLACE, moved(0.99))
    assert not geo.same_grid(PLACE, moved(1.01)) and not geo.same_grid(PLACE, moved(0, width=31))
    assert not geo.same_grid(PLACE, moved(0, crs="EPSG:32633")) and not geo.same_grid(PLACE, moved(0, crs=""))
    assert geo.same_grid(PLACE, moved(0, crs=rasterio.crs.CRS.from_epsg(32632).to_wkt()))
    wider = Place(PLACE.crs, (10.1, 0.0, 500000.0, 0.0, -10.0, 5000000.0), 20, 30)  # 3 m off at the far side
    assert not geo.same_grid(PLACE, wider)


def test_lonlat_of_the_centre():
    # UTM zone 32 has its central meridian at 9 degrees, where x is 500 km.
    longitude, latitude = geo.lonlat(Place("EPSG:32632", (10.0, 0.0, 499900.0, 0.0, -10.0, 100.0), 20, 20))
    assert longitude == pytest.approx(9, abs=1e-6) and latitude == pytest.approx(0, abs=1e-6)
    assert geo.lonlat(Place("EPSG:4326", (1.0, 0.0, 10.0, 0.0, -2.0, 50.0), 4, 6)) == pytest.approx((13, 46))
    assert all(map(math.isnan, geo.lonlat(Place("", PLACE.transform, 2, 2))))


def test_window_moves_the_corner():
    window = PLACE.window(3, 4, 5, 6)
    assert window.xy(0, 0) == PLACE.xy(3, 4) == (500040.0, 4999970.0) and (window.height, window.width) == (5, 6)


def test_read_window_is_a_part_of_read(tmp_path):
    geo.write(tmp_path / "a.tif", _pixels(2), PLACE)
    np.testing.assert_array_equal(geo.read_window(tmp_path / "a.tif", 3, 4, 5, 6), geo.read(tmp_path / "a.tif")[3:8, 4:10])


def test_place_survives_attributes_and_pixel_centres():
    assert geo.place_from_attributes(geo.place_to_attributes(PLACE), (20, 30)) == PLACE
    x, y = 500005.0 + 10 * np.arange(30), 4999995.0 - 10 * np.arange(20)
    wkt = geo.place_to_attributes(PLACE)["crs_wkt"]
    assert geo.same_grid(geo.place_from_attributes({"crs_wkt": wkt}, (20, 30), x, y), PLACE)
    assert geo.place_from_attributes({}, (20, 30)) is None


def test_a_file_is_not_written_over_what_it_is_to_be_like(tmp_path):
    path = tmp_path / "a.tif"
    geo.write(path, np.ones((8, 8)))
    with pytest.raises(FileExistsError, match="would replace the file that it is to be like"):
        geo.write(path, np.zeros((8, 8)), like=path)
    assert np.asarray(geo.read(path)).min() == 1
    with pytest.raises(ValueError, match=r"a\.png is no name of a GeoTIFF; expected one that ends in \.tif or \.tiff"):
        geo.write(tmp_path / "a.png", np.ones((8, 8)))
