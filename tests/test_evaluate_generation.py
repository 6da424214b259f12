"""What is generated is measured as the metrics say, of shards and of scenes, and written whole."""

from __future__ import annotations

import csv
import sys
import types

import numpy as np
import pytest
import random_networks
import tiny_run

from terramind_jax import cli, generate, generate_scenes, geo, metrics
from terramind_jax.data import clouds
from terramind_jax.data.shards import ShardWriter, write_sample
from terramind_jax.evaluation import generation, geolocate, reference, scores
from terramind_jax.modalities import STREAMS
from terramind_jax.scenes import windows
from terramind_jax.tasks import datasets
from terramind_jax.tasks.samples import sample

SIDE = 32
PLACE = geo.Place("EPSG:32633", (10.0, 0, 500_000.0, 0, -10.0, 5_300_000.0), 80, 48)

pytestmark = pytest.mark.usefixtures("compile_fast")


@pytest.fixture(scope="module")
def trained():
    """Random networks that make LULC, NDVI and coordinates from elevation or radar, 32 pixels at a time."""
    encoder = tuple(STREAMS[key] for key in ("untok_dem@224", "untok_sen1grd@224", "tok_lulc@224", "tok_ndvi@224", "coords"))
    return random_networks.build(encoder, encoder[2:], SIDE), random_networks.build_tokenizers("LULC", "NDVI", image_size=SIDE)


@pytest.fixture
def weights(trained, monkeypatch, tmp_path):
    """A work directory whose loading is replaced."""
    return random_networks.as_workdir(monkeypatch, tmp_path / "weights", *trained)


def rows(out):
    with open(out / "scores.csv", newline="") as f:
        return list(csv.DictReader(f))


def test_shards(weights, trained, tmp_path, capsys):
    root, out = tiny_run.write_shards(tmp_path / "shards", tokens=False), tmp_path / "out"
    command = ["evaluate", "generation", f"--weights={weights}", f"--data={root}", "--from=DEM,coords", "--to=LULC", f"--out={out}"]
    assert cli.main([*command, "--batch_size=2", "--temperature=0"]) == 0
    assert {path.name for path in out.iterdir()} == {"report.md", "scores.csv", "samples.png"}
    each = [row for row in rows(out) if row["sample"] != "all"]
    index = generation.open_index(root, "val")
    network = generate_scenes.load_network(weights, None, ["DEM", "coords"], ["LULC"])
    assert [row["sample"] for row in each] == list(index.keys)
    total, made = 0, {}
    for pair in ((4, 3), (2, 1), (0, 0)):  # other batches than the command's
        inputs = {name: np.stack([generation.center(index, i, name, SIDE) for i in pair]) for name in ("DEM", "coords")}
        made |= zip(pair, generation.alone(network, inputs, "LULC", temperature=0.0), strict=True)
    for i, row in enumerate(each):
        confusion = metrics.confusion_matrix(made[i], generation.center(index, i, "LULC", SIDE), 10)
        assert float(row["accuracy"]) == metrics.accuracy(confusion) and float(row["mIoU"]) == metrics.mean_iou(confusion)
        total = total + confusion
    whole = next(row for row in rows(out) if row["sample"] == "all")
    assert float(whole["mIoU"]) == metrics.mean_iou(total)
    assert f"| LULC | {metrics.mean_iou(total):.3f} |" in (out / "report.md").read_text()
    assert cli.main(command) == 2
    assert f"{out} exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"timesteps": 12, "sampler": "dpmpp", "clip": "published"}),
        (["--sampler=ddim"], {"timesteps": 50, "sampler": "ddim", "clip": "published"}),
        (["--sampler=ddpm", "--timesteps=3", "--clip=none"], {"timesteps": 3, "sampler": "ddpm", "clip": "none"}),
    ],
)
def test_how_images_are_decoded_is_passed_on_and_told(weights, monkeypatch, tmp_path, arguments, expected):
    seen, decode = [], generate.decode
    monkeypatch.setattr(generate, "decode", lambda *given, **options: seen.append(options) or decode(*given, **options))
    root, out = tiny_run.write_shards(tmp_path / "shards", tokens=False), tmp_path / "out"
    command = ["evaluate", "generation", f"--weights={weights}", f"--data={root}", "--from=DEM", "--to=LULC", f"--out={out}", "--limit=1"]
    assert cli.main([*command, *arguments]) == 0
    assert seen and all(options[name] == value for options in seen for name, value in expected.items())
    assert ", ".join(f"{name} {value}" for name, value in expected.items()) in (out / "report.md").read_text()


