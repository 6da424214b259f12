"""GeoTIFF in, GeoTIFF out: tiling, place, files and errors, with networks of random weights."""

from __future__ import annotations

import json

import flax
import jax
import numpy as np
import pytest

from terramind_jax import generate, geo, modalities, model, predict, tokenizer
from terramind_jax.modalities import STREAMS

TILE = 48
PLACE = geo.Place("EPSG:32633", (10.0, 0, 500_000.0, 0, -10.0, 5_300_000.0), 100, 59)


@pytest.fixture(scope="module")
def networks():
    jax.config.update("jax_disable_most_optimizations", True)
    encoder = tuple(STREAMS[k] for k in ("untok_dem@224", "tok_ndvi@224", "tok_lulc@224", "coords"))
    sizes = dict(dim=16, encoder_depth=1, decoder_depth=1, num_heads=2, gated_mlp=False, use_bias=True, image_size=TILE)
    module = model.TerraMind(model.TransformerConfig(**sizes, encoder=encoder, decoder=encoder[1:]))
    tokenizers = {}
    for name in ("NDVI", "LULC"):
        facts = modalities.get(name)
        tokenizers[name] = tokenizer.Tokenizer(tokenizer.TokenizerConfig(name, facts.channels, facts.levels, 16, 1, 2, image_size=TILE))
    yield (module, fill(model.init, module)), {name: (t, fill(tokenizer.init, t)) for name, t in tokenizers.items()}
    jax.config.update("jax_disable_most_optimizations", False)


def fill(init, module):
    rng = np.random.default_rng(0)
    shapes = flax.core.meta.unbox(jax.eval_shape(lambda key: init(module, key), jax.random.key(0)))
    return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), shapes)


@pytest.fixture
def weights(networks, monkeypatch, tmp_path):
    """A folder as training leaves it, with `load` of both kinds replaced."""
    trained, tokenizers = networks
    for name in tokenizers:
        (tmp_path / "weights" / "tokenizers" / name).mkdir(parents=True)
    monkeypatch.setattr(predict.pretrain, "load", lambda workdir: (*trained, None))
    monkeypatch.setattr(predict.tokenizer, "load", lambda workdir: tokenizers[workdir.name])
    return tmp_path / "weights"


@pytest.fixture
def copies(monkeypatch):
    """Generation replaced by something whose place in the output can be seen: NDVI is the elevation over 1000."""
    calls = []

    def fake(module, variables, tokenizers, inputs, outputs, *, seed, **options):
        calls.append({"seed": np.asarray(seed).tolist(), "inputs": inputs, **options})
        makes = {"NDVI": inputs["DEM"] / 1000, "LULC": np.eye(10)[inputs["DEM"][..., 0].astype(int) % 10]}
        makes["coords"] = np.full((len(inputs["DEM"]), 2), np.nan)
        return {name: np.asarray(makes[name], np.float32) for name in outputs}

    monkeypatch.setattr(generate, "generate", fake)
    return calls


def elevation(path, height=100, width=59, seed=0):
    array = np.random.default_rng(seed).integers(0, 2000, (height, width, 1)).astype(np.int16)
    place = geo.Place(PLACE.crs, PLACE.transform, height, width)
    geo.write(path, array, like=place)
    return array


def test_real_networks_write_every_kind_of_output(weights, tmp_path):
    elevation(tmp_path / "a.tif", TILE, TILE)
    written = predict.run(
        weights=weights, inputs={"DEM": tmp_path / "a.tif"}, to=["NDVI", "LULC", "coords"], out=tmp_path / "out", temperature=0
    )
    assert [p.relative_to(tmp_path / "out").as_posix() for p in written] == ["NDVI/a.tif", "LULC/a.tif", "coords/a.json"]
    ndvi, lulc = geo.read(written[0], "NDVI"), geo.read(written[1], "LULC")
    assert ndvi.shape == lulc.shape == (TILE, TILE, 1)
    assert ndvi.dtype == np.float32 and np.isfinite(ndvi).all()
    assert lulc.dtype == np.uint8 and lulc.max() < 10
    assert set(json.loads(written[2].read_text())[0]) == {"lon", "lat"}
    assert (tmp_path / "out" / "a.png").is_file()


