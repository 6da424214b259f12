"""Rasters that are written row by row: what they say of themselves, and a disk that is full."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil

import numpy as np
import pytest
import rasterio

from terramind_jax import cli, geo
from terramind_jax.scenes import writing

PLACE = geo.Place("EPSG:32633", (10.0, 0, 500_000.0, 0, -10.0, 5_300_000.0), 700, 600)
LAYER = writing.Layer(PLACE, ("VV", "VH"), "float32", "dB", np.nan, {"seed": "3"})


def write(folder, layer, array):
    writing.create(folder / "part.tif", layer)
    for row in range(0, layer.place.height, 99):
        writing.write_rows(folder / "part.tif", row, array[row : row + 99])
    writing.finish(folder / "part.tif", folder / "out" / "a.tif", layer)
    return folder / "out" / "a.tif"


def test_a_file_tells_what_it_is(tmp_path):
    array = np.random.default_rng(0).normal(size=(700, 600, 2)).astype(np.float32)
    array[:10] = np.nan
    with rasterio.open(write(tmp_path, LAYER, array)) as found:
        np.testing.assert_array_equal(np.moveaxis(found.read(), 0, -1), array)
        assert found.descriptions == ("VV", "VH") and found.units == ("dB", "dB") and np.isnan(found.nodata)
        assert found.crs.to_epsg() == 32633 and tuple(found.transform)[:6] == PLACE.transform
        assert found.tags()["seed"] == "3" and found.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert found.overviews(1) == [2]
        np.testing.assert_allclose(
            found.read(1, out_shape=(350, 300))[100], array[200:202, :, 0].reshape(2, 300, 2).mean((0, 2)), rtol=1e-4, atol=1e-5
        )
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overviews_of_classes_are_classes(tmp_path):
    layer = writing.Layer(PLACE, ("LULC",), "uint8", "class", 255, {})
    array = np.where(np.indices((700, 600)).sum(0) % 2, 9, 1).astype(np.uint8)[..., None]
    with rasterio.open(write(tmp_path, layer, array)) as found:
        assert set(np.unique(found.read(1, out_shape=(350, 300)))) <= {1, 9}


def test_a_file_without_crs(tmp_path):
    place = geo.Place("", PLACE.transform, 48, 48)
    path = write(tmp_path, writing.Layer(place, ("DEM",), "float32", "m", np.nan, {}), np.ones((48, 48, 1), np.float32))
    assert geo.place(path) == place


@pytest.mark.parametrize("how", ["errno", "space"])
def test_a_full_disk_is_told_in_one_sentence(tmp_path, monkeypatch, capsys, how):
    def fail(*args, **kwargs):
        if how == "errno":
            raise OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
        raise rasterio.errors.RasterioIOError("Write failed")

    monkeypatch.setattr(rasterio, "open", fail)
    with pytest.raises(OSError, match="The disk of .* is full; make room, and the same command goes on where it stopped") as error:
        writing.create(tmp_path / "a.tif", LAYER)
    assert error.value.errno == errno.ENOSPC and cli._told(error.value)
    assert capsys.readouterr().err.startswith("error: The disk of ")


@contextlib.contextmanager
def at_most(size):
    """Files of `size` bytes at most: what is written beyond fails, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_without_its_blocks_is_told_at_once(tmp_path):
    """Else its rows would be lost later, as GDAL fills it when it closes it and says nothing if that fails."""
    with at_most(2_000_000), pytest.raises(OSError, match="The disk of .* is full") as error:
        writing.create(tmp_path / "a.tif", LAYER)
    assert error.value.errno == errno.ENOSPC


def test_errors_of_a_copy_that_only_gdal_knows(tmp_path, monkeypatch):
    writing.create(tmp_path / "part.tif", LAYER)
    writing.write_rows(tmp_path / "part.tif", 0, np.random.default_rng(0).normal(size=(700, 600, 2)).astype(np.float32))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    with at_most(500_000), pytest.raises(OSError, match="The disk of .* is full"):
        writing.finish(tmp_path / "part.tif", tmp_path / "a.tif", LAYER)
    assert [p.name for p in tmp_path.iterdir() if ".cog" not in p.name] == ["part.tif"]


@pytest.mark.parametrize("lost", [1000, 200_000])
def test_a_copy_without_its_end_is_told_and_made_again(tmp_path, monkeypatch, lost):
    """GDAL says nothing if what it writes when it closes a file finds no room."""
    array, copy = np.random.default_rng(0).normal(size=(700, 600, 2)).astype(np.float32), rasterio.shutil.copy

    def cut(source, path, **options):
        copy(source, path, **options)
        os.truncate(path, path.stat().st_size - lost)

    with monkeypatch.context() as full:
        full.setattr(rasterio.shutil, "copy", cut)
        with pytest.raises(OSError, match="The disk of .* is full; make room, and the same command goes on") as error:
            write(tmp_path, LAYER, array)
    assert error.value.errno == errno.ENOSPC and not (tmp_path / "out" / "a.tif").exists()
    writing.finish(tmp_path / "part.tif", tmp_path / "out" / "a.tif", LAYER)
    assert (tmp_path / "out" / "a.tif").read_bytes() == write(tmp_path, LAYER, array).read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("has_fallocate", [True, False])
def test_an_array_on_disk_has_all_of_its_blocks(tmp_path, monkeypatch, has_fallocate):
    """Else a disk that fills up later would end the process with SIGBUS."""
    if not has_fallocate:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    path, shape = tmp_path / "ids.npy", (3, 500_000)
    ids = writing.mapped(path, np.int32, shape, goes_on=False)
    assert ids.shape == shape and not ids.any() and path.stat().st_blocks * 512 >= ids.nbytes
    ids[1] = 7
    ids.flush()
    assert (writing.mapped(path, np.int32, shape, goes_on=True)[1] == 7).all()
    assert not writing.mapped(path, np.int32, shape, goes_on=False).any()


def test_no_room_for_an_array_is_told_before_it_is_mapped(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(OSError, match="The disk of .* is full") as error:
        writing.mapped(tmp_path / "ids.npy", np.int32, (3, 5), goes_on=False)
    assert error.value.errno == errno.ENOSPC


def test_other_errors_of_writing_stay_what_they_are(tmp_path):
    with pytest.raises(rasterio.errors.RasterioIOError):
        writing.create(tmp_path / "nowhere" / "a.tif", LAYER)
