"""PANGAEA's protocol: what enters the model, which settings, and what the test counts."""

from __future__ import annotations

import dataclasses
import json

import jax
import nano_models
import numpy as np
import pytest

from terramind_jax import cli, geo, metrics
from terramind_jax.evaluation import pangaea, results
from terramind_jax.tasks import batches, datasets, decoders, finetune
from terramind_jax.tasks.datasets import pangaea as routed
from terramind_jax.tasks.datasets import spacenet7
from terramind_jax.tasks.samples import WRITERS, sample

SIZE = 96


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    nano_models.shrink(monkeypatch, "tiny")


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("sen1floods11", "burnscars", "mados", "pastis"):
        sample(name, folder / name, count=4, size=48 if name == "pastis" else SIZE)
    return folder


def test_bands_are_routed_and_padded(roots):
    """L1C enters as L2A with cirrus at the water vapour; bands that there are not are zero when normalised."""
    floods = datasets.load("pangaea", roots / "sen1floods11", "test", of="sen1floods11")
    original = datasets.load("sen1floods11", roots / "sen1floods11", "test")
    image, own = floods[0]["inputs"], original[0]["inputs"]
    assert list(image) == ["S2L2A", "S1GRD"] and image["S2L2A"].shape == (SIZE, SIZE, 12)
    np.testing.assert_array_equal(image["S2L2A"], own["S2L1C"][..., [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12]])
    assert floods.facts.mean["S2L2A"][9] == original.facts.mean["S2L1C"][10]
    scars = datasets.load("pangaea", roots / "burnscars", "test", of="burnscars")
    image, mean, std = scars[0]["inputs"]["S2L2A"], *(np.array(of["S2L2A"]) for of in (scars.facts.mean, scars.facts.std))
    absent = [0, 4, 5, 6, 7, 9]
    assert not ((image - mean) / std)[..., absent].any() and image[..., [1, 2, 3, 8, 10, 11]].any((0, 1)).all()
    np.testing.assert_array_equal(image[..., 8], datasets.load("burnscars", roots / "burnscars", "test")[0]["inputs"]["S2L2A"][..., 3])


def test_small_images_are_enlarged(roots):
    fields = dict(of="pastis", limit=2)
    small, large = (datasets.load("pangaea", roots / "pastis", "train", **fields, **r) for r in ({}, {"resize": 64}))
    assert len(large) == 2 and "dates" not in large[0]
    a, b = small[0], large[0]
    assert b["inputs"]["S2L2A"].shape == (6, 64, 64, 12) and b["target"].shape == (64, 64)
    assert a["inputs"]["S2L2A"].mean() == pytest.approx(b["inputs"]["S2L2A"].mean(), rel=0.02)
    assert np.bincount(a["target"].ravel()).argmax() == np.bincount(b["target"].ravel()).argmax()
    ramp = np.arange(4.0)[:, None, None] * np.ones((1, 4, 1))
    np.testing.assert_allclose(routed.resized(ramp, 8)[:, 0, 0], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])


def test_every_data_set_can_be_tried():
    assert routed.KNOWN.keys() <= WRITERS.keys()


def test_the_data_sets_are_those_of_the_published_table():
    """By the titles of its columns, which a report is compared by."""
    columns = {name for row in results.published("pangaea")[0] for name, x in row.items() if isinstance(x, float)} - {"average"}
    assert {of.FACTS.title for of in routed.KNOWN.values()} == columns


