"""``evaluate generation --reference``: TerraTorch's numbers beside ours, from the same weights."""

from __future__ import annotations

import csv
from importlib import metadata
from unittest import mock

import numpy as np
import peer
import pytest
from terratorch.models.backbones.terramind.tokenizer.scheduling import diffusion_pipeline

from terramind_jax import cli, generate_scenes, geo
from terramind_jax.convert import files
from terramind_jax.evaluation import generation, reference

NAME, OURS, THEIRS = "terramind_v1_tiny", "terramind_jax", f"TerraTorch {metadata.version('terratorch')}"
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "theirs.safetensors"
    model = peer.build(f"{NAME}_generate", modalities=["DEM"], output_modalities=["LULC", "NDVI"], seed=0)
    files.write(path, peer.numpy_state(model))
    return path


def test_scores_of_class_maps_are_equal(weights, tmp_path):
    """At temperature 0, where nothing is drawn."""
    place = geo.Place("EPSG:32633", (10.0, 0, 500_000.0, 0, -10.0, 5_300_000.0), 224, 224)
    tiles = {"DEM": RNG.integers(0, 3000, (224, 224, 1)).astype(np.int16), "LULC": RNG.integers(0, 10, (224, 224, 1)).astype(np.uint8)}
    for name, tile in tiles.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        geo.write(tmp_path / "data" / name / "a.tif", tile, like=place, modality=name)
    command = ["evaluate", "generation", f"--model={NAME}", f"--weights={weights}", f"--data={tmp_path / 'data'}", "--reference"]
    command += ["--lulc_codes=terramesh", "--temperature=0", "--from=DEM", "--to=LULC", f"--out={tmp_path / 'out'}"]
    assert cli.main(command) == 0
    with open(tmp_path / "out" / "scores.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["by"] for row in rows if row["sample"] == "a"] == [OURS, THEIRS]
    ours, theirs = ({(row["sample"], row["part"]): row for row in rows if row["by"] == by} for by in (OURS, THEIRS))
    assert ours.keys() == theirs.keys() and len(ours) > 3
    for key, row in ours.items():
        for column in {"mIoU", "accuracy", "IoU"} & {name for name, x in row.items() if x}:
            assert float(row[column]) == pytest.approx(float(theirs[key][column]), abs=0.001), (key, column)
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"| LULC | {OURS} | 0." in report and f"| LULC | {THEIRS} | 0." in report


def test_pixels_in_units_from_one_noise(weights):
    network = generate_scenes.load_network(weights, NAME, ["DEM"], ["NDVI"])
    image, noise = RNG.integers(0, 3000, (64, 64, 1)).astype(np.float32), RNG.standard_normal((1, 64, 64, 1), np.float32)
    settings = dict(temperature=0.0, timesteps=2, sampler="ddim")
    ours = generation.alone(network, {"DEM": image[None]}, "NDVI", noise={"NDVI": noise}, **settings)
    generate = reference.load(NAME, network, ["DEM"], ["NDVI"], seed=0, **settings)
    with mock.patch.object(diffusion_pipeline.torch, "randn", lambda *args, **kwargs: peer.nchw(noise)):
        theirs = generate({"DEM": image}, ["NDVI"])["NDVI"]
    assert peer.relative_error(ours[0], theirs) <= 1e-3


def test_what_terratorch_lacks():
    with pytest.raises(ValueError, match=f"{THEIRS} has no terramind_v2_base_generate"):
        reference.check("terramind_v2_base", ["DEM"], ["LULC"], {})
