"""Scenes to embeddings: what a layer says, as a raster or a table, of scenes that are larger than a window."""

from __future__ import annotations

import dataclasses
import sys

import flax
import jax
import numpy as np
import pytest
import random_networks
import tqdm
from elevations import PLACE, elevation, folder_with_a_bad_raster, with_a_bad_raster

from terramind_jax import bands, cli, embed_scenes, geo, modalities, model
from terramind_jax.modalities import STREAMS
from terramind_jax.model import Backbone, BackboneConfig, backbone
from terramind_jax.scenes import embedding, feeding, reading

TILE, DIM = 48, 16


@pytest.fixture(scope="module")
def network():
    encoder = tuple(STREAMS[k] for k in ("untok_dem@224", "untok_sen1grd@224", "coords"))
    sizes = dict(dim=DIM, encoder_depth=2, decoder_depth=1, num_heads=2, gated_mlp=False, use_bias=True, image_size=TILE)
    module = model.TerraMind(model.TransformerConfig(**sizes, encoder=encoder, decoder=(STREAMS["tok_ndvi@224"],)))
    shapes = flax.core.meta.unbox(jax.eval_shape(lambda key: model.init(module, key), jax.random.key(0)))
    rng = np.random.default_rng(0)
    return module, jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), shapes)


@pytest.fixture
def weights(network, monkeypatch, tmp_path):
    (tmp_path / "weights").mkdir()
    monkeypatch.setattr(embed_scenes.pretrain, "load", lambda workdir: (*network, None))
    monkeypatch.setattr(embed_scenes, "spread", lambda network: network)
    return tmp_path / "weights"


@pytest.fixture
def means(monkeypatch):
    """Features replaced by what does not depend on the window: the mean of each patch's pixels."""

    def features(module, variables, values):
        x = np.asarray(values["untok_dem@224"])
        patches = x.reshape(len(x), 3, 16, 3, 16, 1).mean((2, 4)).reshape(len(x), 9, 1)
        return [patches * 0, patches.repeat(DIM, -1)]

    monkeypatch.setattr(backbone, "features", features)