def test_a_long_side_is_covered_and_a_short_one_centred(weights, copies, tmp_path):
    array = elevation(tmp_path / "a.tif")  # 100 x 59 pixels: three tiles of 48, the last shifted back, in the middle 48 columns
    (path,) = predict.run(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, to=["NDVI"], out=tmp_path / "out", seed=7)
    ndvi = geo.read(path)
    np.testing.assert_allclose(ndvi, array[:, 5:53] / 1000, rtol=1e-6)
    assert ndvi.place == PLACE.window(0, 5, 100, 48)
    assert [call["seed"] for call in copies] == [[7, 8, 9]]


def test_what_is_cut_off_is_said_and_nothing_is_replaced(weights, copies, tmp_path, capsys):
    elevation(tmp_path / "a.tif")
    call = dict(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, to=["NDVI"], out=tmp_path / "out")
    predict.run(**call)
    assert "a: of 100x59 pixels only 100x48 in the middle\n" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"out/a\.png exists already; choose another name"):
        predict.run(**call)
    (tmp_path / "out" / "a.png").unlink()
    with pytest.raises(FileExistsError, match=r"out/NDVI/a\.tif exists already"):
        predict.run(**call)


def test_batches_have_one_shape(weights, copies, monkeypatch, tmp_path):
    monkeypatch.setattr(predict, "BATCH_SIZE", 2)
    array = elevation(tmp_path / "a.tif")
    (path,) = predict.run(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, to=["LULC"], out=tmp_path / "out", steps=3, timesteps=5)
    np.testing.assert_array_equal(geo.read(path), array[:, 5:53] % 10)
    assert [call["seed"] for call in copies] == [[0, 1], [2, 2]]
    assert all(call["inputs"]["DEM"].shape == (2, TILE, TILE, 1) and (call["steps"], call["timesteps"]) == (3, 5) for call in copies)


def test_folders_join_by_file_name_and_a_raster_gives_its_position(weights, copies, tmp_path):
    for folder, names in (("dem", "abc"), ("where", "bcd")):
        for name in names:
            (tmp_path / folder).mkdir(exist_ok=True)
            elevation(tmp_path / folder / f"{name}.tif", TILE, TILE)
    inputs = {"DEM": tmp_path / "dem", "coords": tmp_path / "where"}
    written = predict.run(weights=weights, inputs=inputs, to=["NDVI"], out=tmp_path / "out")
    assert [p.name for p in written] == ["b.tif", "c.tif"]
    expected = geo.lonlat(geo.Place(PLACE.crs, PLACE.transform, TILE, TILE))
    np.testing.assert_allclose(copies[0]["inputs"]["coords"], [expected])


def test_missing_coordinates_are_null(weights, copies, tmp_path):
    elevation(tmp_path / "a.tif", TILE, TILE)
    (path,) = predict.run(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, to=["coords"], out=tmp_path / "out")
    assert json.loads(path.read_text()) == [{"lon": None, "lat": None}]


@pytest.mark.parametrize("height, width", [(48, 48), (49, 130), (96, 96)])
def test_tiles_cover_every_pixel(height, width):
    seen = np.zeros((height, width), int)
    for window in predict.tiles(height, width, TILE):
        assert seen[window].shape == (TILE, TILE)
        seen[window] += 1
    assert seen.min() >= 1