def test_clear_pixels_of_shards(weights, tmp_path, capsys):
    """Others do not count, all of a sample may be under clouds, and one without a mask is left out."""
    root, rng = tiny_run.write_shards(tmp_path / "shards", tokens=False), np.random.default_rng(0)
    masks = {"s000": rng.integers(0, 7, (1, 48, 48)), "s001": np.full((1, 48, 48), clouds.THICK_CLOUD), "s003": np.zeros((1, 48, 48))}
    with ShardWriter(root, "val", "S2RGB", "tiny", 1) as shard:
        for key, mask in masks.items():
            shard.add(key, write_sample({"bands": np.ones((1, 3, 48, 48), np.uint8), "cloud_mask": mask.astype(np.uint8)}))
    command = ["evaluate", "generation", f"--weights={weights}", f"--data={root}", "--from=DEM", "--to=LULC", "--temperature=0"]
    assert cli.main([*command, f"--out={tmp_path / 'clear'}", "--clear"]) == 0
    said = capsys.readouterr().out
    assert "Left out: Sample 's002' has no cloud mask." in said and "Only pixels that the cloud mask calls clear count." in said
    whole = next(row for row in rows(tmp_path / "clear") if row["sample"] == "all")
    index, network = generation.open_index(root, "val"), generate_scenes.load_network(weights, None, ["DEM"], ["LULC"])
    total = 0
    for key, mask in masks.items():
        i, clear = index.keys.find(key), mask[0, 8:40, 8:40] < 3
        made = generation.alone(network, {"DEM": generation.center(index, i, "DEM", SIDE)[None]}, "LULC", temperature=0.0)[0]
        total = total + metrics.confusion_matrix(made[clear], generation.center(index, i, "LULC", SIDE)[clear], 10)
    assert total.sum() < 2 * SIDE**2 and float(whole["mIoU"]) == metrics.mean_iou(total)
    data = tmp_path / "data" / "DEM"
    data.mkdir(parents=True)
    assert cli.main([*command[:3], f"--data={data.parent}", *command[4:], f"--out={tmp_path / 'b'}", "--clear"]) == 2
    assert "clear needs the cloud masks of shards" in capsys.readouterr().err


def test_scenes_of_a_folder(weights, tmp_path, monkeypatch, capsys):
    """A scene larger than a window has seams and no reference, and pixels without truth do not count."""
    rng, data = np.random.default_rng(0), tmp_path / "data"
    ndvi = rng.uniform(-0.2, 0.9, (80, 48, 1)).astype(np.float32)
    ndvi[:20] = np.nan
    for name, image in (("DEM", rng.integers(0, 2000, (80, 48, 1)).astype(np.int16)), ("NDVI", ndvi)):
        (data / name).mkdir(parents=True)
        geo.write(data / name / "a.tif", image, like=PLACE, modality=name)
    call = dict(weights=weights, data=data, inputs=["DEM"], lulc_codes="terramesh")
    found = generation.run(**call, to=["NDVI", "LULC"], out=tmp_path / "out")["NDVI"]
    assert "LULC: none of these samples has it, so it was not generated.\n" in capsys.readouterr().out
    assert (tmp_path / "out" / "samples.png").is_file()
    made = np.asarray(geo.read(tmp_path / "out" / "generated" / "NDVI" / "a.tif"))
    expected = np.abs(made[20:] - ndvi[20:])
    assert found.errors.mae == pytest.approx(expected.mean(), rel=1e-5)
    assert found.errors.bias == pytest.approx((made[20:] - ndvi[20:]).mean(), rel=1e-4)
    assert found.jumps[0][0] == pytest.approx(metrics.jump(made, [16, 32, 48, 64], [16, 32]), rel=1e-5)
    assert np.isnan(found.seam)  # windows of two patches that overlap by half leave no line to compare with
    monkeypatch.setattr(reference, "check", lambda *given: None)
    monkeypatch.setattr(reference, "load", lambda *given, **options: types.SimpleNamespace(name="TerraTorch"))
    with pytest.raises(ValueError, match="a has 80 x 48 pixels; the reference is compared on scenes of one window, 32 x 32"):
        generation.run(weights=weights, data=data, inputs=["DEM"], to=["NDVI"], out=tmp_path / "b", reference=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(name=None), "say with --model"),
        (dict(inputs=["DEM", "coords"]), "compare the reference without coords"),
        (dict(options={"steps": 4}), "--steps=1"),
        (dict(options={"sampler": "dpmpp", "timesteps": 5}), "TerraTorch has the sampler 'ddim' alone, not 'dpmpp'"),
        (dict(options={"clip": "none"}), "TerraTorch has the clip 'published' alone, not 'none'"),
        (dict(options={"chained": False, "sampler": "ddim"}), "TerraTorch's generation has no chained"),
        ({}, r"needs TerraTorch \(pip install 'terramind_jax\[parity\]'\)"),
    ],
)
def test_what_is_not_compared_with_the_reference(changes, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "terratorch", None)
    given = dict(name="terramind_v1_tiny", inputs=["DEM"], to=["LULC"], options={"temperature": 0.0, "steps": 1}) | changes
    with pytest.raises((ValueError, ImportError), match=message):
        reference.check(**given)