def expected(array):
    """What `means` makes of a scene, mirrored at its edge: ``[h, w, 1]``."""
    height, width = (-(-n // 16) for n in array.shape[:2])
    whole = np.pad(array, [(0, height * 16 - array.shape[0]), (0, width * 16 - array.shape[1]), (0, 0)], "reflect")
    whole = modalities.standardize("DEM", whole)
    return whole.reshape(height, 16, width, 16, 1).mean((1, 3))


@pytest.mark.parametrize("layer", [-1, 0])
def test_a_window_is_what_the_encoder_says_of_it(weights, network, tmp_path, layer):
    array = elevation(tmp_path / "a.tif", TILE, TILE)
    (path,) = embed_scenes.run(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, out=tmp_path / "out", layer=layer)
    whole, variables = network
    shared = {f.name: getattr(whole.config, f.name) for f in dataclasses.fields(BackboneConfig) if hasattr(whole.config, f.name)}
    module = Backbone(BackboneConfig(**shared | {"streams": whole.config.encoder}))
    features = backbone.features(module, variables, {"untok_dem@224": modalities.standardize("DEM", array[None])})[layer]
    np.testing.assert_allclose(geo.read(path), np.reshape(features, (3, 3, DIM)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("overlap, batch_size", [(None, 8), (32, 2), (0, 1)])
def test_a_raster_has_a_pixel_a_patch(weights, means, tmp_path, overlap, batch_size):
    array = elevation(tmp_path / "a.tif")
    call = dict(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, out=tmp_path / "out", overlap=overlap, batch_size=batch_size)
    (path,) = embed_scenes.run(**call)
    found = geo.read(path)
    np.testing.assert_allclose(found, expected(array).repeat(DIM, -1), rtol=1e-4, atol=1e-5)
    assert found.place == geo.Place(PLACE.crs, (160.0, 0, 500_000.0, 0, -160.0, 5_300_000.0), 7, 4)
    header = geo.read_header(path)
    assert header.descriptions[3] == "embedding 3" and np.isnan(header.nodata) and header.tags["terramind_jax_layer"] == "1"
    assert header.tags["terramind_jax_scene"] == "a"


@with_a_bad_raster
def test_one_bad_raster_of_a_folder_is_told_before_anything_is_made(weights, means, monkeypatch, tmp_path, how, message):
    bad = folder_with_a_bad_raster(tmp_path / "scenes", how)
    call = dict(weights=weights, inputs={"DEM": tmp_path / "scenes"}, out=tmp_path / "out")
    with monkeypatch.context() as without, pytest.raises(ValueError, match=message):
        without.setattr(backbone, "features", None)
        embed_scenes.run(**call)
    assert not list((tmp_path / "out").iterdir())
    bad.unlink()  # which is another command
    elevation(tmp_path / "scenes" / "c.tif")
    measured, original = [], reading.measured
    monkeypatch.setattr(reading, "measured", lambda scene, cut: measured.append(scene.name) or original(scene, cut))
    assert [path.stem for path in embed_scenes.run(**call)] == ["a", "c"] == measured


def test_patches_without_data_have_no_embedding(weights, means, tmp_path):
    hole = np.zeros((100, 112), bool)
    hole[16:32, 48:64], hole[:, 80:], hole[3, 4] = True, True, True
    elevation(tmp_path / "a.tif", width=112, hole=hole)
    (path,) = embed_scenes.run(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, out=tmp_path / "out")
    missing = np.zeros((7, 7), bool)
    missing[1, 3], missing[:, 5:] = True, True
    np.testing.assert_array_equal(np.isnan(geo.read(path)).all(-1), missing)


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(weights, monkeypatch, tmp_path):
    elevation(tmp_path / "a.tif")
    call = dict(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, overlap=32, batch_size=1)
    (whole,) = embed_scenes.run(**call, out=tmp_path / "whole")
    left, original = [], backbone.features

    def stop(*arguments):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return original(*arguments)

    class Bar(tqdm.tqdm):
        def __exit__(self, *error):
            bars.append((self.initial, self.n, self.total))
            super().__exit__(*error)

    bars = []
    monkeypatch.setattr(embedding, "tqdm", Bar)
    monkeypatch.setattr(backbone, "features", stop)
    stops, parts = 0, None
    while parts is None:
        left[:] = [None] * 7
        try:
            parts = embed_scenes.run(**call, out=tmp_path / "parts")
        except KeyboardInterrupt:
            stops += 1
    assert stops > 1 and parts[0].read_bytes() == whole.read_bytes()
    assert bars[0][0] == 0 < bars[-1][0] and bars[-1][1:] == (10, 10) and all(n - first <= 7 for first, n, _ in bars)
    assert [p.name for p in (tmp_path / "parts").iterdir()] == ["a.tif"]


def test_a_file_of_some_bands_is_one_whose_others_were_filled(monkeypatch, tmp_path):
    given = [band for band in modalities.S2L2A_BANDS if band not in ("COASTAL_AEROSOL", "WATER_VAPOR")]
    module, variables = random_networks.build((STREAMS["untok_sen2l2a@224"],), (STREAMS["tok_ndvi@224"],), TILE)
    monkeypatch.setattr(embed_scenes.pretrain, "load", lambda workdir: (module, variables, None))
    monkeypatch.setattr(embed_scenes, "spread", lambda network: network)
    (tmp_path / "weights").mkdir()
    some = np.random.default_rng(0).integers(1500, 6000, (TILE, TILE, 10)).astype(np.uint16)
    whole = np.rint(bands.fill_missing("S2L2A", some, given)).astype(np.uint16)
    place = geo.Place(PLACE.crs, PLACE.transform, TILE, TILE)
    geo.write(tmp_path / "some.tif", some, like=place)
    geo.write(tmp_path / "whole.tif", whole, like=place, modality="S2L2A")
    call = dict(weights=tmp_path / "weights", out=tmp_path / "out")
    (expected,) = embed_scenes.run(**call, inputs={"S2L2A": tmp_path / "whole.tif"})
    (path,) = embed_scenes.run(**call, inputs={"S2L2A": tmp_path / "some.tif"}, bands={"S2L2A": given})
    np.testing.assert_allclose(geo.read(path), geo.read(expected), atol=5e-3)  # the others were rounded to be written
    (path,) = embed_scenes.run(**call | {"out": tmp_path / "other"}, inputs={"S2L2A": tmp_path / "some.tif"}, bands={"S2L2A": given[::-1]})
    assert np.abs(geo.read(path) - geo.read(expected)).max() > 0.1


def test_several_devices_make_the_same(weights, monkeypatch, tmp_path):
    """A row of windows is no multiple of the devices."""
    elevation(tmp_path / "a.tif", hole=np.s_[48:64, 16:32])
    call = dict(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, overlap=32)
    (one,) = embed_scenes.run(**call, out=tmp_path / "one")
    parts, original = [], backbone.features

    def features(module, variables, values):
        parts.append({len(x.sharding.device_set) for x in values.values()})
        return original(module, variables, values)

    monkeypatch.setattr(backbone, "features", features)
    monkeypatch.setattr(embed_scenes, "spread", feeding.spread)
    (several,) = embed_scenes.run(**call, out=tmp_path / "several")
    assert jax.local_device_count() > 1 and parts and all(of == {jax.local_device_count()} for of in parts)
    np.testing.assert_allclose(geo.read(several), geo.read(one), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling, format", [("none", "geotiff"), ("none", "geoparquet"), ("mean", "geoparquet")])
def test_scenes_done_together_are_as_if_alone(weights, means, monkeypatch, tmp_path, pooling, format):
    monkeypatch.setattr(feeding, "at_once", lambda network, batch_size: batch_size)  # as on an accelerator
    sizes, batches = {"a": (48, 80), "b": (48, 48), "c": (75, 48)}, []
    for seed, (name, size) in enumerate(sizes.items()):
        elevation(tmp_path / "scenes" / f"{name}.tif", *size, seed, hole=np.s_[:16, 16:32])
    features = backbone.features
    monkeypatch.setattr(backbone, "features", lambda module, variables, values: batches.append(1) or features(module, variables, values))
    call = dict(weights=weights, pooling=pooling, format=format, overlap=0)
    together = embed_scenes.run(**call, inputs={"DEM": tmp_path / "scenes"}, out=tmp_path / "out")
    assert len(batches) == 1 + 2  # of a and b, and rows of c
    alone = [embed_scenes.run(**call, inputs={"DEM": tmp_path / "scenes" / f"{x}.tif"}, out=tmp_path / x)[0] for x in sizes]
    for mine, one in zip(together, alone, strict=True):
        if format == "geotiff":
            np.testing.assert_array_equal(geo.read(mine), geo.read(one))
            assert geo.read_header(mine).place == geo.read_header(one).place
        else:
            geopandas, compared = pytest.importorskip("geopandas"), pytest.importorskip("geopandas.testing")
            table = geopandas.read_parquet(mine)
            assert table.row.dtype == table.column.dtype == np.int64
            compared.assert_geodataframe_equal(table, geopandas.read_parquet(one))


@pytest.mark.parametrize("pooling, pool", [("mean", np.mean), ("max", np.max)])
def test_a_table_of_windows(weights, means, tmp_path, pooling, pool):
    geopandas = pytest.importorskip("geopandas")
    array = elevation(tmp_path / "a.tif", hole=np.s_[48:64, 16:32])
    call = dict(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, out=tmp_path / "out", pooling=pooling, format="geoparquet")
    (path,) = embed_scenes.run(**call)
    table, patches = geopandas.read_parquet(path), expected(array)[..., 0]
    patches[3, 1] = np.nan
    starts = [(row, column) for row in (0, 3, 4) for column in (0, 1)]  # the last windows are shifted back
    assert [(16 * row, 16 * column) for row, column in starts] == list(zip(table.row, table.column, strict=True))
    windows = [patches[row : row + 3, column : column + 3] for row, column in starts]
    np.testing.assert_allclose(
        np.stack(table.embedding)[:, 0], [pool(window[np.isfinite(window)]) for window in windows], rtol=1e-4, atol=1e-5
    )
    assert table.crs.to_epsg() == 32633 and set(table.scene) == {"a"}
    assert table.geometry[0].bounds == (500_000, 5_300_000 - 480, 500_480, 5_300_000)
    assert table.geometry[5].bounds == (500_160, 5_300_000 - 1000, 500_590, 5_300_000 - 640)  # not over the edge
    assert table.attrs["terramind_jax_pooling"] == pooling and table.attrs["terramind_jax_scene"] == "a"


def test_a_table_of_patches_is_the_raster(weights, tmp_path):
    geopandas = pytest.importorskip("geopandas")
    elevation(tmp_path / "a.tif", hole=np.s_[48:64, 16:32])
    call = dict(weights=weights, inputs={"DEM": tmp_path / "a.tif"})
    raster, table = (embed_scenes.run(**call, out=tmp_path / f, format=f)[0] for f in ("geotiff", "geoparquet"))
    raster, table = geo.read(raster), geopandas.read_parquet(table)
    assert len(table) == 7 * 4 - 1
    np.testing.assert_array_equal(np.stack(table.embedding), raster[table.row // 16, table.column // 16])


def test_a_table_needs_geopandas(weights, monkeypatch, tmp_path):
    elevation(tmp_path / "a.tif", TILE, TILE)
    monkeypatch.setitem(sys.modules, "geopandas", None)
    with pytest.raises(ImportError, match=r"A table needs GeoPandas, which is not installed: pip install 'terramind-jax\[geo\]'"):
        embed_scenes.run(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, out=tmp_path / "out", format="geoparquet")


@pytest.mark.parametrize(
    "inputs, options, message",
    [
        ({"DEM": "a.tif"}, {"layer": 2}, "The layer is 2; this model's are 0-1, or -2 to -1 from the last"),
        ({"DEM": "a.tif"}, {"pooling": "mean"}, "A raster holds a vector a patch; the mean of windows goes to a table"),
        ({"DEM": "a.tif"}, {"pooling": "sum"}, "Unknown pooling 'sum'; known are none, mean, max"),
        ({"DEM": "a.tif"}, {"format": "csv"}, "Unknown format 'csv'; known are geotiff, geoparquet"),
        ({"DEM": "a.tif"}, {"batch_size": 0}, "batch_size is 0"),
        ({"coords": "a.tif"}, {}, "coords is no image; an embedding needs at least one"),
        ({"S1GRD": "a.tif"}, {}, "a.tif has 1 bands, expected 2 for S1GRD"),
        ({"NDVI": "a.tif"}, {}, "This model takes no NDVI; it takes DEM, S1GRD, coords"),
        ({"DEM": "small.tif"}, {}, "is 47x48 pixels; expected at least 48x48"),
    ],
)
def test_errors_say_what_is_wrong(weights, tmp_path, inputs, options, message):
    elevation(tmp_path / "a.tif", TILE, TILE)
    elevation(tmp_path / "small.tif", 47, 48)
    with pytest.raises(ValueError, match=message):
        embed_scenes.run(weights=weights, inputs={name: tmp_path / path for name, path in inputs.items()}, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder_is_told_before_weights_are_loaded(tmp_path):
    elevation(tmp_path / "a.tif", TILE, TILE)
    (tmp_path / "out").touch()
    with pytest.raises(NotADirectoryError, match="out is a file; expected a folder."):
        embed_scenes.run(weights=tmp_path / "nowhere", inputs={"DEM": tmp_path / "a.tif"}, out=tmp_path / "out")


def test_nothing_is_replaced(weights, means, tmp_path):
    elevation(tmp_path / "a.tif", TILE, TILE)
    call = dict(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, out=tmp_path / "out")
    embed_scenes.run(**call)
    with pytest.raises(FileExistsError, match=r"out/a\.tif exists already"):
        embed_scenes.run(**call)


def test_a_scene_without_crs_is_said(weights, means, tmp_path, capsys):
    geo.write(tmp_path / "a.tif", np.ones((TILE, TILE, 1), np.int16))
    embed_scenes.run(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, out=tmp_path / "out")
    assert "a: the input does not say where it lies (it has no CRS), so the outputs do not either.\n" in capsys.readouterr().out


def test_models_that_have_no_features(tmp_path):
    elevation(tmp_path / "a.tif", TILE, TILE)
    call = dict(inputs={"DEM": tmp_path / "a.tif"}, out=tmp_path / "out", weights="random")
    with pytest.raises(ValueError, match="terramind_v1_base_generate is no feature extractor; choose one such as terramind_v1_base"):
        embed_scenes.run(**call, model="terramind_v1_base_generate")
    with pytest.raises(FileNotFoundError, match="no work directory random; for hub or random weights say which model with --model"):
        embed_scenes.run(**call)


def test_the_command_passes_its_arguments_on(monkeypatch, tmp_path):
    elevation(tmp_path / "a.tif", TILE, TILE)
    given = {}
    monkeypatch.setattr(embed_scenes, "run", lambda **arguments: given.update(arguments))
    options = ["--layer=3", "--pooling=mean", "--format=geoparquet", "--overlap=16", "--batch_size=4", "--bands=DEM=DEM"]
    assert cli.main(["embed", "--weights=w", f"--input=DEM={tmp_path}/a.tif", "--out=o", *options]) == 0
    assert given == dict(weights="w", inputs={"DEM": f"{tmp_path}/a.tif"}, out="o", tokenizers=None, model=None, lulc_codes=None) | dict(
        layer=3, pooling="mean", format="geoparquet", overlap=16, batch_size=4, bands={"DEM": ["DEM"]}
    )
