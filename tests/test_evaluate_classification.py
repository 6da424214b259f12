"""k-NN, linear probe and few-shot classification of frozen features, of a tiny EuroSAT and of features that are known."""

from __future__ import annotations

import csv

import nano_models
import numpy as np
import pytest

from terramind_jax import cli, geo, models, weights
from terramind_jax.evaluation import classification, features, fewshot
from terramind_jax.tasks import datasets
from terramind_jax.tasks.samples import sample

SIZE = 48
OF_MODEL = ["--model=terramind_v1_tiny", "--weights=random"]


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    nano_models.shrink(monkeypatch, "tiny")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    out = tmp_path_factory.mktemp("eurosat") / "data"
    sample("eurosat", out, count=4, size=SIZE)
    return out


def rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_features_are_the_mean_of_a_layer(root):
    facts, (test,) = features.run(weights="random", model="terramind_v1_tiny", dataset="eurosat", data=root, splits=["test"], batch_size=5)
    dataset = datasets.load("eurosat", root, "test")
    model = weights.load("terramind_v1_tiny", "random", modalities=["S2L1C"])
    assert isinstance(model, models.FeatureExtractor) and facts.num_classes == 10
    images = np.stack([dataset[i]["inputs"]["S2L1C"] for i in range(3)])
    expected = np.asarray(model(model.standardize({"S2L1C": images}))[-1]).mean(1)
    np.testing.assert_allclose(test.x[:3], expected, atol=1e-4)
    assert test.names == dataset.names and list(test.labels) == [dataset.target(i) for i in range(len(dataset))]


