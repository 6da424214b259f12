"""Folders of GeoTIFFs on any grid: brought to 10 m as their kind demands, converted as they look or are declared, or refused."""

import warnings

import numpy as np
import pytest
from rasterio.crs import CRS
from rasterio.warp import transform

from terramind_jax import cli, geo
from terramind_jax.data import check
from terramind_jax.data.index import open_index
from terramind_jax.data.pack import pack
from terramind_jax.data.stored import to_stored
from terramind_jax.geo import Place

LON, LAT = 11.3, 48.2
DEGREE = 1 / 111_000
GEOGRAPHIC = Place("EPSG:4326", (10 * DEGREE / 0.66, 0.0, LON, 0.0, -10 * DEGREE, LAT), 300, 310)


def utm(x=680_000.0, y=5_340_000.0, pixel=10.0, height=264, width=264, crs="EPSG:32632"):
    return Place(crs, (pixel, 0.0, x, 0.0, -pixel, y), height, width)


def positions(place, crs="EPSG:32632"):
    """Map coordinates of the middles of the pixels, ``[H, W]`` twice."""
    rows, columns = np.meshgrid(np.arange(place.height) + 0.5, np.arange(place.width) + 0.5, indexing="ij")
    a, b, c, d, e, f = place.transform
    x, y = a * columns + b * rows + c, d * columns + e * rows + f
    found = transform(CRS.from_user_input(place.crs), CRS.from_user_input(crs), x.ravel(), y.ravel())
    return [np.reshape(v, x.shape) for v in found]


def plane(place):
    """A smooth field of the ground, which interpolation keeps."""
    x, y = positions(place)
    return (0.05 * (x - 670_000) + 0.03 * (y - 5_330_000))[..., None]


def packed(src, tmp_path, **options):
    """Each packed (key, modality): pixels and place."""
    info = pack(str(src), str(tmp_path / "out"), **{"val_fraction": 0, **options})
    index = open_index(tmp_path / "out", "train")
    cells = [(i, key, m) for i, key in enumerate(index.keys) for c, m in enumerate(index.modalities) if index.available[i, c]]
    return {(key, m): (index.read(i, m), index.place(i)) for i, key, m in cells}, info


@pytest.fixture
def src(tmp_path):
    return tmp_path / "src"


@pytest.mark.parametrize(
    "place",
    [
        GEOGRAPHIC,
        Place("EPSG:4326", (10 * DEGREE, 0.0, LON, 0.0, 10 * DEGREE, LAT - 0.03), 300, 500),  # south up
        utm(pixel=20, height=150, width=150),
        Place("EPSG:3857", (15.0, 0.0, 1_258_000.0, 0.0, -15.0, 6_135_000.0), 270, 270),
        Place("EPSG:32633", (10.0, 0.0, 225_000.0, 0.0, -10.0, 5_345_000.0), 264, 264),  # a zone further: fine as it is
        Place("EPSG:32632", (9.9, 1.0, 680_000.0, 1.0, -9.9, 5_340_000.0), 300, 300),  # turned
    ],
    ids=["degrees", "south up", "20 m", "Web Mercator", "another zone", "turned"],
)
def test_elevation_lies_where_it_did(src, tmp_path, place):
    geo.write(src / "DEM" / "a.tif", plane(place).astype(np.float32), place)
    found, _ = packed(src, tmp_path)
    for pixels, where in found.values():
        assert geo.is_metric(where) and min(pixels.shape[:2]) >= 224
        np.testing.assert_allclose(
            pixels, plane(where), atol=0.75
        )  # whole metres; at the border of coarse pixels nothing to interpolate with


def test_files_of_a_name_come_to_the_grid_of_the_one_that_has_10_metres(src, tmp_path):
    radar, elevation = utm(), Place("EPSG:4326", (30 * DEGREE / 0.66, 0.0, LON - 0.2, 0.0, -30 * DEGREE, LAT + 0.2), 1500, 1500)
    cover = utm(y=5_340_005.0, x=679_995.0, height=300, width=300)
    speckle = np.random.default_rng(0).normal(-12, 3, (264, 264, 2)).astype(np.float16)
    classes = np.random.default_rng(1).choice([1, 2, 5], (300, 300, 1)).astype(np.uint8)
    geo.write(src / "S1RTC" / "a.tif", speckle, radar)
    geo.write(src / "DEM" / "a.tif", plane(elevation).astype(np.float32), elevation)
    geo.write(src / "LULC" / "a.tif", classes, cover)
    found, _ = packed(src, tmp_path, lulc_codes="terramesh")
    np.testing.assert_array_equal(found["a", "S1RTC"][0], speckle)  # every bit of it
    np.testing.assert_allclose(found["a", "DEM"][0], plane(radar), atol=0.6)
    corners = {(r, c): classes[r : r + 264, c : c + 264] for r in (0, 1) for c in (0, 1)}  # half a pixel aside
    assert any(np.array_equal(found["a", "LULC"][0], c) for c in corners.values())