def test_tiles_of_small_farms(tmp_path):
    """Masks are 0 and 255; the folder of the validation has either name."""
    sample("ai4smallfarms", tmp_path / "data", count=2, size=48)
    masks = tmp_path / "data/sentinel-2-asia/train/masks"
    mask, image = (geo.read(folder / "0_vietnam.tif") for folder in (masks, masks.with_name("images")))
    assert set(np.unique(mask)) == {0, 255} and mask.dtype == np.uint8 and image.dtype == np.uint16
    first = datasets.load("pangaea", tmp_path / "data", of="ai4smallfarms")[0]
    np.testing.assert_array_equal(first["target"], mask[..., 0] == 255)
    np.testing.assert_array_equal(first["inputs"]["S2L2A"][..., [1, 2, 3, 7]], image)
    assert not first["inputs"]["S2L2A"][..., [0, 4, 5, 6, 8, 9, 10, 11]].any()
    names = datasets.load("pangaea", tmp_path / "data", "val", of="ai4smallfarms").names
    (tmp_path / "data/sentinel-2-asia/validate").rename(tmp_path / "data/sentinel-2-asia/val")
    assert datasets.load("pangaea", tmp_path / "data", "val", of="ai4smallfarms").names == names
    masks.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match="AI4SmallFarms is not complete in .*: sentinel-2-asia/train/masks is not there; get"):
        datasets.load("pangaea", tmp_path / "data", of="ai4smallfarms")


def test_tiles_of_five_billion_pixels(tmp_path):
    """Near infrared first; what has no label does not count, and is a class that nothing is."""
    sample("fivebillionpixels", tmp_path / "data", count=2, size=48)
    labels = tmp_path / "data/train/labels"
    name = "GF2_PMS1__L1A0000000001-MSS1_0_0"
    mask, image = (geo.read(folder / f"{name}.tif") for folder in (labels, labels.with_name("images")))
    (labels / f"{name}.tif").rename(labels / f"{name}_24label.tif")
    dataset = datasets.load("pangaea", tmp_path / "data", of="fivebillionpixels")
    assert dataset.num_classes == 25 and dataset.ignore_index == 0 and dataset.class_names[24] == "airport"
    np.testing.assert_array_equal(dataset[0]["inputs"]["S2L2A"][..., [7, 3, 2, 1]], image)
    np.testing.assert_array_equal(dataset[0]["target"], mask[..., 0])
    assert image.dtype == mask.dtype == np.uint8 and mask.max() > 1


def test_tiles_of_spacenet(tmp_path, monkeypatch):
    """Of months without clouds that are labelled, the rows of a tile alone; a mosaic a row short is brought to its size."""
    monkeypatch.setattr(spacenet7, "AREAS", {"train": "1_1_1 2_2_2", "val": "3_3_3", "test": "4_4_4"})
    monkeypatch.setattr(spacenet7, "SIDE", 64)
    monkeypatch.setattr(spacenet7, "TILE", 16)
    sample("spacenet7", tmp_path / "data", count=3, size=64)
    dataset = datasets.load("pangaea", tmp_path / "data", "train", of="spacenet7")
    assert len(dataset) == len(set(dataset.names)) == 3 * 16 and "2018_02_mosaic_L15-1_1_1_13" in dataset.names[16]
    folder = tmp_path / "data/spacenet7/train/L15-1_1_1_13"
    image, mask = (geo.read(next((folder / kind).glob("*_2018_01_*"))) for kind in ("images_masked", "labels_raster"))
    assert image.shape == (63, 64, 4) and set(np.unique(mask)) == {0, 255}
    image, mask = (x[((np.arange(64) + 0.5) * 63 / 64).astype(int)] for x in (image, mask))
    read, lengths = geo.read_valid, []

    def watched(*arguments, **options):
        found = read(*arguments, **options)
        lengths.append(len(found))
        return found

    monkeypatch.setattr(geo, "read_valid", watched)
    for i in range(16):
        tile, at = dataset[i], np.s_[i // 4 * 16 :, i % 4 * 16 :]
        np.testing.assert_array_equal(tile["inputs"]["S2L2A"][..., [3, 2, 1]], image[at][:16, :16, :3])
        np.testing.assert_array_equal(tile["target"], mask[at][:16, :16, 0] == 255)
    assert lengths == [16] * 32
    (tmp_path / "data/spacenet7/train/L15-3_3_3_13").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match="SpaceNet-7 is not complete in .*: train/L15-3_3_3_13 is not there; get it from"):
        datasets.load("pangaea", tmp_path / "data", "val", of="spacenet7")


