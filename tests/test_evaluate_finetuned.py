"""``evaluate finetuned``: a fine-tuned run scored on another split of its data set."""

from __future__ import annotations

import csv
import json
import shutil

import jax
import nano_models
import numpy as np
import pytest
from ml_collections import ConfigDict

from terramind_jax import cli, metrics
from terramind_jax.evaluation import finetuned
from terramind_jax.tasks import datasets, feeding, finetune
from terramind_jax.tasks.config import finetuning
from terramind_jax.tasks.samples import sample
from terramind_jax.train import logging

SIZE = 48


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    nano_models.shrink(monkeypatch, "tiny")


def settings(root, dataset, **model):
    config = finetuning()
    config.model.update(name="terramind_v1_tiny", weights="random", decoder="linear", layers=(1,))
    config.model.update(model)
    config.data.update(dataset=dataset, root=str(root), crop=32, statistics="dataset" if dataset == "pastis" else "pretrained")
    config.optimizer.update(learning_rate=1e-2, schedule="constant")
    config.train.update(batch_size=8, steps=4)
    config.run.update(log_every=1, progress=False, tensorboard=False, eval_every=2, checkpoint_every=4)
    return config


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    out = tmp_path_factory.mktemp("floods") / "data"
    sample("sen1floods11", out, count=8, size=SIZE)
    return out