def test_radar_is_averaged_in_power(src, tmp_path):
    place = utm(pixel=20, height=150, width=150)
    power = np.where(np.arange(150) % 2, 0.001, 0.1)[None, :, None] * np.ones((150, 1, 2))
    for name, values in (("power", power), ("decibels", 10 * np.log10(power))):
        geo.write(src / name / "S1GRD" / "a.tif", values.astype(np.float32), place)
    with pytest.warns(UserWarning, match="a.tif has hardly a negative value, so it is taken for linear power, and stored as decibels"):
        a, _ = packed(src / "power", tmp_path / "power")
    b, _ = packed(src / "decibels", tmp_path / "decibels")
    for (pixels, _), *_ in (a.values(), b.values()):
        between = 10 * np.log10([0.75 * 0.1 + 0.25 * 0.001, 0.25 * 0.1 + 0.75 * 0.001])
        np.testing.assert_allclose(np.unique(pixels[8:-8, 8:-8].round(2)), np.sort(between), atol=0.02)


def test_power_with_a_negative_pixel_is_power(src, tmp_path):
    power = np.random.default_rng(0).uniform(0.05, 0.1, (264, 528, 2)).astype(np.float32)
    power[130, 270] = -0.001  # in a window that is looked at
    geo.write(src / "S1GRD" / "a.tif", power, utm(width=528))
    with pytest.warns(UserWarning, match="so it is taken for linear power"):
        found, info = packed(src, tmp_path)
    (pixels, _), *others = found.values()
    assert not others and info["left_out"] == {"without_data": 1}  # the tile with that pixel
    np.testing.assert_allclose(pixels, 10 * np.log10(power[:, :264]), atol=0.01)
    with pytest.raises(ValueError, match="looks like linear power"):
        to_stored(power, "S1GRD", "a.tif")


def test_no_power_is_no_data(src, tmp_path):
    power = np.full((264, 528, 2), 0.05, np.float32)
    power[5, 5] = 0
    geo.write(src / "S1GRD" / "a.tif", power, utm(width=528))
    with pytest.warns(UserWarning, match="linear power"):
        found, info = packed(src, tmp_path)
    assert [key for key, _ in found] == ["a_r00000_c00264"] and info["left_out"] == {"without_data": 1}
    np.testing.assert_allclose(found["a_r00000_c00264", "S1GRD"][0], 10 * np.log10(0.05), atol=0.01)


def test_zeros_of_sentinel2_are_no_data(src, tmp_path):
    place = utm(width=3 * 264)
    pixels = np.full((264, 3 * 264, 12), 1500, np.uint16)
    pixels[:, :100] = 0
    pixels[:, 600:, 0] = 0  # one band alone is data
    geo.write(src / "S2L2A" / "a.tif", pixels, place)
    geo.write(src / "DEM" / "a.tif", plane(place).astype(np.float32), place)
    found, info = packed(src, tmp_path)
    assert sorted(key[-3:] for key, m in found if m == "S2L2A") == ["264", "528"]
    assert sum(m == "DEM" for _, m in found) == 3 and info["splits"]["train"] == {"locations": 3, "DEM": 3, "S2L2A": 2}
    # Nor do they bleed into their neighbours where a file is brought to another grid.
    geo.write(src / "S2L2A" / "a.tif", pixels[:132, :396, :], utm(pixel=20, height=132, width=396))
    found, _ = packed(src, tmp_path / "again")
    assert all(x[..., 1:].min() == 1500 for (_, m), (x, _) in found.items() if m == "S2L2A")


def test_offsets_of_products_and_files(src, tmp_path):
    pixels = np.random.default_rng(0).integers(500, 4000, (264, 264, 12)).astype(np.uint16)
    for i, name in enumerate("ab"):
        geo.write(src / "S2L2A" / f"{name}.tif", pixels, utm(x=600_000.0 + 50_000 * i))
    call = ["data", "pack", str(src), str(tmp_path / "out"), "--val_fraction=0", "--offset", "S2L2A=-1000", "--offset", "S2L2A/b=0"]
    assert cli.main(call) == 0
    index = open_index(tmp_path / "out", "train")
    np.testing.assert_array_equal(index.read(0, "S2L2A"), np.maximum(pixels.astype(int) - 1000, 0))
    np.testing.assert_array_equal(index.read(1, "S2L2A"), pixels)
    assert index.attributes(0, "S2L2A")["offset"] == -1000 and "offset" not in index.attributes(1, "S2L2A")
    with pytest.raises(ValueError, match="offset is given for S2L2A/c, which is no modality or MODALITY/NAME"):
        pack(str(src), str(tmp_path / "other"), offsets={"S2L2A/c": 3})