def test_seams_lie_where_windows_begin_and_end():
    borders, others = generation.seams(windows.cut((7, 5), 4, 32), 7 * 16 - 3, 5 * 16)
    assert borders == ([32, 48, 64, 96], [16, 64]) and others == ([16, 80], [32, 48])
    image = np.zeros((109, 80, 1))
    image[16:] += 1
    image[32:] += 3
    found = scores.scores_of("NDVI").add(image, image, lines=(borders, others))
    assert found.seam == metrics.seam_score(image, borders, others) > 1
    assert generation.seams(windows.cut((4, 4), 4, 32), 64, 64) is None


def test_scores_of_bands_and_spectra():
    rng = np.random.default_rng(0)
    truth = rng.uniform(100, 4000, (2, 16, 16, 12))
    found = scores.scores_of("S2L2A")
    for image in truth:
        found.add(image + np.arange(12), image)
        found.add(2 * image, image)
    assert scores.parts(found)["RED"]["bias"] == pytest.approx((3 + truth[..., 3].mean()) / 2)
    both = np.stack([np.broadcast_to(np.arange(12.0), truth.shape), truth])
    assert found.errors.mae == pytest.approx(both.mean()) and found.errors.rmse == pytest.approx(np.sqrt(np.square(both).mean()))
    similar = [metrics.ssim(made, image, data_range=10_000.0) for image in truth for made in (image + np.arange(12), 2 * image)]
    assert found.errors.ssim == pytest.approx(np.mean(similar))
    assert 0 < found.spectral_angle < metrics.spectral_angle(truth + np.arange(12), truth).mean()  # brightness alone turns nothing
    assert np.isnan(scores.scores_of("S1GRD").add(truth[0, ..., :2], truth[0, ..., :2]).spectral_angle)


def test_water_in_generated_land_cover(weights, tmp_path, monkeypatch, capsys):
    """On chips larger than a window, of which clouds do not count."""
    sample("sen1floods11", tmp_path / "data", count=4, size=48)
    dataset = datasets.load("sen1floods11", tmp_path / "data", "test").only(["S1GRD"])
    command = ["evaluate", "zeroshot", f"--weights={weights}", f"--data={tmp_path / 'data'}", "--from=S1GRD"]
    assert cli.main([*command, f"--out={tmp_path / 'out'}", "--batch_size=3"]) == 0
    network, total = generate_scenes.load_network(weights, None, ["S1GRD"], ["LULC"]), 0
    for i, row in enumerate(rows(tmp_path / "out")[:-1]):
        made = np.zeros((48, 48), int)
        for top in (16, 0):  # the first window of a pixel is laid on top
            seen = np.stack([dataset[i]["inputs"]["S1GRD"][top : top + SIDE, left : left + SIDE] for left in (16, 0)])
            for left, window in zip((16, 0), generation.alone(network, {"S1GRD": seen}, "LULC"), strict=True):
                made[top : top + SIDE, left : left + SIDE] = window
        total = total + metrics.confusion_matrix((made == 1).astype(int), dataset[i]["target"], 2, ignore=-1)
        assert row["sample"] == dataset[i]["name"]
    assert float(rows(tmp_path / "out")[-1]["accuracy"]) == metrics.accuracy(total)
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"| {100 * metrics.accuracy(total):.2f} | this run |" in text and "| 45.40 |" in text
    assert cli.main([*command, f"--out={tmp_path / 'other'}", "--from=S2L1C"]) == 2
    assert "This model takes no S2L1C" in capsys.readouterr().err