@pytest.mark.parametrize(
    "inputs, to, message",
    [
        ({}, ["NDVI"], "No input is named"),
        ({"DEM": "a.tif"}, [], "No output is named"),
        ({"S3": "a.tif"}, ["NDVI"], "Unknown input modality 'S3'"),
        ({"DEM": "a.tif"}, ["S3"], "Unknown output modality 'S3'"),
        ({"DEM": "a.tif"}, ["caption"], "A caption is text, which this command neither reads nor writes"),
        ({"DEM": "missing.tif"}, ["NDVI"], "There is no file or folder"),
        ({"DEM": "empty"}, ["NDVI"], "empty is empty: it holds no GeoTIFF"),
        ({"DEM": "a.tif", "coords": "empty"}, ["NDVI"], "mix files and folders"),
        ({"DEM": "one", "coords": "two"}, ["NDVI"], "share no file name"),
        ({"DEM": "a.tif", "coords": "shifted.tif"}, ["NDVI"], "do not lie on one grid"),
        ({"DEM": "small.tif"}, ["NDVI"], "is 47x48 pixels; expected at least 48x48"),
        ({"DEM": "nan.tif"}, ["NDVI"], "nan.tif has 1 NaN or infinite pixel values"),
        ({"S1GRD": "a.tif"}, ["NDVI"], "a.tif has 1 bands, expected 2 for S1GRD"),
    ],
)
def test_errors_say_what_is_wrong(weights, copies, tmp_path, inputs, to, message):
    for folder in ("empty", "one", "two"):
        (tmp_path / folder).mkdir()
    elevation(tmp_path / "a.tif", TILE, TILE)
    elevation(tmp_path / "one" / "a.tif", TILE, TILE)
    elevation(tmp_path / "two" / "b.tif", TILE, TILE)
    elevation(tmp_path / "small.tif", 47, 48)
    square = geo.Place(PLACE.crs, PLACE.transform, TILE, TILE)
    geo.write(
        tmp_path / "shifted.tif", np.zeros((TILE, TILE)), like=geo.Place(PLACE.crs, (10, 0, 500_003.0, 0, -10, 5_300_000.0), TILE, TILE)
    )
    hole = np.where(np.arange(TILE * TILE).reshape(TILE, TILE) == 7, -32768, 100).astype(np.int16)
    geo.write(tmp_path / "hole.tif", hole, like=square, nodata=-32768)
    geo.write(tmp_path / "nan.tif", np.where(np.eye(TILE) * (np.arange(TILE) == 3), np.nan, 1.0).astype(np.float32), like=square)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        predict.run(weights=weights, inputs={name: tmp_path / path for name, path in inputs.items()}, to=to, out=tmp_path / "out")


def test_a_missing_or_foreign_tokenizer_is_named(weights, networks, monkeypatch, tmp_path):
    elevation(tmp_path / "a.tif", TILE, TILE)
    call = dict(weights=weights, inputs={"DEM": tmp_path / "a.tif"}, to=["NDVI"], out=tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="There is no tokenizer .*elsewhere/NDVI"):
        predict.run(**call, tokenizers=tmp_path / "elsewhere")
    monkeypatch.setattr(predict.tokenizer, "load", lambda workdir: networks[1]["LULC"])
    with pytest.raises(ValueError, match="has 4375 codes, but the model was trained with 15360"):
        predict.run(**call)


def test_weights_that_are_no_work_directory(tmp_path):
    elevation(tmp_path / "a.tif", TILE, TILE)
    call = dict(inputs={"DEM": tmp_path / "a.tif"}, to=["NDVI"], out=tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="not the work directory of a training run"):
        predict.run(weights=tmp_path, **call)
    with pytest.raises(FileNotFoundError, match=r"There is no work directory .*nothing\.$"):
        predict.run(weights=tmp_path / "nothing", **call)
    with pytest.raises(FileNotFoundError, match="no work directory random; to generate with hub or random weights say which model"):
        predict.run(weights="random", **call)
    with pytest.raises(ValueError, match="terramind_v1_tiny_tim does not generate; choose one such as terramind_v1_base"):
        predict.run(weights="random", model="terramind_v1_tiny_tim", **call)
