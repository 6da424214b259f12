"""Modalities of a user's own: what a declaration may say, and that a declared one goes everywhere TerraMind's go."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run

import terramind_jax as tm
from terramind_jax import cli, declarations, geo, modalities, plot, tokenize, weights
from terramind_jax import config as configuration
from terramind_jax.data import check
from terramind_jax.data.index import open_index
from terramind_jax.data.shards import ShardWriter, write_sample
from terramind_jax.data.synthesize import synthesize
from terramind_jax.train import logging, pretrain, tokenizer

pytestmark = pytest.mark.usefixtures("compile_fast")

TEMP = {"bands": ["TEMP"], "mean": [283.0], "std": [9.0], "dtype": "float16", "unit": "K", "levels": [4, 4], "valid": [150, 400]}
WATER = {"bands": ["WATER"], "classes": ["dry", "wet"], "levels": [4, 4]}  # a class map
NDWI = {"bands": ["NDWI"], "mean": [-0.2], "std": [0.3], "dtype": "float16"}  # as pixels alone


# ---- what a declaration may say ----


def test_a_declared_modality_is_like_any_other():
    declarations.declare({"TEMP": TEMP, "WATER": WATER, "NDWI": NDWI})
    assert modalities.input_stream("TEMP").key == "untok_temp@224" and modalities.output_stream("TEMP").vocab_size == 16
    assert modalities.input_stream("WATER").key == modalities.output_stream("WATER").key == "tok_water@224"
    assert modalities.get("WATER").channels == 2 and modalities.get("WATER").dtype == "uint8"
    np.testing.assert_allclose(modalities.standardize("TEMP", np.float32([292.0])), [1.0])
    with pytest.raises(ValueError, match="NDWI enters as pixels alone.*declare levels"):
        modalities.output_stream("NDWI")
    with pytest.raises(ValueError, match="Unknown modality 'TEMPP'; did you mean TEMP"):
        modalities.get("TEMPP")


def test_a_declaration_survives_a_configuration():
    declarations.declare({"TEMP": TEMP, "WATER": WATER})
    config = configuration.pretraining()
    with config.unlocked():
        config.modalities = declarations.of(["S2L2A", "TEMP", "WATER"])
    again = configuration.from_json(configuration.to_json(config)).modalities
    assert list(again) == ["TEMP", "WATER"]
    declarations.declare(again)  # the same once more is no error


def test_statistics_may_be_added_later():
    bare = {k: v for k, v in TEMP.items() if k not in ("mean", "std")}
    declarations.declare({"LATER": bare})
    with pytest.raises(ValueError, match="LATER is declared without mean and std; .* data stats ROOT --modality=LATER"):
        modalities.statistics("LATER")
    declarations.declare({"LATER": TEMP})
    declarations.declare({"LATER": bare})
    assert modalities.get("LATER").std == (9.0,)
    with pytest.raises(ValueError, match=r"b.json declares LATER otherwise than before in this process: std \[2.0\] and before \[9.0\]"):
        declarations.declare({"LATER": TEMP | {"std": [2.0]}}, "b.json")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("NEW", {"std": [0.0]}, r"std \[0.0\]; expected positive"),
        ("NEW", {"std": []}, "1 bands, 1 values of mean and 0 of std"),
        ("NEW", {"mean": [1.0, 2.0], "std": [1.0, 2.0]}, "1 bands, 2 values of mean and 2 of std"),
        ("NEW", {"bands": []}, "at least one name"),
        ("NEW", {"bands": ["A", "A"], "mean": [], "std": []}, "none twice"),
        ("NEW", {"bands": "TEMP"}, "bands 'TEMP'; expected a list"),
        ("NEW", {"kind": "radar"}, "kind 'radar'; expected one of continuous, classes, sar"),
        ("NEW", {"dtype": "int64"}, "dtype 'int64'; expected one of uint8"),
        ("NEW", {"level": [4]}, "field 'level'; did you mean levels"),
        ("NEW", {"levels": [1]}, "whole numbers of at least 2"),
        ("NEW", {"valid": [3, 3]}, "lowest and its highest"),
        ("NEW", {"kind": "classes"}, "class map, so it needs one band"),
        ("NEW", {"classes": ["a"], "kind": "sar"}, "leave out one of the two"),
        ("dem", {}, "has the name of another, DEM"),
        ("DEM", {}, "has the name of another, DEM"),
        ("SEN2L2A", {}, "means something else"),
        ("NEW_tokens", {}, "means something else"),
        ("a b", {}, "needs a name of letters"),
    ],
)
def test_what_is_refused(name, change, message):
    before = dict(modalities.STREAMS)
    with pytest.raises(ValueError, match=message):
        declarations.declare({name: TEMP | change})
    assert modalities.STREAMS == before


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"A": {}, "A": {}}', "declares 'A' twice"), ("{", "is no JSON"), ("[]", "is no JSON object"), ('{"A": 3}', "'A' of .* is 3")],
)
def test_files_that_declare_nothing(tmp_path, text, message):
    (tmp_path / "modalities.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_index(tmp_path, "train")


# ---- shards ----


def write_own(root, split, n, bands=1, name="TEMP", dtype=np.float16, at=lambda i: 270 + 3 * i):
    with ShardWriter(root, split, name, "tiny", 1) as shard:
        for i in range(n):
            shard.add(f"s{i:03d}", write_sample({"bands": np.full((1, bands, tiny_run.TILE, tiny_run.TILE), at(i), dtype)}))


def test_another_number_of_bands_than_declared(tmp_path):
    (tmp_path / "modalities.json").write_text(json.dumps({"TEMP": TEMP}))
    write_own(tmp_path, "train", 2, bands=3)
    with pytest.raises(ValueError, match="TEMP is declared with 1 bands, but its first sample in the shards has 3"):
        open_index(tmp_path, "train")


def test_a_fresh_process_that_unpickles_an_index_knows_the_modality(tmp_path):
    """As data workers do."""
    (tmp_path / "modalities.json").write_text(json.dumps({"TEMP": TEMP}))
    write_own(tmp_path, "train", 2)
    (tmp_path / "index.pickle").write_bytes(pickle.dumps(open_index(tmp_path, "train")))
    (tmp_path / "modalities.json").unlink()
    program = "import pickle, sys; i = pickle.load(open(sys.argv[1], 'rb')); print(i.modalities, i.read(1, 'TEMP').max())"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    call = [sys.executable, "-c", program, tmp_path / "index.pickle"]
    assert subprocess.check_output(call, env=environment, text=True) == "('TEMP',) 273.0\n"


def test_check_and_index_see_it(tmp_path, capsys):
    (tmp_path / "modalities.json").write_text(json.dumps({"TEMP": TEMP, "WATER": WATER}))
    write_own(tmp_path, "train", 3, at=lambda i: 300 if i else 20)
    write_own(tmp_path, "train", 3, name="WATER", dtype=np.uint8, at=lambda i: i)
    report = check.check(tmp_path, "train", workers=1)
    assert [report.modalities[m].out_of_range for m in ("TEMP", "WATER")] == [1, 1]
    assert cli.main(["data", "index", str(tmp_path)]) == 0
    assert "TEMP                     3" in capsys.readouterr().out


# ---- continued pretraining ----


@pytest.fixture(scope="module")
def continued(tmp_path_factory):
    """A small model of DEM and LULC, and shards that have TEMP besides, in training alone; with its tokens."""
    root = tiny_run.write_shards(tmp_path_factory.mktemp("shards"))
    old = tmp_path_factory.mktemp("old") / "run"
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.on_one_device(patch)
        pretrain.train(tiny_run.pretraining(root, steps=2), old)
    (root / "modalities.json").write_text(json.dumps({"TEMP": TEMP}))
    write_own(root, "train", 12)
    tiny_run.write_tokens(root, "train", "TEMP", [i % 2 for i in range(12)])  # of 16
    return root, old


def continuing(root, old, steps=16, **data):
    config = tiny_run.pretraining(root, steps=steps)
    config.train.init = str(old)
    config.data.update(data)
    config.run.eval_every = steps
    return config


@pytest.fixture(scope="module", params=["as pixels alone", "with tokens"])
def grown(continued, tmp_path_factory, request):
    """A run that goes on from the small model with TEMP besides."""
    root, old = continued
    targets = ("DEM", "LULC", "TEMP") if request.param == "with tokens" else ("DEM", "LULC")
    workdir = tmp_path_factory.mktemp("grown") / "run"
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.on_one_device(patch)
        pretrain.train(continuing(root, old, inputs=("DEM", "LULC", "S1GRD", "TEMP"), targets=targets), workdir, weights.initial)
    return workdir, targets


def test_old_losses_begin_where_they_were_and_what_they_lose_is_told(continued, grown):
    workdir, targets = grown
    lines, before = logging.read(workdir), logging.read(continued[1])[-1]
    first, last = lines[0], lines[-1]
    for name in ("val/loss/DEM", "val/loss/LULC"):
        assert first["step"] == 0 and first[name] == pytest.approx(before[name], rel=1e-6)
        assert last[name.replace("loss", "change")] == pytest.approx(last[name] - first[name]) != 0
    if "TEMP" in targets:
        own = [line["loss/TEMP"] for line in lines if line.get("loss/TEMP") is not None]
        assert np.mean(own[-3:]) < np.mean(own[:3]) - 0.5, own
    else:
        assert first["val/loss"] == pytest.approx(before["val/loss"], rel=1e-6)


def test_a_checkpoint_knows_its_modalities(continued, grown):
    workdir, targets = grown
    forgotten = modalities.MODALITIES.pop("TEMP"), *(modalities.STREAMS.pop(f"{kind}_temp@224") for kind in ("tok", "untok"))
    module, variables, _ = pretrain.load(workdir)  # as a new process
    assert modalities.get("TEMP") == forgotten[0] and ("tok_temp@224" in [s.key for s in module.config.decoder]) == ("TEMP" in targets)
    again = weights.initial(str(workdir), module)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), again, variables))
    assert "untok_temp@224" not in pretrain.load(continued[1])[1]["params"]["patch_proj"]


def test_a_feature_extractor_of_it_is_saved_with_its_declaration(tmp_path):
    declarations.declare({"TEMP": TEMP})
    made = tm.load("terramind_v1_tiny", "random", modalities=["DEM", "TEMP"])
    image = np.full((1, 224, 224, 1), 292.0, np.float32)
    np.testing.assert_allclose(made.standardize({"TEMP": image})["TEMP"], 1)
    tm.save(made, tmp_path / "saved")
    forgotten = modalities.MODALITIES.pop("TEMP")
    again = tm.load("terramind_v1_tiny", tmp_path / "saved")
    assert modalities.get("TEMP") == forgotten and again.streams["TEMP"].key == "untok_temp@224"


def test_errors_of_a_configuration(continued, tmp_path):
    root, _ = continued
    config = tiny_run.pretraining(root)
    config.data.inputs = ("DEM", "TEMPO")
    with pytest.raises(ValueError, match="Unknown modality 'TEMPO'; did you mean TEMP"):
        pretrain.train(config, tmp_path / "run")
    config = tiny_run.tokenizer_training(root, "BARE")
    with config.unlocked():
        config.modalities = {"BARE": {"bands": ["A"], "levels": [4, 4]}}
    with pytest.raises(ValueError, match="BARE is declared without mean and std"):
        tokenizer.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- pictures ----


def test_pictures_of_own_modalities(tmp_path):
    declarations.declare({"TEMP": TEMP, "WATER": WATER})
    rng = np.random.default_rng(0)
    temp, water = rng.normal(283, 9, (8, 8, 1)), rng.integers(0, 2, (8, 8))
    cool, warm = (plot.render("TEMP", np.full((1, 1, 1), t), plot.limits("TEMP", temp)) for t in (270.0, 295.0))
    assert np.abs(cool - warm).max() > 0.3
    assert len(np.unique(plot.render("WATER", water).reshape(-1, 3), axis=0)) == 2
    plot.contact_sheet(tmp_path / "a.png", [plot.Scene("a", {"TEMP": temp}, {"WATER": water, "TEMP": temp})])
    assert (tmp_path / "a.png").stat().st_size > 1000


# ---- all of it, as typed ----


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """GeoTIFFs of six scenes of the embedded world, and beside them what is computed of them and declared."""
    world, src = tmp_path_factory.mktemp("world") / "shards", tmp_path_factory.mktemp("tiles")
    synthesize(str(world), scenes=6, val_scenes=0, size=228, workers=1)
    index = open_index(world, "train", ["S2L2A", "DEM"])
    for i, key in enumerate(index.keys):
        s2, dem, place = index.read(i, "S2L2A"), index.read(i, "DEM"), index.place(i)
        green, nir = s2[..., [2]].astype(float), s2[..., [7]].astype(float)
        ndwi = (green - nir) / np.maximum(green + nir, 1)
        own = {"S2L2A": s2, "NDWI": ndwi.astype(np.float32), "WATER": (ndwi > 0).astype(np.uint8)}
        own["TEMP"] = (288 - 0.0065 * dem + 8 * ndwi).astype(np.float32)
        for name, pixels in own.items():
            geo.write(src / name / f"{key}.tif", pixels, place)
    (src / "modalities.json").write_text(json.dumps({"TEMP": TEMP, "WATER": WATER, "NDWI": NDWI}))
    return src


@pytest.mark.slow
def test_from_geotiffs_to_generated_geotiffs(tiles, tmp_path, capsys):
    shards, own = tmp_path / "shards", ("TEMP", "WATER")
    assert cli.main(["data", "pack", str(tiles), str(shards)]) == 0
    assert cli.main(["data", "check", str(shards)]) == 0
    for name in own:
        config = tiny_run.write_config(tmp_path / f"{name}.py", tiny_run.tokenizer_training(shards, name, steps=4))
        workdir = tmp_path / "tokenizers" / name
        assert cli.main(["train-tokenizer", f"--config={config}", f"--workdir={workdir}", "--config.run.workers=1"]) == 0
    tokenize.tokenize(shards, tmp_path / "tokenizers", image_size=tiny_run.SIZE)
    config = tiny_run.pretraining(shards, steps=4)
    config.data.update(inputs=("S2L2A", "NDWI", *own), targets=own)
    with config.unlocked():
        config.model.codebooks = {}
    path = tiny_run.write_config(tmp_path / "pretrain.py", config)
    assert cli.main(["pretrain", f"--config={path}", f"--workdir={tmp_path / 'model'}", "--config.run.workers=1"]) == 0
    keys = [s.key for s in pretrain.load(tmp_path / "model")[0].config.encoder]
    assert keys == sorted(["untok_sen2l2a@224", "tok_sen2l2a@224", "untok_ndwi@224", "untok_temp@224", "tok_temp@224", "tok_water@224"])
    # Generation in a process of its own, which knows of the modality by the checkpoint alone.
    call = ["generate", f"--weights={tmp_path / 'model'}", f"--input=S2L2A={next((tiles / 'S2L2A').iterdir())}", "--to=TEMP,WATER"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-m", "terramind_jax", *call, f"--out={tmp_path / 'out'}"], env=environment, check=True)
    (temp,), (water,) = ([geo.read(p) for p in (tmp_path / "out" / name).iterdir()] for name in own)
    assert temp.shape == (228, 228, 1) and np.isfinite(temp).all() and 200 < temp.mean() < 360
    assert water.dtype == np.uint8 and water.max() <= 1
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