def test_distances_on_a_sphere():
    paris, sydney = (2.35, 48.86), (151.21, -33.87)
    assert geolocate.distance(paris, sydney) == pytest.approx(16_960, rel=0.002)
    np.testing.assert_allclose(
        geolocate.distance([(179.5, 0), (0, 90), (0, 0)], [(-179.5, 0), (77, 90), (180, 0)]), [111.19, 0, 20015], atol=0.5
    )
    assert np.isinf(geolocate.distance((np.nan, 0), (0, 0)))


def test_places_of_images(weights, tmp_path, monkeypatch):
    """Of shards and of the same images as rasters: what is generated is compared with where they are."""
    root = tiny_run.write_shards(tmp_path / "shards", tokens=False)
    index, told = generation.open_index(root, "val"), []

    def write(module, variables, tokenizers, inputs, outputs, **options):
        told.append(inputs["DEM"][:, 0, 0, 0])
        return {"coords": np.stack([np.where(told[-1] == told[0][0], np.nan, 3.0), np.zeros(len(told[-1]))], 1)}

    monkeypatch.setattr(geolocate.generate, "generate", write)
    far = geolocate.run(weights=weights, data=root, inputs=["DEM"], out=tmp_path / "out", batch_size=3)
    levels = [index.read(i, "DEM")[0, 0, 0] for i in range(5)]
    expected = [np.inf if level == levels[0] else geolocate.distance((3, 0), index.coordinates(i)) for i, level in enumerate(levels)]
    np.testing.assert_allclose(far, expected)
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"| {np.mean(np.isfinite(far)):.3f} | this run |" in text and "the place of another sample" in text
    (tmp_path / "data" / "DEM").mkdir(parents=True)
    geo.write(tmp_path / "data" / "DEM" / "a.tif", np.full((80, 48, 1), levels[1], np.int16), like=PLACE, modality="DEM")
    far = geolocate.run(weights=weights, data=tmp_path / "data", inputs=["DEM"], out=tmp_path / "other")
    assert far == ([np.inf] if levels[1] == levels[0] else pytest.approx([geolocate.distance((3, 0), geo.lonlat(PLACE))]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from=S2L2A", "--to=LULC"], "This model takes no S2L2A; it takes DEM"),
        (["--from=DEM", "--to=coords"], "coords is no image"),
        (["--from=DEM", "--to=DEM"], "DEM"),
    ],
)
def test_what_cannot_be_generated(weights, tmp_path, capsys, arguments, message):
    root = tiny_run.write_shards(tmp_path / "shards", tokens=False)
    command = ["evaluate", "generation", f"--weights={weights}", f"--data={root}", f"--out={tmp_path / 'out'}"]
    assert cli.main([*command, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))


def test_codes_of_true_land_cover_are_declared(weights, tmp_path, capsys):
    for name in ("DEM", "LULC"):
        (tmp_path / "data" / name).mkdir(parents=True)
        geo.write(tmp_path / "data" / name / "a.tif", np.ones((PLACE.height, PLACE.width, 1), np.uint8), like=PLACE, modality=name)
    command = ["evaluate", "generation", f"--weights={weights}", f"--data={tmp_path / 'data'}", "--from=DEM", "--to=LULC"]
    assert cli.main([*command, f"--out={tmp_path / 'out'}"]) == 2
    assert "The codes of LULC are not declared; say with --lulc_codes what they are" in capsys.readouterr().err
    assert cli.main([*command, f"--out={tmp_path / 'out'}", "--lulc_codes=terramesh"]) == 0