def test_what_an_offset_brings_to_the_value_of_no_data_is_data(src, tmp_path):
    """Water as dark as that, and reflectance that comes to what the file calls no data."""
    pixels = np.random.default_rng(0).integers(2001, 9000, (264, 792, 12)).astype(np.uint16)
    pixels[5, 5], pixels[6, 6], pixels[7, 300], pixels[8, 600] = 990, 3000, 0, 2000
    geo.write(src / "S2L2A" / "a.tif", pixels, utm(width=792), nodata=2000)
    found, info = packed(src, tmp_path, offsets={"S2L2A": -1000})
    assert [key for key, _ in found] == ["a_r00000_c00000"] and info["left_out"] == {"without_data": 2}
    np.testing.assert_array_equal(found["a_r00000_c00000", "S2L2A"][0], np.maximum(pixels[:, :264].astype(int) - 1000, 0))


def test_reflectance_of_0_to_1_is_said_and_multiplied(src, tmp_path):
    pixels = np.random.default_rng(0).uniform(0.01, 0.9, (264, 264, 12)).astype(np.float32)
    geo.write(src / "S2L2A" / "a.tif", pixels, utm())
    with pytest.warns(UserWarning, match="taken for reflectance of 0-1, and multiplied by 10000"):
        found, _ = packed(src, tmp_path)
    np.testing.assert_array_equal(found["a", "S2L2A"][0], np.rint(pixels * np.float32(1e4)))


def test_values_that_look_like_others_are_said(src, tmp_path):
    rng = np.random.default_rng(0)
    geo.write(src / "DEM" / "a.tif", rng.normal(0, 1, (264, 264, 1)).astype(np.float32), utm())
    geo.write(src / "NDVI" / "a.tif", np.full((264, 264, 1), 0.4, np.float32), utm())
    with pytest.warns(UserWarning, match="DEM/a.tif .*looks standardised already; m, int16 from -500 to 9000 is expected") as told:
        packed(src, tmp_path)
    assert len(told) == 1
    geo.write(src / "S1RTC" / "a.tif", rng.normal(-70, 1, (264, 264, 2)).astype(np.float32), utm())
    geo.write(src / "DEM" / "a.tif", plane(utm()).astype(np.float32), utm())
    with pytest.warns(UserWarning, match=r"S1RTC/a.tif has a mean of -7\d.* in VV, far from -10.93 \+- 4.391 dB"):
        packed(src, tmp_path / "again")


def test_ordinary_files_raise_no_warning(src, tmp_path):
    geo.write(src / "DEM" / "a.tif", plane(utm()).astype(np.float32), utm())
    geo.write(src / "S2L2A" / "a.tif", np.random.default_rng(0).integers(1, 4000, (264, 264, 12)).astype(np.uint16), utm())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed(src, tmp_path)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (Place("EPSG:4326", (0.001, 0.0, 10.0, 0.0, -0.0001, 86.0), 300, 300), "a.tif lies at latitude 86.0, and UTM zones end"),
        (Place("EPSG:4326", (0.1, 0.0, 0.0, 0.0, -0.1, 50.0), 300, 300), "a.tif is wider than 1000 km"),
        (Place("EPSG:4326", (DEGREE, 0.0, LON, 0.0, -DEGREE, LAT), 300, 300), r"a.tif is \d+x\d+ pixels once on a grid of 10 m"),
    ],
)
def test_what_cannot_be_brought_to_a_grid(src, tmp_path, place, message):
    geo.write(src / "DEM" / "a.tif", np.zeros((place.height, place.width, 1), np.int16), place)
    with pytest.raises(ValueError, match=message):
        packed(src, tmp_path)


def test_only_what_lies_under_a_tile_is_read():
    large = Place("EPSG:4326", (10 * DEGREE / 0.66, 0.0, LON - 0.5, 0.0, -10 * DEGREE, LAT + 0.5), 10_980, 10_980)
    window = geo._window_under(large, utm())
    assert 0.9 * 264**2 < window.height * window.width < 1.4 * 264**2
    fine = Place("EPSG:32632", (0.5, 0.0, 680_000.0, 0.0, -0.5, 5_340_000.0), 40_000, 40_000)
    assert (
        geo._decimation(geo._window_under(fine, utm()), utm(), "continuous") == 10
    )  # 528 x 528 pixels of a metre and a half, not 5280 x 5280
    assert geo._window_under(large, utm(x=300_000.0)) is None


def test_a_grid_of_10_metres_keeps_every_byte(src, tmp_path):
    """As it was before files on other grids were taken: no sample differs from one that is written from the file's own pixels."""
    pixels = np.random.default_rng(0).integers(1, 9000, (264, 300, 12)).astype(np.uint16)
    geo.write(src / "S2L2A" / "a.tif", pixels, utm(width=300))
    found, info = packed(src, tmp_path)
    assert {key for key, _ in found} == {"a_r00000_c00000", "a_r00000_c00036"} and "left_out" not in info
    for (key, _), (x, where) in found.items():
        column = int(key[-5:])
        np.testing.assert_array_equal(x, pixels[:, column : column + 264])
        assert where == utm(width=300).window(0, column, 264, 264)
    assert check.check(tmp_path / "out", "train", workers=1).ok
