"""The quickstart: its report says what the numbers say, and the whole chain runs."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from terramind_jax import cli, geo, metrics, quickstart
from terramind_jax import config as configuration
from terramind_jax.evaluation.scores import Scores
from terramind_jax.modalities import LULC_CLASSES
from terramind_jax.quickstart import evaluate


def _errors(rmse):
    truth = np.zeros((1, 16, 16, 1))
    return Scores("DEM", {"elevation": metrics.Errors(4000.0).add(truth + rmse, truth)})


def _classes(right):
    confusion = np.zeros((len(LULC_CLASSES), len(LULC_CLASSES)), np.int64)
    confusion[1, 1], confusion[1, 2] = right, 100 - right
    return Scores("LULC", confusion=confusion)


def test_the_report_says_what_beats_what():
    scores = {
        "DEM": {"generated": _errors(300.0), "training mean": _errors(900.0), "linear regression": _errors(500.0)},
        "NDVI": {"generated": _errors(0.3), "training mean": _errors(0.2), "linear regression": _errors(0.1)},
        "LULC": {"generated": _classes(60), "majority class": _classes(30), "logistic regression": _classes(80)},
    }
    about = (scores, "S2L2A", quickstart.Path("out"), "2 million parameters, 900 steps", 256, 16, True)
    text = evaluate.report(*about, 12.3)
    assert "- DEM: generated beats the training mean in RMSE and beats the per-pixel linear regression." in text
    assert "- NDVI: generated does NOT beat the training mean in RMSE; the per-pixel linear regression is better" in text
    assert "- LULC: generated beats the majority class in mIoU; the per-pixel logistic regression is better" in text
    assert "| DEM | generated | 300.00 | 300.00 | 22.50 |" in text
    assert "(2 million parameters, 900 steps)" in text and "256 tiles of the embedded world (synthetic)." in text
    assert "took 12.3 minutes" in text and "minutes" not in evaluate.report(*about, None)


def test_each_folder_of_tiles_has_an_output_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "world" / "tiles").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "world" / "tiles")
    monkeypatch.chdir(tmp_path / "world" / "tiles")
    folders = (None, ".", "..", f"{tmp_path / 'link'}/")
    assert [*map(quickstart.default_out, folders)] == ["quickstart", "quickstart_tiles", "quickstart_world", "quickstart_link"]


def test_baselines_see_one_pixel(tmp_path):
    """A modality that is a linear function of the input is regressed exactly; the mean is that of the training pixels."""

    class Scenes:
        modalities, available, keys = ("S2L2A", "DEM"), np.ones((2, 2), bool), ("a", "b")

        def __len__(self):
            return 2

        def read(self, i, modality, out=None):
            image = 2.0 * np.random.default_rng(i).integers(0, 1500, (224, 224, 12))
            return image if modality == "S2L2A" else image[..., 2:3] / 2 + 10

    fitted = evaluate.fit(Scenes(), "S2L2A", "DEM")
    image = np.full((2, 2, 12), 400.0)
    np.testing.assert_allclose(fitted["linear regression"](image), 210, rtol=1e-3)
    np.testing.assert_allclose(fitted["training mean"], 760, rtol=0.02)


def test_bad_input_ends_in_one_sentence(tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    assert cli.main(["quickstart", f"--data={tmp_path / 'empty'}", f"--out={tmp_path / 'out'}"]) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: The quickstart stopped in: terramind-jax data pack")
    with pytest.raises(ValueError, match="minutes is 0"):
        quickstart.run(out=str(tmp_path / "out"), minutes=0)


def test_each_folder_of_tiles_has_its_own_results(tmp_path):
    assert quickstart.default_out(None) == "quickstart"
    assert quickstart.default_out(f"{tmp_path}/alps/") == "quickstart_alps"


def test_a_dem_s_tokenizer_tells_heights_by_one_level():
    """And is trained longer than others, which keep the levels of the configuration."""
    dem, ndvi = (quickstart._tokenizer_command(m, Path("out"), 0.5) for m in ("DEM", "NDVI"))
    assert {"--config.model.levels=250", "--config.train.zero_output=True", "--config.train.steps=900"} < {*dem}
    assert "--config.train.steps=300" in ndvi and not any("levels" in argument for argument in ndvi)


def test_every_device_has_work():
    for name, of_a_device in (("pretrain", 8), ("tokenizer", 1)):
        config = configuration.read(Path(quickstart.__file__).parent / f"{name}.py")
        assert config.train.batch_size == of_a_device * 8
        assert name == "tokenizer" or config.train.batch_size % (config.data.patch_group * 8) == 0


def test_validation_takes_all_held_out_scenes():
    """On one device, of batches of 8, too: those with S1GRD come last."""
    for name in ("pretrain", "tokenizer"):
        config = configuration.read(Path(quickstart.__file__).parent / f"{name}.py")
        assert config.run.eval_batches * 8 >= quickstart.VAL_SCENES


@pytest.mark.slow
def test_tiles_become_models_pictures_and_geotiffs(tmp_path):
    """`quickstart --data`, on four tiles of two modalities with a few steps, as a user types it."""
    rng = np.random.default_rng(0)
    for i in range(4):
        place = geo.Place("EPSG:32632", (10.0, 0.0, 5e5 + 4e4 * i, 0.0, -10.0, 5e6), 224, 224)
        height = rng.uniform(0, 1500) + np.linspace(0, 300, 224)[:, None, None] * np.ones((1, 224, 1))
        bands = np.clip(3000 - height + rng.normal(0, 50, (224, 224, 12)), 0, None)
        for modality, array in (("S2L2A", bands.astype(np.int16)), ("DEM", height.astype(np.int16))):
            (tmp_path / "tiles" / modality).mkdir(parents=True, exist_ok=True)
            geo.write(tmp_path / "tiles" / modality / f"tile{i}.tif", array, like=place, modality=modality)
    command = ["quickstart", f"--data={tmp_path / 'tiles'}", f"--out={tmp_path / 'out'}", "--minutes=0.1"]
    one_device = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    subprocess.run([sys.executable, "-m", "terramind_jax", *command], env={**os.environ, "XLA_FLAGS": one_device}, check=True)
    out = tmp_path / "out"
    assert all((out / name).stat().st_size > 10_000 for name in ("generated.png", "losses.png"))
    assert "| DEM | training mean |" in (out / "report.md").read_text()
    written = sorted((out / "geotiff" / "DEM_generated").glob("*.tif"))
    assert written and geo.place(written[0]).crs == place.crs
