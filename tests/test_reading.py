"""What a scene's rasters give to a model: filled, mirrored, recoded; and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from terramind_jax import bands, geo, modalities
from terramind_jax.scenes import reading, windows

PLACE = geo.Place("EPSG:32633", (10.0, 0, 500_000.0, 0, -10.0, 5_300_000.0), 70, 59)


def write(path, array, **options):
    geo.write(path, array, like=geo.Place(PLACE.crs, PLACE.transform, *array.shape[:2]), **options)
    return path


def elevation(height=70, width=59):
    return np.random.default_rng(0).integers(1, 2000, (height, width, 1)).astype(np.float32)


def test_the_image_is_mirrored_up_to_the_grid(tmp_path):
    array = elevation()
    scene = reading.open_scene("a", {"DEM": write(tmp_path / "a.tif", array)})
    assert scene.grid == (5, 4)
    values, missing = reading.read(scene, "DEM", 32, 48)
    assert values.shape == (48, 64, 1) and values.dtype == np.int16 and not missing.any()
    np.testing.assert_array_equal(values[:38, :59], array[32:])
    np.testing.assert_array_equal(values[38:], values[36:26:-1])
    np.testing.assert_array_equal(values[:, 59:], values[:, 57:52:-1])


@pytest.mark.parametrize("nodata", [None, -9999.0])
def test_what_is_missing_is_the_mean(tmp_path, nodata):
    array = elevation()
    array[3, 4] = np.nan if nodata is None else nodata
    scene = reading.open_scene("a", {"DEM": write(tmp_path / "a.tif", array, nodata=nodata)})
    values, missing = reading.read(scene, "DEM", 0, 48)
    assert np.argwhere(missing).tolist() == [[3, 4]]
    assert values[3, 4, 0] == round(modalities.get("DEM").mean[0])
    assert np.isnan(reading.glance(scene, "DEM", 100)[3, 4, 0])
    np.testing.assert_array_equal(
        np.delete(values.ravel(), 3 * 64 + 4)[:60], np.delete(np.pad(array, [(0, 0), (0, 5), (0, 0)], "reflect").ravel(), 196)[:60]
    )


def test_a_pixel_of_sentinel_2_is_missing_where_all_bands_are_zero(tmp_path):
    array = np.random.default_rng(0).integers(0, 3000, (48, 48, 12)).astype(np.uint16)
    array[0, 0], array[1, 1, :11] = 0, 0
    scene = reading.open_scene("a", {"S2L2A": write(tmp_path / "a.tif", array)})
    assert np.argwhere(reading.read(scene, "S2L2A", 0, 48)[1]).tolist() == [[0, 0]]


SOME = ("NIR_NARROW", "BLUE", "SWIR_1")


def test_a_file_of_some_bands(tmp_path):
    """They are read as they are; what they lack is filled for the network, and here for a picture."""
    array = np.random.default_rng(0).integers(1, 3000, (48, 48, 3)).astype(np.uint16)
    array[3, 4], array[5, 6, :2] = 0, 0
    path = write(tmp_path / "a.tif", array)
    scene = reading.open_scene("a", {"S2L2A": path}, bands={"S2L2A": SOME})
    values, missing = reading.read(scene, "S2L2A", 0, 48)
    facts = modalities.get("S2L2A")
    assert np.argwhere(missing).tolist() == [[3, 4]] and values.shape == (48, 48, 3)
    assert values[3, 4].tolist() == [round(facts.mean[facts.bands.index(band)]) for band in SOME]
    np.testing.assert_array_equal(values[~missing], array[~missing])
    seen = reading.glance(scene, "S2L2A", 100)
    np.testing.assert_array_equal(seen[~missing], bands.fill_missing("S2L2A", array[~missing], SOME))
    assert seen.shape == (48, 48, 12) and np.isnan(seen[3, 4]).all()
    with pytest.raises(ValueError, match=r"a.tif has 3 bands, expected 12 for S2L2A .*: --bands S2L2A=COASTAL_AEROSOL,\.\.\."):
        reading.open_scene("a", {"S2L2A": path})
    with pytest.raises(ValueError, match=r"a.tif has 3 bands, expected 2 for S2L2A \(BLUE, RED\)"):
        reading.open_scene("a", {"S2L2A": path}, bands={"S2L2A": ["BLUE", "RED"]})
    named = write(tmp_path / "b.tif", array, bands=["B8A", "B11", "B02"])
    with pytest.raises(ValueError, match="Band 2 of .*b.tif is named 'B11', expected BLUE"):
        reading.open_scene("a", {"S2L2A": named}, bands={"S2L2A": SOME})


def test_names_of_bands():
    assert reading.known_bands(["S2L2A"], {"S2L2A": ["B8A", "B2", "swir_1"]}) == {"S2L2A": [*SOME]}
    assert reading.known_bands(["S2L2A"], None) == {}
    assert reading.known_bands(["LULC"], {"LULC": ["LULC"]}) == {}  # nothing to fill
    for given, message in (
        ({"S2L2A": ["B02", "B10"]}, r"The bands given for S2L2A are B02, B10; expected some of COASTAL_AEROSOL, .*, each once\."),
        ({"S2L2A": ["B02", "BLUE"]}, "The bands given for S2L2A are B02, BLUE; expected some of .*, each once"),
        ({"S2L2A": []}, "The bands given for S2L2A are none; expected some of"),
        ({"coords": ["B02"]}, r"The bands given for coords are B02; it has none\."),
        ({"DEM": ["DEM"]}, "Bands are given for DEM, which is no input; inputs: S2L2A, coords"),
    ):
        with pytest.raises(ValueError, match=message):
            reading.known_bands(["S2L2A", "coords"], given)


def test_codes_of_land_cover_become_classes_and_nodata_class_0(tmp_path):
    array = np.full((48, 48), 11, np.uint8)
    array[0, 0] = 200
    scene = reading.open_scene("a", {"LULC": write(tmp_path / "a.tif", array, nodata=200)}, "esri")
    values, missing = reading.read(scene, "LULC", 0, 48)
    assert values[0, 0] == 0 and (np.unique(values) == [0, 9]).all()
    assert np.argwhere(missing).tolist() == [[0, 0]]


def test_data_is_missing_where_no_input_has_any(tmp_path):
    dem, radar = elevation(48, 112), np.full((48, 112, 2), -10, np.float32)
    dem[:, :70], radar[:, :64] = np.nan, np.nan
    paths = {"DEM": write(tmp_path / "dem.tif", dem), "S1GRD": write(tmp_path / "s1.tif", radar)}
    scene = reading.open_scene("a", paths)
    missing = reading.missing(scene, 0, 48)
    assert missing[:, :64].all() and not missing[:, 64:].any()
    live = reading.measured(scene, windows.cut(scene.grid, 3, 16))
    assert live.tolist() == [[False, True, True]]  # from columns 0, 32 and 64 on


@pytest.mark.parametrize(
    "array, message",
    [
        (np.full((48, 48, 1), np.nan, np.float32), "a.tif is empty: none of its pixels has data"),
        (np.full((48, 48, 1), 2e4, np.float32), "a.tif holds values from 20000 to 20000; DEM is stored as m, int16"),
        (np.zeros((48, 48, 2), np.int16), r"a.tif has 2 bands, expected 1 for DEM \(DEM\)"),
        (np.zeros((47, 48, 1), np.int16), "a.tif is 47x48 pixels; expected at least 48x48"),
    ],
)
def test_rasters_that_are_refused(tmp_path, array, message):
    path = write(tmp_path / "a.tif", array)
    with pytest.raises(ValueError, match=message):
        scene = reading.open_scene("a", {"DEM": path})
        reading.check_size(scene, 48)
        reading.measured(scene, windows.cut(scene.grid, 3, 16))


def test_a_raster_without_crs_gives_no_position(tmp_path):
    geo.write(tmp_path / "a.tif", elevation(48, 48), like=geo.Place("", PLACE.transform, 48, 48))
    reading.open_scene("a", {"DEM": tmp_path / "a.tif"})
    with pytest.raises(ValueError, match=r"a\.tif does not say where on Earth it lies \(it has no CRS\), so it gives no coords"):
        reading.open_scene("a", {"DEM": tmp_path / "a.tif", "coords": tmp_path / "a.tif"})


def test_files_that_are_no_rasters(tmp_path):
    for name, content in (("empty.tif", b""), ("text.tif", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is no raster that GDAL can read; expected a GeoTIFF"):
            reading.open_scene("a", {"DEM": tmp_path / name})
    path = write(tmp_path / "cut.tif", elevation(300, 300))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="cut.tif is (damaged or truncated|no raster)"):
        scene = reading.open_scene("a", {"DEM": path})
        reading.measured(scene, windows.cut(scene.grid, 3, 16))