def test_the_latest_images_of_crop_types(tmp_path):
    """Six, the last one first; a shorter series ends with zeros, a damaged file is left out, and only four crops count."""
    sample("croptypemapping", tmp_path / "data", count=3)
    stored, truth = ([tmp_path / f"data/southsudan/{folder}/southsudan_{i:06d}.npz" for i in (1, 2, 3)] for folder in ("npy", "truth"))
    series, crops = np.load(stored[0]), np.load(truth[0])["truth"]
    assert series["s2"].shape == (10, 64, 64, 8) and series["s1"].shape == (3, 64, 64, 9) and {0, 5} < set(np.unique(crops))
    np.savez(stored[1], s2=series["s2"], s1=series["s1"][..., :4])
    stored[2].write_bytes(b"no zip")
    dataset = datasets.load("pangaea", tmp_path / "data", "train", of="croptypemapping")
    assert dataset.names == ("southsudan_000001", "southsudan_000002")
    whole, short = dataset[0]["inputs"], dataset[1]["inputs"]["S1GRD"]
    assert whole["S2L2A"].shape == (6, 64, 64, 12) and not whole["S2L2A"][..., [0, 9]].any()
    np.testing.assert_array_equal(whole["S2L2A"][2, ..., 1:9], np.moveaxis(series["s2"][:8, ..., 5], 0, -1))
    np.testing.assert_array_equal(short[:4], series["s1"][:2, ..., 3::-1].transpose(3, 1, 2, 0))
    assert short.shape == (6, 64, 64, 2) and not short[4:].any()
    np.testing.assert_array_equal(dataset[0]["target"], np.where((crops > 0) & (crops < 5), crops.astype(int) - 1, -1))
    config = pangaea.configuration(pangaea.Settings(), "random", "terramind_v1_base", "croptypemapping", tmp_path / "data")
    assert config.model.time == "ltae" and config.data.options.resize == 224


def test_months_of_dynamicearthnet(tmp_path):
    """Their first six days; folders are named otherwise in the splits, and labels by another suffix."""
    sample("dynamicearthnet", tmp_path / "data", count=1, size=48)
    assert "/reprocess-cropped/UTM-24000/10N" in (tmp_path / "data/dynnet_training_splits/train.txt").read_text()
    folder = tmp_path / "data/planet/10N/0001_13"
    days = np.stack([np.load(folder / f"2018-01-{day:02d}.npy") for day in range(1, 7)])
    np.save(folder / "2018-01-07.npy", days[0])
    dataset = datasets.load("pangaea", tmp_path / "data", "train", of="dynamicearthnet")
    assert dataset.names == ("planet/10N/0001_13/2018-01",)
    image = dataset[0]["inputs"]["S2L2A"]
    np.testing.assert_array_equal(image[..., 1:5], np.moveaxis(days, 1, -1))
    assert days.any((0, 2, 3)).all() and not image[..., [0, *range(5, 12)]].any()
    np.testing.assert_array_equal(dataset[0]["target"], np.load(tmp_path / "data/labels/10N/0001_13/2018-01.npy"))


def test_bands_of_crops_alone_are_padded(roots):
    """A crop is that of the whole image, and no more than it is brought to all bands."""
    dataset, shapes = datasets.load("pangaea", roots / "pastis", of="pastis"), []
    scale = {m: (np.float32(dataset.facts.mean[m]), np.float32(dataset.facts.std[m])) for m in ("S2L2A", "S1GRD")}

    def watched(images):
        shapes.append({m: image.shape for m, image in images.items()})
        return dataset.route(images)

    watching = dataclasses.replace(dataset, route=watched)
    crop = batches.cut(watching, dataset.unrouted(0), scale, slice(8, 40), slice(2, 34))["inputs"]
    for m, image in dataset[0]["inputs"].items():
        np.testing.assert_array_equal(crop[m], ((image - scale[m][0]) / scale[m][1])[:, 8:40, 2:34])
    next(batches.training(watching, scale, crop=32, batch_size=2))
    assert len(shapes) > 2 and all(x == {"S2L2A": (6, 32, 32, 10), "S1GRD": (6, 32, 32, 2)} for x in shapes)