def test_nearest_neighbours_of_the_training_split(root, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["evaluate", "knn", *OF_MODEL, f"--data={root}", f"--out={out}"]
    assert cli.main([*command, "--k=1,3"]) == 0
    found = rows(out / "scores.csv")
    assert [(row["model"], row["setting"]) for row in found[:2]] == [("terramind_v1_tiny", "k 1"), ("terramind_v1_tiny", "k 3")]
    predicted = rows(out / "predictions.csv")
    assert float(found[0]["accuracy"]) == np.mean([row["truth"] == row["predicted"] for row in predicted])
    assert all(row["sample"].startswith(row["truth"]) for row in predicted) and len(predicted) == 20
    assert "| TerraMind-large | EuroSAT | S2L2A, only RED GREEN BLUE, others 0 | k 5 | 0.751 |" in (out / "report.md").read_text()
    assert cli.main(command) == 2 and "exists already" in capsys.readouterr().err


def test_the_spatial_split_and_S2RGB(root, tmp_path):
    """As published of a linear probe; published neighbours are of another input, and do not stand beside as if they were of this one."""
    out = tmp_path / "out"
    command = ["evaluate", "knn", *OF_MODEL, f"--data={root}", f"--out={out}", "--spatial", "--inputs=S2RGB", "--k=5"]
    assert cli.main(command) == 0
    text = (out / "report.md").read_text()
    assert "EuroSAT, spatial split, 20 test images" in text and "| terramind_v1_tiny | EuroSAT | S2RGB | k 5 |" in text
    assert "| TerraMind-base | EuroSAT | S2L2A, only" in text and "| TerraMind-base | EuroSAT | S2RGB" not in text
    assert {row["sample"] for row in rows(out / "predictions.csv")} == set(datasets.load("eurosat", root, "test", spatial=True).names)


OWN = """
from ml_collections import ConfigDict
from terramind_jax.tasks.config import finetuning

def get_config():
    config = finetuning()
    config.data.options = ConfigDict(dict(
        title="sheds", task="classification", class_names=("dark", "bright"),
        images={"S1GRD": {"folder": "images", "pattern": "*.tif"}}, labels={"table": "labels.csv"},
        splits={"train": "train.txt", "test": "test.txt"},
    ))
    return config
"""


YAML = """
data:
  class_path: terratorch.datamodules.GenericMultiModalDataModule
  init_args:
    modalities: [S1GRD]
    train_data_root: {S1GRD: images}
    test_data_root: {S1GRD: images}
    train_label_data_root: labels.csv
    test_label_data_root: labels.csv
    train_split: train.txt
    test_split: test.txt
    image_grep: {S1GRD: "*.tif"}
model:
  class_path: terratorch.tasks.ClassificationTask
  init_args: {model_args: {backbone: terramind_v1_tiny}, class_names: [dark, bright]}
"""


def test_images_of_ones_own(tmp_path):
    """Radar that a configuration of `finetune` describes, where bright and dark are told apart without a model."""
    data, out = tmp_path / "data", tmp_path / "out"
    names = [f"{kind}{i}" for i in range(6) for kind in ("dark", "bright")]
    for i, name in enumerate(names):
        geo.write(data / "images" / f"{name}.tif", np.full((SIZE, SIZE, 2), (-25 if i % 2 == 0 else -5) + i / 10, np.float32))
    (data / "labels.csv").write_text("name,label\n" + "".join(f"{name},{name[:-1]}\n" for name in names))
    (data / "train.txt").write_text("\n".join(names[:8]))
    (data / "test.txt").write_text("\n".join(names[8:]))
    (tmp_path / "own.py").write_text(OWN)
    command = ["evaluate", "knn", *OF_MODEL, f"--config={tmp_path / 'own.py'}", f"--config.data.root={data}", f"--out={out}", "--k=3"]
    assert cli.main(command) == 0
    of_model, of_bands = rows(out / "scores.csv")
    assert of_model["data set"] == "sheds" and of_model["input"] == "S1GRD" and float(of_bands["accuracy"]) == 1
    assert [row["truth"] for row in rows(out / "predictions.csv")] == ["dark", "bright"] * 2
    assert "torchgeo" not in (out / "report.md").read_text()  # nothing is published of these images
    (tmp_path / "own.yaml").write_text(YAML)
    command = ["evaluate", "knn", *OF_MODEL, f"--config={tmp_path / 'own.yaml'}", f"--data={data}", f"--out={tmp_path / 'yaml'}", "--k=3"]
    assert cli.main(command) == 0
    assert (tmp_path / "yaml" / "predictions.csv").read_text() == (out / "predictions.csv").read_text()


def test_linear_probe(root, tmp_path):
    """The classes of the sample are tints, which means of bands tell apart."""
    out = tmp_path / "out"
    assert cli.main(["evaluate", "linear", *OF_MODEL, f"--data={root}", f"--out={out}"]) == 0
    of_model, of_bands = rows(out / "scores.csv")
    assert float(of_bands["accuracy"]) > 0.8 and float(of_model["accuracy"]) > 0.2


def test_a_fit_is_at_the_least_of_its_loss():
    rng = np.random.default_rng(0)
    x, penalty = rng.normal(size=(60, 3)), 0.1
    labels = np.argmax(x + 0.5 * rng.normal(size=x.shape), 1)
    w = classification.fit(x, labels, 3, penalty)
    one = np.append(x, np.ones((60, 1)), 1)
    p = np.exp(one @ w)
    gradient = one.T @ (p / p.sum(1, keepdims=True) - np.eye(3)[labels]) / 60 + penalty * w * [[1], [1], [1], [0]]
    np.testing.assert_allclose(gradient, 0, atol=1e-4)
    assert (classification.predict(w, x) == labels).mean() > 0.7


def test_few_shots(root, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["evaluate", "fewshot", *OF_MODEL, f"--data={root}"]
    assert cli.main([*command, f"--out={out}", "--runs=30"]) == 0
    each = [float(row["accuracy"]) for row in rows(out / "scores.csv")]
    text = (out / "report.md").read_text()
    assert len(each) == 30 and f"| terramind_v1_tiny | S2L1C | {100 * np.mean(each):.2f} |" in text
    assert "| TerraMind-base | S2L1C | 70.83 |" in text and "METER" not in text
    assert cli.main([*command, f"--out={tmp_path / 'other'}", "--ways=11"]) == 2
    assert "ways is 11; the training images of EuroSAT have 10 classes" in capsys.readouterr().err


def test_prototypes_of_classes_that_lie_apart():
    """Classes around corners are told apart by one example, at chance if their test images are not of the classes they claim."""
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(8), 30)
    x = 3 * np.eye(8)[labels] + 0.8 * rng.normal(size=(240, 8)) + 50  # far from zero, as features are
    found = fewshot.accuracies(x, labels, x + 0.1 * rng.normal(size=x.shape), labels, runs=40)
    assert 0.8 < found.mean() < 1
    wrong = fewshot.accuracies(x, labels, x, rng.permutation(labels), runs=40)
    assert abs(wrong.mean() - 0.2) < 0.05
    assert fewshot.accuracies(x, labels, x, labels, shots=5, runs=40).mean() > found.mean()
    np.testing.assert_array_equal(fewshot.accuracies(x, labels, x, labels, runs=3), fewshot.accuracies(x, labels, x, labels, runs=5)[:3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset=nothing"], "There is no data set 'nothing'"),
        (["--dataset=sen1floods11"], "holds nothing of Sen1Floods11"),
        (["--dataset=sen1floods11", "--spatial"], "--spatial is a split of EuroSAT; sen1floods11 has none such"),
        (["--config=configs/finetune/eurosat.py", "--spatial"], "tells the data set and its options; leave out --dataset and --spatial"),
        (["--config=configs/pretrain/tiny.py"], "tiny.py is of pretrain; expected a configuration of finetune"),
        (["--config.data.root=here"], "--config.data.root=here needs --config=FILE"),
        (["--data="], "--data=ROOT is missing, the folder of the data set"),
        (["--inputs=S1GRD"], "The inputs of EuroSAT are S2L1C; S1GRD is none"),
        (["--layer=5"], "The layer is 5; this model's are 0-1"),
        (["--k=0"], "k is 0; expected numbers of neighbours"),
    ],
)
def test_what_cannot_be_evaluated(root, tmp_path, capsys, arguments, message):
    assert cli.main(["evaluate", "knn", *OF_MODEL, f"--data={root}", f"--out={tmp_path / 'out'}", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