@pytest.fixture(scope="module")
def floods(root, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        nano_models.shrink(patch, "tiny")
        finetune.train(settings(root, "sen1floods11", modalities=("S1GRD",)), workdir)
    return workdir


def rows(out):
    with open(out / "scores.csv") as f:
        return list(csv.DictReader(f))


def logged(workdir):
    """The scores of the validation that was the best."""
    lines = [line for line in logging.read(workdir) if "val/loss" in line]
    best = min(lines, key=lambda line: line["val/loss"])
    return {name.removeprefix("val/"): x for name, x in best.items() if name.startswith("val/")}


def test_the_test_split_beside_the_papers_numbers(floods, root, tmp_path):
    """Windows at 0 and 16 cover an image of 48 pixels, of which the first counts; pixels without a label do not."""
    assert cli.main(["evaluate", "finetuned", f"--weights={floods}", f"--out={tmp_path / 'out'}"]) == 0
    task, dataset = finetune.load(floods), datasets.load("sen1floods11", root, "test").only(["S1GRD"])
    confusion = 0
    for i in range(len(dataset)):
        image, made = dataset[i]["inputs"]["S1GRD"], np.zeros((SIZE, SIZE), int)
        for top, left in ((16, 16), (16, 0), (0, 16), (0, 0)):
            at = np.s_[top : top + 32, left : left + 32]
            made[at] = np.asarray(task({"S1GRD": image[at][None]}))[0].argmax(-1)
        confusion = confusion + metrics.confusion_matrix(made, dataset[i]["target"], 2, ignore=-1)
    expected = metrics.class_scores(confusion)
    land, water, everything = rows(tmp_path / "out")
    assert (land["class"], water["class"], everything["class"]) == ("land", "water", "all")
    assert [int(land["pixels"]), int(water["pixels"])] == confusion.sum(1).tolist()
    iou = metrics.scores_by_class(confusion)["IoU"]
    assert float(water["IoU"]) == pytest.approx(iou[1], abs=2e-3)
    assert float(everything["mIoU"]) == pytest.approx(expected["mIoU"], abs=2e-3)
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"{len(dataset)} samples of the test split" in text and "| 72.25 |" in text and "S1 + generated LULC" in text


def test_the_validation_split_gives_what_training_logged(floods, root, tmp_path, monkeypatch):
    """On all devices, whatever the size of a batch."""
    found = finetuned.run(weights=floods, split="val", out=tmp_path / "val")
    assert found == pytest.approx(logged(floods), rel=1e-4)
    seen, complete = [], feeding.Frozen.complete
    monkeypatch.setattr(feeding.Frozen, "complete", lambda self, batch: seen.append(batch["target"]) or complete(self, batch))
    ones = {n: finetuned.run(weights=floods, split="val", out=tmp_path / f"one{n}", limit=1, batch_size=n) for n in (1, 3)}
    assert ones[1] == pytest.approx(ones[3], rel=1e-5) and ones[1].keys() == found.keys()
    assert {(len(x), len(x.sharding.device_set)) for x in seen} == {(jax.device_count(), jax.device_count())}
    valid = (datasets.load("sen1floods11", root, "val")[0]["target"] >= 0).sum()
    assert sum(int(row["pixels"]) for row in rows(tmp_path / "one3") if row["pixels"]) == valid


def test_all_training_samples_are_scored(floods, root, tmp_path):
    """Also of a run that has seen a quarter of their labels."""
    workdir = shutil.copytree(floods, tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["labels"] = 0.25
    (workdir / "config.json").write_text(json.dumps(config))
    finetuned.run(weights=workdir, split="train", out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"{len(datasets.load('sen1floods11', root, 'train'))} samples of the train split; scores in per cent, but for the loss" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pastis", "eurosat", "tim"])
def test_other_runs(root, tmp_path, name):
    """Time series through an L-TAE, whose ignored class has no row, labels of images, and a run that thinks."""
    own = {
        "pastis": dict(time="ltae", modalities=("S2L2A",)),
        "eurosat": dict(decoder="identity"),
        "tim": dict(name="terramind_v1_tiny_tim", modalities=("S1GRD",), tim_modalities=("LULC",), tim_temperature=0.0),
    }[name]
    data = "sen1floods11" if name == "tim" else name
    if name != "tim":
        sample(name, tmp_path / "data", count=2, size=SIZE)
    finetune.train(settings(root if name == "tim" else tmp_path / "data", data, **own), tmp_path / "run")
    found = finetuned.run(weights=tmp_path / "run", split="val", out=tmp_path / "val")
    assert found == pytest.approx(logged(tmp_path / "run"), rel=1e-3)
    assert finetuned.run(weights=tmp_path / "run", out=tmp_path / "test").keys() == found.keys()
    text = (tmp_path / "test" / "report.md").read_text()
    assert ("S1GRD + generated LULC" in text) == ("72.25" in text) == (name == "tim")
    assert "void" not in {row["class"] for row in rows(tmp_path / "test")}
    assert ("images" in rows(tmp_path / "test")[0]) == (name == "eurosat")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["regression", "multilabel"])
def test_values_and_several_labels(tmp_path, task):
    """A data set of one's own; of a regression there are no classes."""
    rng, root = np.random.default_rng(0), tmp_path / "data"
    for folder in ("images", "maps"):
        (root / folder).mkdir(parents=True)
    lines = ["name,smooth,rough"]
    for split in datasets.SPLITS:
        names = [f"{split}{i}" for i in range(8)]
        (root / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            np.save(root / "images" / f"{name}.npy", rng.normal(-12, 5, (2, 32, 32)).astype(np.float32))
            np.save(root / "maps" / f"{name}.npy", rng.normal(size=(32, 32)).astype(np.float32))
            lines.append(f"{name},{rng.integers(2)},{rng.integers(2)}")
    (root / "labels.csv").write_text("\n".join(lines))
    labels = {"table": "labels.csv"} if task == "multilabel" else {"folder": "maps", "pattern": "*.npy"}
    config = settings(root, "generic", decoder="identity" if task == "multilabel" else "linear")
    fields = dict(images={"S1GRD": {"folder": "images", "pattern": "*.npy"}}, labels=labels, task=task)
    fields |= dict(class_names=("smooth", "rough")) if task == "multilabel" else {}
    config.data.options = ConfigDict({**fields, "splits": {split: f"{split}.txt" for split in datasets.SPLITS}})
    finetune.train(config, tmp_path / "run")
    found = finetuned.run(weights=tmp_path / "run", split="val", out=tmp_path / "val")
    assert found == pytest.approx(logged(tmp_path / "run"), rel=1e-4)
    finetuned.run(weights=tmp_path / "run", out=tmp_path / "test")
    table = rows(tmp_path / "test")
    assert [row["class"] for row in table] == (["smooth", "rough", "all"] if task == "multilabel" else ["all"])
    if task == "regression":
        trained, dataset = finetune.load(tmp_path / "run"), datasets.load("generic", root, "test", **config.data.options.to_dict())
        off = [np.asarray(jax.device_get(trained({"S1GRD": x["inputs"]["S1GRD"][None]})))[0] - x["target"] for x in dataset]
        assert float(table[0]["rmse"]) == pytest.approx(np.sqrt(np.square(off).mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(split="tests"), "no split 'tests'; it has train, val, test"),
        (dict(split="bolivia"), "There is no file "),
        (dict(weights="nothing"), "has no config.json, so it is not the work directory of a training run"),
        (dict(weights="pretraining"), "has no task.json, so it is not the work directory of a fine-tuning"),
        (dict(data="nothing"), "holds nothing of Sen1Floods11"),
    ],
)
def test_what_cannot_be_scored(floods, tmp_path, capsys, change, message):
    (tmp_path / "pretraining").mkdir()
    shutil.copy(floods / "config.json", tmp_path / "pretraining")
    given = {name: value if name == "split" else tmp_path / value for name, value in change.items()}
    arguments = {"weights": floods, "out": tmp_path / "out"} | given
    assert cli.main(["evaluate", "finetuned", *(f"--{name}={value}" for name, value in arguments.items())]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