def test_settings_are_the_published_ones(roots):
    config = pangaea.configuration(pangaea.Settings(crop=32), "random", "terramind_v1_large", "sen1floods11", roots / "sen1floods11")
    m = config.model
    assert (m.decoder, tuple(m.channels), tuple(m.layers), m.dtype) == ("upernet_pangaea", (512,), (7, 11, 15, 23), "float32")
    assert config.optimizer.decay_norms
    o, t = config.optimizer, config.train
    assert (o.learning_rate, tuple(o.betas), o.weight_decay, o.schedule) == (1e-4, (0.9, 0.999), 0.05, "steps")
    assert (t.epochs, t.batch_size, t.seed, t.tune, t.monitor) == (80, 8, 234, "frozen", "val/mIoU")
    assert config.run.eval_every == 5 and not config.data.d4 and config.data.statistics == "dataset" and config.data.strata == 3
    assert not config.data.focus
    config = pangaea.configuration(pangaea.Settings(crop=64), "random", "terramind_v1_base", "mados", roots / "mados")
    assert config.data.focus
    config = pangaea.configuration(pangaea.Settings(crop=64), "random", "terramind_v1_base", "pastis", roots / "pastis")
    assert config.model.time == "ltae" and config.data.options.resize == 64 and not config.model.layers


def test_products_are_of_float32(roots, tmp_path, monkeypatch):
    """In training and in the test; a GPU would make them of TF32, a TPU of bfloat16."""
    seen, confusion = [], np.eye(2, dtype=int)

    def products(*_, result=None, **__):
        text = str(jax.make_jaxpr(lambda x: x @ x)(np.ones((2, 2), np.float32)))
        seen.append("precision=(Precision.HIGHEST, Precision.HIGHEST)" in text)
        return result

    monkeypatch.setattr(finetune, "train", products)
    monkeypatch.setattr(finetune, "load", lambda workdir: None)
    monkeypatch.setattr(pangaea, "tested", lambda *args, **options: products(result=confusion))
    common = dict(weights="random", model="terramind_v1_tiny", dataset="sen1floods11", data=roots / "sen1floods11", out=tmp_path)
    pangaea.run(**common, settings=pangaea.Settings(crop=64))
    assert seen == [True, True]
    products()
    assert seen == [True, True, False]


def test_an_upernet_as_pangaea_has_it(roots):
    """A neck as wide as the features, and dropout of whole channels."""
    config = pangaea.configuration(pangaea.Settings(crop=32), "random", "terramind_v1_tiny", "burnscars", roots / "burnscars")
    facts = datasets.load("pangaea", roots / "burnscars", of="burnscars").facts
    module, _ = finetune.task_model(config, facts, finetune.backbone(config, facts))
    params = jax.eval_shape(lambda key: module.init(key, method="everything"), jax.random.key(0))["params"]
    width = module.backbone.out_channels[0]
    assert {params["neck"][name]["kernel"].shape for name in ("fpn1_up1", "fpn1_up2", "fpn2_up")} == {(width, 2, 2, width)}
    head, ones = decoders.head(module.config), np.ones((1, 4, 4, 8), np.float32)
    assert not decoders.decoder(module.config).align_corners
    made = head.apply(head.init(jax.random.key(0), ones), ones, train=True, rngs={"dropout": jax.random.key(1)})
    assert (made == made[:, :1, :1]).all()


def test_windows_cover_an_image_evenly_in_the_mean(roots):
    """Every pixel of 80 x 48 is seen by windows of 32 at 0, 24 and 48, and 0 and 16."""
    dataset = datasets.load("pangaea", roots / "sen1floods11", "test", of="sen1floods11")

    class Numbered:
        """Says of each window which it is."""

        facts = dataset.facts
        calls = 0

        def __call__(self, inputs):
            found = [np.full((32, 32, 2), self.calls + i, np.float32) for i in range(len(inputs["S1GRD"]))]
            self.calls += len(found)
            return np.stack(found)

    made = pangaea.sliding(Numbered(), {"S1GRD": np.zeros((80, 48, 2), np.float32)}, 32)[..., 0]
    assert (made[0, 0], made[0, 40], made[70, 0], made[70, 40]) == (0, 1, 4, 5)
    assert made[0, 20] == 0.5 and made[28, 0] == 1.0 and made[28, 20] == (0 + 1 + 2 + 3) / 4


