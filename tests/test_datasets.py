"""Downstream data sets: the published layouts, as `data sample` writes them, a user's own, and what is said of bad ones."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from terramind_jax import cli, geo
from terramind_jax.modalities import S2L1C_BANDS
from terramind_jax.tasks import batches, datasets, finetune, predict
from terramind_jax.tasks.datasets import burnscars, eurosat, mados, pastis, sen1floods11
from terramind_jax.tasks.samples import sample

SIZE = 48
IMAGES = {
    "S2L1C": {"folder": "v1.1/data/flood_events/HandLabeled/S2Hand", "pattern": "*_S2Hand.tif"},
    "S1GRD": {"folder": "v1.1/data/flood_events/HandLabeled/S1Hand", "pattern": "*_S1Hand.tif"},
}
LABELS = {"folder": "v1.1/data/flood_events/HandLabeled/LabelHand", "pattern": "*_LabelHand.tif"}
FLOODS = dict(
    images=IMAGES,
    labels=LABELS,
    splits={"train": "train.txt", "val": "val.txt"},
    class_names=("land", "water"),
    title="floods",
)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    base = tmp_path_factory.mktemp("samples")
    for name in datasets.PUBLISHED:
        sample(name, base / name, count=2, size=SIZE)
    for split in ("train", "val"):
        names = datasets.load("sen1floods11", base / "sen1floods11", split).names
        (base / "sen1floods11" / f"{split}.txt").write_text("\n".join(names))
    return base


@pytest.fixture
def floods(roots, tmp_path):
    """A copy of Sen1Floods11 that may be spoilt."""
    return pathlib.Path(shutil.copytree(roots / "sen1floods11", tmp_path / "floods"))


def first(root: pathlib.Path, folder: str) -> pathlib.Path:
    return sorted((root / "v1.1/data/flood_events/HandLabeled" / folder).iterdir())[0]


# ---- published ones ----


@pytest.mark.parametrize("name", datasets.PUBLISHED)
def test_published_layouts(roots, name):
    """Every split has the samples, bands, sizes, types and classes that it tells of."""
    datasets.check(name, roots / name)
    for split in datasets.SPLITS:
        dataset = datasets.load(name, roots / name, split)
        assert len(set(dataset.names)) == len(dataset) > 0
        facts, read = dataset.facts, dataset[0]
        for modality, bands in facts.bands.items():
            image = read["inputs"][modality]
            assert image.shape[-3:] == (SIZE, SIZE, len(bands)) and image.dtype == np.float32
            assert np.isfinite(image).all()
            assert modality not in facts.mean or len(facts.mean[modality]) == len(facts.std[modality]) == len(bands)
        if facts.task == "segmentation":
            assert read["target"].shape == (SIZE, SIZE) and read["target"].dtype == np.int32
            assert (read["target"] != facts.ignore_index).any()
        else:
            assert sorted({s["target"] for s in dataset}) == list(range(facts.num_classes))


def test_splits_share_nothing(roots):
    for name in datasets.PUBLISHED:
        names = [set(datasets.load(name, roots / name, split).names) for split in datasets.SPLITS]
        assert not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])


def test_values_are_in_the_units_of_the_statistics(roots):
    """Reflectance x 10000 however the files store it, radar in dB."""
    for name in ("sen1floods11", "burnscars", "mados", "pastis", "eurosat"):
        for modality, image in datasets.load(name, roots / name)[0]["inputs"].items():
            low, high = (-35, 0) if modality == "S1GRD" else (200, 6000)
            assert low < np.median(image) < high, (name, modality)


def test_band_8a_of_eurosat_is_stored_last(roots):
    dataset = datasets.load("eurosat", roots / "eurosat")
    path = dataset.samples[0].inputs["S2L1C"]
    stored, given = np.moveaxis(geo.read_valid(path, eurosat.STORED, "EuroSAT"), -1, 0), dataset[0]["inputs"]["S2L1C"]
    assert eurosat.STORED[-1] == "NIR_NARROW" and set(eurosat.STORED) == set(S2L1C_BANDS)
    np.testing.assert_array_equal(given[..., S2L1C_BANDS.index("NIR_NARROW")], stored[-1])
    np.testing.assert_array_equal(given[..., S2L1C_BANDS.index("NIR_BROAD")], stored[7])
    np.testing.assert_array_equal(given[..., S2L1C_BANDS.index("SWIR_2")], stored[11])


def test_spatial_splits_of_eurosat_part_the_same_images(roots):
    root = roots / "eurosat"
    by_chance, spatial = ([datasets.load("eurosat", root, split, spatial=of).names for split in datasets.SPLITS] for of in (False, True))
    assert [len(names) for names in spatial] == [len(names) for names in by_chance]
    assert sorted(sum(spatial, ())) == sorted(sum(by_chance, ())) and list(map(set, spatial)) != list(map(set, by_chance))
    (root / "eurosat-spatial-val.txt").rename(root / "away")
    with pytest.raises(FileNotFoundError, match=r"eurosat-spatial-val.txt is not there; get it from .*eurosat-\[spatial-\]"):
        datasets.load("eurosat", root, "val", spatial=True)
    (root / "away").rename(root / "eurosat-spatial-val.txt")


def test_eurosat_in_red_green_and_blue(roots):
    given, rgb = (datasets.load("eurosat", roots / "eurosat", rgb=of)[0]["inputs"] for of in (False, True))
    assert rgb.keys() == {"S2RGB"} and rgb["S2RGB"].min() >= 0 and 200 < rgb["S2RGB"].max() <= 255
    image = given["S2L1C"][..., [3, 2, 1]]
    assert np.corrcoef(image.ravel(), rgb["S2RGB"].ravel())[0, 1] > 0.95


def test_true_colours():
    """A dark image is 255 / 2000 of its reflectance; a bright one is spread from 500 on, and a few brighter pixels change it little."""
    dark = np.linspace(100, 1500, 300, dtype=np.float32).reshape(10, 10, 3)
    np.testing.assert_array_equal(eurosat.true_colour(dark), np.round(dark * 255 / 2000))
    bright = np.linspace(1200, 4000, 30_000, dtype=np.float32).reshape(100, 100, 3)
    made = eurosat.true_colour(bright)
    white = np.quantile(bright, 0.98) + 0.9 * (4000 - np.quantile(bright, 0.98)) / 2  # the quantile of 99.8 per cent, softened
    np.testing.assert_allclose(made, np.minimum(255, np.round((bright - 500) * 255 / (white - 500))), atol=3)
    assert made.min() == round(700 * 255 / (white - 500)) and made.max() == 255
    bright[0, 0] = 30_000  # a glint
    assert abs(eurosat.true_colour(bright) - made)[1:].max() < 5


def test_coarse_bands_of_mados_are_repeated(roots):
    dataset = datasets.load("mados", roots / "mados")
    image, target = dataset[0]["inputs"]["S2L2A"], dataset[0]["target"]
    coarse = image[..., mados.BANDS.index("COASTAL_AEROSOL")].reshape(SIZE // 6, 6, SIZE // 6, 6)
    assert (coarse == coarse[:, :1, :, :1]).all()
    assert set(np.unique(target)) == {mados.FACTS.ignore_index, *range(15)}


def test_times_of_pastis(roots):
    read = datasets.load("pastis", roots / "pastis", times=4)[0]
    for modality in ("S2L2A", "S1GRD"):
        assert read["inputs"][modality].shape == (4, SIZE, SIZE, len(pastis.BANDS[modality]))
        assert read["dates"][modality].shape == (4,) and (np.diff(read["dates"][modality]) > 0).all()
    assert pastis.FACTS.has_times and pastis.spaced(61, 6).tolist() == [0, 12, 24, 36, 48, 60]
    with pytest.raises(ValueError, match="0 times of each series"):
        datasets.load("pastis", roots / "pastis", times=0)


def test_a_tenth_of_burn_scars_validates():
    names = [str(i) for i in range(540)]
    held, kept = burnscars.tenth(names, held_out=True), burnscars.tenth(names, held_out=False)
    assert len(held) == 54 and sorted(held + kept) == sorted(names)


def test_the_layout_of_the_terramind_repository(floods):
    """The same samples from the folders that its configurations expect."""
    before = datasets.load("sen1floods11", floods)
    base = floods / "v1.1"
    for old, new in (("S2Hand", "S2L1CHand"), ("S1Hand", "S1GRDHand"), ("LabelHand", "LabelHand")):
        (base / "data").mkdir(exist_ok=True)
        (base / sen1floods11.PUBLISHED / old).rename(base / "data" / new)
    for name in ("train", "valid", "test"):
        rows = (base / "splits/flood_handlabeled" / f"flood_{name}_data.csv").read_text().split()
        (base / "splits" / f"flood_{name}_data.txt").write_text("\n".join(row.split("_S1Hand")[0] for row in rows))
    after = datasets.load("sen1floods11", floods)
    assert after.names == before.names and len(after) == 2
    assert after[0]["target"].shape == (SIZE, SIZE)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("sen1floods11", "v1.1/data/flood_events/HandLabeled/S1Hand"),
        ("burnscars", "validation"),
        ("mados", "splits/val_X.txt"),
        ("pastis", "DATA_S1A"),
        ("eurosat", "ds/images/remote_sensing/otherDatasets/sentinel_2/tif/Forest"),
        ("ai4smallfarms", "sentinel-2-asia/validate"),
    ],
)
def test_what_is_not_there_is_told_with_its_source(roots, name, part):
    whole = roots / name / part
    away = whole.with_name("away")
    whole.rename(away)
    try:
        with pytest.raises(FileNotFoundError) as error:
            datasets.check(name, roots / name)
    finally:
        away.rename(whole)
    assert whole.name in str(error.value) and datasets.PUBLISHED[name].SOURCE in str(error.value)


def test_a_folder_of_something_else_is_told_from_a_set_that_lacks_parts(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds nothing of Sen1Floods11, not even data/.*/S2Hand; get it from"):
        datasets.load("sen1floods11", tmp_path)
    (tmp_path / "data/flood_events/HandLabeled/S2Hand").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"Sen1Floods11 is not complete in {tmp_path}: data/.*, data/.* are not there; get it from"):
        datasets.load("sen1floods11", tmp_path)


def test_unknown_names_and_splits(roots):
    with pytest.raises(ValueError, match="There is no data set 'floods'; known are sen1floods11, burnscars"):
        datasets.load("floods", roots)
    for name in datasets.PUBLISHED:
        with pytest.raises(ValueError, match="has no split 'trian'; it has train, val, test"):
            datasets.load(name, roots / name, "trian")


def test_sample_command(tmp_path, capsys):
    assert cli.main(["data", "sample", "mados", f"--out={tmp_path / 'out'}", "--count=1", "--size=48"]) == 0
    assert len(datasets.load("mados", tmp_path / "out")) == 1
    assert cli.main(["data", "sample", "mados", f"--out={tmp_path / 'out'}", "--size=48"]) == 2
    assert cli.main(["data", "sample", "spacenet", f"--out={tmp_path / 'other'}"]) == 2
    assert "There are no samples of 'spacenet'" in capsys.readouterr().err and not (tmp_path / "other").exists()


# ---- a user's own ----


def test_the_generic_data_set_reads_what_the_published_one_does(roots):
    published = datasets.load("sen1floods11", roots / "sen1floods11", "val")
    own = datasets.load("generic", roots / "sen1floods11", "val", **FLOODS)
    assert own.names == published.names
    for modality in IMAGES:
        np.testing.assert_array_equal(own[0]["inputs"][modality], published[0]["inputs"][modality])
    np.testing.assert_array_equal(own[0]["target"], published[0]["target"])


def test_bands_scales_and_one_modality(roots):
    optical = {**IMAGES["S2L1C"], "use": ["RED", "GREEN"], "scale": 0.5, "mean": [1, 2], "std": [3, 4]}
    own = datasets.load("generic", roots / "sen1floods11", **{**FLOODS, "images": {**IMAGES, "S2L1C": optical}})
    whole = datasets.load("sen1floods11", roots / "sen1floods11")[0]["inputs"]["S2L1C"]
    wanted = [S2L1C_BANDS.index("RED"), S2L1C_BANDS.index("GREEN")]
    np.testing.assert_array_equal(own[0]["inputs"]["S2L1C"], whole[..., wanted] / 2)
    assert own.facts.mean == {"S2L1C": (1, 2)}
    radar = own.only(["S1GRD"])
    assert set(radar[0]["inputs"]) == set(radar.facts.bands) == {"S1GRD"} and not radar.facts.mean
    with pytest.raises(ValueError, match="The inputs of floods are S2L1C, S1GRD; DEM is none."):
        own.only(["DEM"])


def test_a_number_that_goes_on_is_anothers(tmp_path):
    """``tile_10_label.npy`` is not of ``tile_1``, even if that has none; a name may go on in another way."""
    images = {"S1GRD": {"folder": "images", "pattern": "*.npy"}}
    fields = dict(images=images, labels={"folder": "labels", "pattern": "*.npy"}, class_names=("a", "b"))
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for number in (1, 10, 100):
        np.save(tmp_path / f"images/tile_{number}.npy", np.ones((2, 4, 4), np.float32))
        np.save(tmp_path / f"labels/tile_{number}_24label.npy", np.full((4, 4), number % 2))
    dataset = datasets.load("generic", tmp_path, **fields)
    assert {name: int(dataset.target(i).max()) for i, name in enumerate(dataset.names)} == {"tile_1": 1, "tile_10": 0, "tile_100": 0}
    (tmp_path / "labels/tile_1_24label.npy").rename(tmp_path / "labels/tile_1_other.npy")
    assert datasets.load("generic", tmp_path, **fields).names == dataset.names
    (tmp_path / "labels/tile_1_other.npy").unlink()
    with pytest.raises(FileNotFoundError, match="names tile_1, whose file .*tile_1.npy is not there"):
        datasets.load("generic", tmp_path, **fields)


def test_statistics_are_those_of_all_pixels(roots):
    dataset = datasets.load("sen1floods11", roots / "sen1floods11").only(["S1GRD"])
    pixels = np.concatenate([s["inputs"]["S1GRD"].reshape(-1, 2) for s in dataset])
    mean, std = datasets.statistics(dataset)["S1GRD"]
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-5)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-5)


@pytest.mark.parametrize(
    ("task", "table", "expected"),
    [
        ("classification", "name,label\na,1\nb,water\n", [1, 1]),
        ("scalar_regression", "name,label\na,1.5\nb,-2\n", [1.5, -2.0]),
        ("multilabel", "name,land,water\na,0,1\nb,1,1\n", [[0, 1], [1, 1]]),
    ],
)
def test_tables_of_labels(tmp_path, task, table, expected):
    for name in ("a", "b"):
        geo.write(tmp_path / "images" / f"{name}.tif", np.ones((8, 8, 2), np.float32))
    (tmp_path / "labels.csv").write_text(table)
    fields = dict(images={"S1GRD": {"folder": "images", "pattern": "*.tif"}}, labels={"table": "labels.csv"}, task=task)
    fields |= {} if "regression" in task else {"class_names": ("land", "water")}
    dataset = datasets.load("generic", tmp_path, **fields)
    np.testing.assert_array_equal([dataset[i]["target"] for i in (0, 1)], expected)
    by_split = datasets.load("generic", tmp_path, **{**fields, "labels": {"table": {"train": "labels.csv"}}})
    np.testing.assert_array_equal(by_split[1]["target"], expected[1])
    (tmp_path / "labels.csv").write_text(table.replace("\nb,", "\nc,"))
    with pytest.raises(FileNotFoundError, match="names 1 samples without a label in labels.csv, such as b."):
        datasets.load("generic", tmp_path, **fields)
    (tmp_path / "labels.csv").write_text(table.replace("\nb,", "\nb,x"))
    with pytest.raises(ValueError, match=r"labels.csv gives b the label 'x.*', which is none of a"):
        datasets.load("generic", tmp_path, **fields)


def test_values_of_minus_one_count(tmp_path):
    """Of a regression only NaN and nodata are none; with an ignore_index what it says is, too."""
    geo.write(tmp_path / "images" / "a.tif", np.ones((2, 2, 2), np.float32))
    geo.write(tmp_path / "labels" / "a.tif", np.float32([[-1, np.nan], [-9999, 3]]), nodata=-9999)
    images, labels = ({"folder": folder, "pattern": "*.tif"} for folder in ("images", "labels"))
    fields = dict(images={"S1GRD": images}, labels={**labels, "scale": 2}, task="regression")
    for ignore, valid in (({}, [[True, False], [False, True]]), ({"ignore_index": -1}, [[False, False], [False, True]])):
        dataset = datasets.load("generic", tmp_path, **fields, **ignore)
        found = batches.cut(dataset, dataset[0], {"S1GRD": (0, 1)}, slice(2), slice(2))
        np.testing.assert_array_equal(found["valid"], valid)
        np.testing.assert_array_equal(found["target"], np.where(valid, [[-2, 0], [0, 6]], 0))
    assert datasets.facts("generic", images={"S1GRD": images}, labels=labels, num_classes=2).ignore_index == -1


@pytest.mark.parametrize("name", ["burnscars", "eurosat", "generic"])
def test_a_saved_run_reads_files_as_its_data_set_does(roots, tmp_path, name):
    """Stored bands and their order, unit and marks of no data, from ``task.json`` alone."""
    optical = {**IMAGES["S2L1C"], "use": ["SWIR_1", "RED"], "scale": 0.5, "replace": 7}
    options = {**FLOODS, "images": {"S2L1C": optical}} if name == "generic" else {}
    dataset = datasets.load(name, roots / ("sen1floods11" if name == "generic" else name), **options)
    finetune.write_task(tmp_path, dataset.facts, {})
    facts = finetune.facts_of(json.loads((tmp_path / finetune.TASK).read_text()))
    assert facts == dataset.facts
    task = SimpleNamespace(facts=facts, crop=16, module=SimpleNamespace(time="mean"))
    scene = predict.open_scene(task, "scene", dataset.samples[0].inputs)
    arrays, _ = predict.read(task, scene)
    assert arrays.keys() == facts.bands.keys()
    for modality, image in dataset[0]["inputs"].items():
        np.testing.assert_array_equal(arrays[modality], image)
        np.testing.assert_array_equal(predict.read(task, scene, 16, 32)[0][modality], image[16:])


# ---- bad ones ----


def test_labels_beyond_the_classes(floods):
    path = first(floods, "LabelHand")
    label = geo.read_valid(path, ("label",), "a mask")
    label[0, 0] = 7
    geo.write(path.with_name("new.tif"), label.astype(np.int16))
    os.replace(path.with_name("new.tif"), path)
    with pytest.raises(ValueError, match="has the label 7, but the 2 classes of Sen1Floods11 are 0-1 and -1 for none"):
        list(datasets.load("sen1floods11", floods))


@pytest.mark.parametrize(("folder", "what"), [("LabelHand", "The mask of Synthia"), ("S1Hand", "The S1GRD of Synthia")])
def test_another_size(floods, folder, what):
    path = first(floods, folder)
    channels, dtype = (1, np.int16) if folder == "LabelHand" else (2, np.float32)
    geo.write(path.with_name("new.tif"), np.zeros((SIZE // 2, SIZE, channels), dtype))
    os.replace(path.with_name("new.tif"), path)
    with pytest.raises(ValueError, match=f"{what}.* is 24x48 pixels and its S2L1C 48x48; expected one size"):
        list(datasets.load("sen1floods11", floods))


def test_a_split_that_names_absent_files(floods):
    path = first(floods, "S1Hand")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"flood_train_data.csv names Synthia_.*, whose file .*{path.name} is not there"):
        datasets.load("sen1floods11", floods)
    with pytest.raises(FileNotFoundError, match=f"train.txt names Synthia_.*, whose file .*{path.name} is not there"):
        datasets.load("generic", floods, **FLOODS)


def test_bands_in_another_order(floods):
    path = first(floods, "S1Hand")
    geo.write(path.with_name("new.tif"), np.zeros((SIZE, SIZE, 2), np.float32), bands=("VH", "VV"))
    os.replace(path.with_name("new.tif"), path)
    with pytest.raises(ValueError, match="Band 1 of .* is named 'VH', expected VV; S1GRD is VV, VH"):
        list(datasets.load("sen1floods11", floods))


def test_another_number_of_bands(floods):
    fields = {**FLOODS, "images": {"S2L1C": {**IMAGES["S2L1C"], "bands": ["RED", "GREEN"]}}}
    with pytest.raises(ValueError, match=r"has 13 bands, expected 2 for S2L1C \(RED, GREEN\)"):
        list(datasets.load("generic", floods, **fields))


def test_an_empty_validation_split(floods):
    (floods / "val.txt").write_text("\n")
    with pytest.raises(ValueError, match="val.txt names no sample, so the val split is empty"):
        datasets.load("generic", floods, "val", **FLOODS)
    (floods / "v1.1/splits/flood_handlabeled/flood_valid_data.csv").write_text("\n")
    with pytest.raises(ValueError, match="The val split of Sen1Floods11 is empty"):
        datasets.load("sen1floods11", floods, "val")


def test_a_class_that_never_occurs(roots):
    dataset = datasets.load("generic", roots / "sen1floods11", **{**FLOODS, "class_names": ("land", "water", "ice")})
    with pytest.warns(UserWarning, match="No sample of the train split of floods holds: ice."):
        counts = datasets.class_counts(dataset)
    assert counts[2] == 0 and counts[:2].all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "detection"}, "There is no task 'detection'"),
        ({"images": {}}, "needs images of at least one modality"),
        ({"images": {"S1GRD": {**IMAGES["S1GRD"], "band": 1}}}, "S1GRD has no field 'band'; known are folder"),
        ({"images": {"S1GRD": {"folder": "S1", "pattern": "a.tif"}}}, "S1GRD needs a folder and a pattern with a"),
        ({"images": {"S1GRD": {**IMAGES["S1GRD"], "use": ["HH"]}}}, "The files of S1GRD hold the bands VV, VH; HH is none of them"),
        ({"images": {"S1GRD": {**IMAGES["S1GRD"], "mean": [1]}}}, r"S1GRD has 1 values of mean for 2 bands"),
        ({"labels": {"table": "labels.csv"}}, "segmentation needs labels of masks"),
        ({"num_classes": 3}, "num_classes is 3, but 2 classes are named"),
        ({"class_names": ()}, "segmentation needs class_names or num_classes"),
        ({"splits": {"val": "val.txt"}}, "There is no split 'train'; known are val"),
    ],
)
def test_fields_that_cannot_be(roots, changes, message):
    with pytest.raises(ValueError, match=message):
        datasets.load("generic", roots / "sen1floods11", **{**FLOODS, **changes})


# ---- stored codes ----


def stored_codes(root, label, **labels):
    """A data set of one image whose mask is `label`."""
    geo.write(root / "images" / "a.tif", np.ones((*label.shape, 2), np.float32))
    geo.write(root / "masks" / "a.tif", label, nodata=labels.pop("nodata", None))
    images, masks = ({"folder": folder, "pattern": "*.tif"} for folder in ("images", "masks"))
    return datasets.load("generic", root, images={"S1GRD": images}, labels={**masks, **labels}, class_names=("land", "field", "lake"))


@pytest.mark.parametrize("nodata", [None, 0, 7])
def test_stored_codes_are_classes_by_place(tmp_path, nodata):
    """Whatever their order, and even if the file calls one of them no data; its other nodata is none."""
    label = np.uint8([[0, 255], [10, 0 if nodata is None else nodata]])
    dataset = stored_codes(tmp_path, label, codes=(0, 255, 10), nodata=nodata)
    np.testing.assert_array_equal(dataset[0]["target"], [[0, 1], [2, -1 if nodata == 7 else 0]])
    assert datasets.class_counts(dataset).tolist() == [1 if nodata == 7 else 2, 1, 1]


def test_a_value_that_is_no_code(tmp_path):
    with pytest.raises(ValueError, match=r"masks.a.tif has the label 9; its codes are 0, 255, 10\."):
        list(stored_codes(tmp_path, np.uint8([[0, 255], [10, 9]]), codes=(0, 255, 10)))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"codes": (0, 255)}, "labels.codes are 0, 255; expected one for each of 3 classes"),
        ({"codes": (0, 255, 255)}, "labels.codes are 0, 255, 255; expected one for each of 3 classes"),
        ({"codes": (0, 1, 2), "zero_is_none": True}, "labels.codes and labels.zero_is_none are both given; give one"),
    ],
)
def test_codes_that_cannot_be(tmp_path, labels, message):
    with pytest.raises(ValueError, match=message):
        stored_codes(tmp_path, np.zeros((2, 2), np.uint8), **labels)


def test_own_data_that_is_not_there_is_told_with_its_source(tmp_path):
    images, masks = ({"folder": {"train": f"train/{folder}"}, "pattern": "*.tif"} for folder in ("images", "masks"))
    fields = dict(images={"S1GRD": images}, labels=masks, num_classes=2, title="fields", source="the fields' owner")
    (tmp_path / "train/images").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="fields is not complete in .*: train/masks is not there; get it from the fields' owner."):
        datasets.load("generic", tmp_path, **fields)


def test_a_set_that_lacks_a_split_is_not_called_nothing(tmp_path):
    images, masks = ({"folder": {"train": f"train/{what}", "val": f"hold/{what}"}, "pattern": "*.tif"} for what in ("images", "masks"))
    fields = dict(images={"S1GRD": images}, labels=masks, num_classes=2, title="fields", source="the fields' owner")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds nothing of fields, not even hold/images; get it from"):
        datasets.load("generic", tmp_path, "val", **fields)
    for folder in ("images", "masks"):
        (tmp_path / "train" / folder).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"fields is not complete in {tmp_path}: hold/images, hold/masks are not there"):
        datasets.load("generic", tmp_path, "val", **fields)