def test_the_report_is_in_per_cent(roots, tmp_path):
    """The mean and the classes alike; the table has shares."""
    test, confusion = datasets.load("pangaea", roots / "burnscars", "test", of="burnscars"), np.array([[80, 0], [10, 10]])
    found = metrics.class_scores(confusion, absent=True)
    pangaea._write(tmp_path, pangaea.Settings(), "mine", test, confusion, found)
    text, table = ((tmp_path / name).read_text() for name in ("report.md", "scores.csv"))
    assert "| mine | 69.44 |" in text and "All scores are in per cent" in text
    for name, pixels, iou in zip(test.class_names, (80, 20), (80 / 90, 0.5), strict=True):
        assert f"| {name} | {pixels} | {100 * iou:.2f} |" in text and f"{name},{pixels},{iou}" in table


@pytest.mark.slow
def test_the_whole_protocol(roots, tmp_path, capsys):
    """On a tiny copy, and again on what is there."""
    common = ["evaluate", "pangaea", "--model=terramind_v1_tiny", "--weights=random", "--crop=64", "--limit=8", "--epochs=5"]
    sample("ai4smallfarms", roots / "ai4smallfarms", count=4, size=SIZE)
    for name in ("burnscars", "pastis", "ai4smallfarms"):
        out = tmp_path / name
        command = [*common, f"--dataset={name}", f"--data={roots / name}", f"--out={out}"]
        assert cli.main(command) == 0
        text = (out / "report.md").read_text()
        assert "epochs 5, crop 64, limit 8" in text and "| TerraMind-large |" in text
        assert cli.main(command) == 2 and "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset=eurosat"], "Of PANGAEA's data sets there is no 'eurosat'"),
        (["--dataset=mados"], "burnscars holds nothing of MADOS"),
        (["--dataset=burnscars", "--model=nothing"], "Unknown model 'nothing'"),
        (["--dataset=burnscars", "--crop=224"], "are 96x96 pixels; data.crop=224 can be at most 96"),
        (["--dataset=burnscars", "--labels=0"], "data.labels=0.0"),
    ],
)
def test_what_cannot_be_evaluated(roots, tmp_path, capsys, arguments, message):
    command = ["evaluate", "pangaea", "--weights=random", f"--data={roots / 'burnscars'}", f"--out={tmp_path / 'out'}"]
    assert cli.main([*command, "--crop=64", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*"))


# ---- published numbers ----


def test_published_numbers_have_sources():
    for protocol in json.loads(results.PUBLISHED.read_text())["protocols"]:
        rows, note = results.published(protocol)
        assert all(row["source"] for row in rows) and note.endswith(".")


def test_the_averages_of_pangaea_follow_from_its_columns():
    rows, _ = results.published("pangaea")
    assert len(rows) == 18
    for row in rows:
        numbers = [x for name, x in row.items() if isinstance(x, float) and name != "average"]
        assert np.mean(numbers) == pytest.approx(row["average"], abs=0.011), row["model"]


def test_own_rows_stand_above_the_published_ones_of_their_columns():
    text = results.compared("fewshot", [{"model": "mine", "input": "S2L1C", "METER-ML": 31.0}])
    lines = text.split("\n")
    assert lines[0] == "| model | input | METER-ML | source |" and lines[2] == "| mine | S2L1C | 31.00 | this run |"
    assert "32.23" in text and "52.39" not in text


def test_a_note_stands_below_published_rows_alone():
    """Of a data set without such rows there is none; that nothing is published of a protocol is told."""
    note = {name: results.published(name)[1] for name in ("finetuned", "geolocate")}
    row = {"model": "mine", "data set": "Sen1Floods11", "mIoU": 80.0}
    assert results.compared("finetuned", [row]).endswith(note["finetuned"])
    assert results.compared("finetuned", [{**row, "data set": "MADOS"}]).endswith("| mine | MADOS | 80.00 | this run |")
    assert results.compared("geolocate", [{"model": "mine", "kilometres": 80.0}]).endswith(note["geolocate"])
