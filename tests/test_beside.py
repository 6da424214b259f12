"""Inputs that enter as tokens, which frozen tokenizers make of them: in training, in prediction, in thoughts, and in TerraTorch's names."""

from __future__ import annotations

import dataclasses
import functools

import jax
import nano_models
import numpy as np
import pytest
from ml_collections import ConfigDict

from terramind_jax import config as configuration
from terramind_jax import geo, sources, tokenizer, weights
from terramind_jax.convert import files, rules
from terramind_jax.evaluation import finetuned
from terramind_jax.scenes.reading import Scene
from terramind_jax.tasks import beside, exchange, finetune, predict
from terramind_jax.tasks import model as networks
from terramind_jax.tasks.config import finetuning
from terramind_jax.train import logging

SIZE, CLASSES = 32, (1, 4)
FOLDERS = {"S1GRD": "radar", "LULC": "cover"}


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    nano_models.shrink(monkeypatch, "tiny")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Land cover of one class, which tells the label, and radar that says nothing of it."""
    root = tmp_path_factory.mktemp("cover")
    for split, count in (("train", 16), ("val", 8)):
        names = [f"{split}{i}" for i in range(count)]
        (root / f"{split}.txt").write_text("\n".join(names))
        for i, name in enumerate(names):
            label = np.full((SIZE, SIZE), i % 2, np.uint8)
            geo.write(root / "radar" / f"{name}.tif", np.full((SIZE, SIZE, 2), -12, np.float32))
            geo.write(root / "cover" / f"{name}.tif", np.uint8(CLASSES)[label][..., None])
            geo.write(root / "masks" / f"{name}.tif", label)
    return root


def settings(root, **model):
    config = finetuning()
    config.model.update(name="terramind_v1_tiny", weights="random", decoder="linear", layers=(1,))
    config.model.update(model)
    config.data.update(dataset="generic", root=str(root), crop=SIZE)
    images = {name: {"folder": folder, "pattern": "*.tif"} for name, folder in FOLDERS.items()}
    options = dict(images=images, labels={"folder": "masks", "pattern": "*.tif"}, class_names=("other", "water"))
    config.data.options = ConfigDict({**options, "splits": {split: f"{split}.txt" for split in ("train", "val")}})
    config.optimizer.update(learning_rate=1e-2, schedule="constant")
    config.train.update(batch_size=8, steps=32)
    config.run.update(log_every=1, progress=False, tensorboard=False, eval_every=32, checkpoint_every=32)
    return config


def test_land_cover_is_learned_from_and_comes_and_goes(root, tmp_path, monkeypatch):
    """Of whole images ids are made once a turned sample, by the tokenizer that is given, which is exported, too."""
    given = weights.load("terramind_v1_tiny", "random", modalities=["S1GRD", "LULC"])
    params = given.variables["params"]
    params = {**params, "encoder_token_emb": jax.tree.map(lambda x: 50 * x, params["encoder_token_emb"])}  # fresh ones are small
    weights.save(dataclasses.replace(given, variables={**given.variables, "params": params}), tmp_path / "given")
    seen, encode = [], beside._encode
    monkeypatch.setattr(beside, "_encode", lambda module, variables, x: seen.append(len(x)) or encode(module, variables, x))
    config = settings(root, weights=str(tmp_path / "given"))
    found = finetune.train(config, tmp_path / "run")
    losses = [line["loss"] for line in logging.read(tmp_path / "run") if "loss" in line]
    assert losses[-1] < 0.7 * losses[0] and found["val/pixel_accuracy"] > 0.99
    assert sum(seen) == 8 * 16 + 8

    task, sample = finetune.load(tmp_path / "run"), finetune.open_split(config, "val")[0]
    jax.tree.map(np.testing.assert_array_equal, dict(task.held["tokenizers"]["LULC"]), dict(given.tokenizers["LULC"][1]))
    made = task({name: x[None] for name, x in sample["inputs"].items()})[0].argmax(-1)
    paths = {name: root / folder / "val0.tif" for name, folder in FOLDERS.items()}
    np.testing.assert_array_equal(np.asarray(geo.read(*predict.run(tmp_path / "run", paths, tmp_path / "out")))[..., 0], made)

    state = exchange.to_torch(task)
    config.model.channels = (2,)  # TerraTorch's linear decoder has a head
    found = exchange.from_torch(state, config, task.facts)
    ours, again = (rules.flatten(tree) for tree in (task.held, {"tokenizers": found["tokenizers"]}))
    assert ours.keys() == again.keys() and any(name.startswith("encoder.tokenizer.tok_lulc@224.") for name in state)
    jax.tree.map(np.testing.assert_array_equal, ours, again)


def test_thoughts_follow_from_tokens_and_series_are_of_single_images(root):
    config = settings(root, name="terramind_v1_tiny_tim", tim_modalities=("DEM",), tim_temperature=0.0)
    facts = finetune.open_split(config, "train").facts
    extractor = finetune.backbone(config, facts)
    module, aside = finetune.task_model(config, facts, extractor)
    parted = finetune.meta.unbox(jax.jit(lambda key: networks.init(module, key, beside=aside))(jax.random.key(0)))
    rng, held = np.random.default_rng(0), parted["buffers"]
    cover = rng.integers(10, size=(2, 3, SIZE, SIZE, 1)).astype(np.float32)
    series = {"LULC": cover, "S1GRD": rng.normal(size=(2, 3, SIZE, SIZE, 2)).astype(np.float32)}
    found = aside.ids(held, series)
    assert {name: ids.shape for name, ids in found.items()} == {"LULC": (2, 3, 2, 2), "tok_dem@224": (2, 3, 2, 2)}
    (_, own), *_ = aside.tokenizers
    expected = tokenizer.apply(own, held["tokenizers"]["LULC"], cover[:, 1].astype(np.int32), "encode")
    np.testing.assert_array_equal(found["LULC"][:, 1], expected)
    single = aside.ids(held, {name: x[:, 1] for name, x in series.items()})
    np.testing.assert_array_equal(found["tok_dem@224"][:, 1], single["tok_dem@224"])
    variables = networks.join(parted["params"], held, parted.get("batch_stats"))
    assert jax.eval_shape(module.apply, variables, {**series, **found}).shape == (2, SIZE, SIZE, 2)


def test_a_thought_that_is_an_input_is_not_generated(root, tmp_path):
    """As in TerraTorch; the report says what is."""
    config = settings(root, name="terramind_v1_tiny_tim", tim_modalities=("LULC", "DEM"))
    dataset = finetune.open_split(config, "val")
    extractor = finetune.backbone(config, dataset.facts)
    module, aside = finetune.task_model(config, dataset.facts, extractor)
    assert aside.thinker.targets == ("tok_dem@224",) and len(extractor.generator[0].config.decoder) == 2
    task = finetune.Task(module, {}, dataset.facts, {}, SIZE, extractor, aside)
    text = finetuned._report(tmp_path / "report.md", "a run", task, dataset, config, {"mIoU": 0.5}, [])
    assert "| LULC + S1GRD + generated DEM |" in text
    config.model.tim_modalities = ("LULC",)
    with pytest.raises(ValueError, match=r"model.tim_modalities names inputs alone \(LULC\); terramind_v1_tiny_tim generates one at least"):
        finetune.task_model(config, dataset.facts, finetune.backbone(config, dataset.facts))


def test_thoughts_are_exported_with_the_tokenizers_that_are_named(root, tmp_path, monkeypatch):
    """Not those of the weights: only decoding needs them, so that a run does not hold them."""
    dem = weights.load("terramind_v1_tokenizer_dem", "random", seed=3)
    weights.save(dem, tmp_path / "tokenizers" / "DEM")
    config = settings(root, name="terramind_v1_tiny_tim", tim_modalities=("DEM",), tokenizers=str(tmp_path / "tokenizers"))
    facts = finetune.open_split(config, "train").facts
    extractor = finetune.backbone(config, facts)
    module, aside = finetune.task_model(config, facts, extractor)
    parted = finetune.meta.unbox(jax.jit(lambda key: networks.init(module, key, beside=aside))(jax.random.key(0)))
    held = {name: parted["buffers"][name] for name in ("tokenizers", "generator")}
    variables = networks.join(parted["params"], parted["buffers"], parted.get("batch_stats"))
    monkeypatch.setattr(finetune, "load", lambda workdir: finetune.Task(module, variables, facts, {}, SIZE, extractor, aside, held))
    monkeypatch.setattr(configuration, "of_workdir", lambda workdir: config)
    exchange.export(tmp_path / "run", tmp_path / "out.safetensors")
    made = files.read(tmp_path / "out.safetensors")
    for name, x in rules.to_torch(jax.device_get(dem.variables), sources.rules_of(dem.module)).items():
        np.testing.assert_array_equal(made[f"encoder.tokenizer.tok_dem@224.{name}"], x, err_msg=name)


def test_tokenizers_lie_elsewhere(root, tmp_path):
    """A pretraining of one's own need not hold tokenizers, and a network that is drawn reads those that are named."""
    own = weights.load("terramind_v1_tiny", "random", modalities=["S1GRD", "LULC"], seed=3)
    weights.save(dataclasses.replace(own, tokenizers={}), tmp_path / "own")
    config = settings(root, weights=str(tmp_path / "own"))
    facts = finetune.open_split(config, "train").facts
    extractor = finetune.backbone(config, facts)
    module, aside = finetune.task_model(config, facts, extractor)
    init = functools.partial(networks.init, module, beside=aside)
    with pytest.raises(FileNotFoundError, match="There is no tokenizer of LULC in"):
        finetune.pretrained(config, extractor)
    config.model.tokenizers = "random"
    assert finetune.initial(config, init, finetune.pretrained(config, extractor), aside)["buffers"]["tokenizers"].keys() == {"LULC"}

    lulc = weights.load("terramind_v1_tokenizer_lulc", "random", seed=4)
    weights.save(lulc, tmp_path / "tokenizers" / "LULC")
    config.model.update(weights="random", tokenizers="")
    assert finetune.pretrained(config, extractor) is None
    config.model.tokenizers = str(tmp_path / "tokenizers")
    given = finetune.initial(config, init, finetune.pretrained(config, extractor), aside)["buffers"]["tokenizers"]["LULC"]
    jax.tree.map(np.testing.assert_array_equal, dict(given), dict(lulc.variables))


def test_tokenizers_of_other_sizes_are_those_of_a_pretraining(root, tmp_path, monkeypatch):
    """Those that it was trained with are read, and kept for a run that goes on or is loaded; the released ones mean other things by ids."""
    codes = dict(sizes=nano_models.NANO, codebooks={"LULC": 24})
    own = weights.load("terramind_v1_tiny", "random", modalities=["S1GRD", "LULC"], **codes)
    small = tokenizer.Tokenizer(dataclasses.replace(own.tokenizers["LULC"][0].config, dim=64, levels=(4, 3, 2)))
    held = finetune.meta.unbox(tokenizer.init(small, jax.random.key(5)))
    weights.save(dataclasses.replace(own, tokenizers={"LULC": (small, held)}), tmp_path / "own")
    config = settings(root, weights=str(tmp_path / "own"))
    config.train.steps = 2
    config.run.update(eval_every=1, checkpoint_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "total_samples", lambda config, samples: 8)
        finetune.train(config, tmp_path / "run")
    finetune.train(config, tmp_path / "run")
    task = finetune.load(tmp_path / "run")
    assert task.beside.tokenizers == (("LULC", small),)
    jax.tree.map(np.testing.assert_array_equal, dict(task.held["tokenizers"]["LULC"]), dict(held))
    assert task({name: x[None] for name, x in finetune.open_split(config, "val")[0]["inputs"].items()}).shape == (1, SIZE, SIZE, 2)
    config.model.tokenizers = "random"
    with pytest.raises(ValueError, match=r"The tokenizer of LULC \(random\) has 4375 codes, but the model was trained with 24 codes"):
        finetune.train(config, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_tokenizers_of_other_classes_than_the_inputs_are_refused(root):
    config = settings(root, name="terramind_v01_base")
    facts = finetune.open_split(config, "train").facts
    with pytest.raises(ValueError, match="terramind_v01_base tells 9 classes of LULC, and fine-tuning reads maps of the 10 of TerraMesh"):
        finetune.task_model(config, facts, finetune.backbone(config, facts))


def test_what_bands_of_a_class_map_are_called_does_not_matter(root):
    config, whole = settings(root), finetune.open_split(settings(root), "train").facts
    facts = dataclasses.replace(whole, bands={**whole.bands, "LULC": ("classes",)})
    assert finetune.scale_of(config, facts).keys() == {"S1GRD", "LULC"}
    assert finetune.backbone(config, facts).module == finetune.backbone(config, whole).module
    with pytest.raises(ValueError, match="LULC is a map of classes, one band; .* has a, b"):
        finetune.scale_of(config, dataclasses.replace(facts, bands={"LULC": ("a", "b")}))


def test_land_cover_of_other_classes_is_refused(root, tmp_path):
    config = settings(root)
    task = finetune.Task(None, {}, finetune.open_split(config, "train").facts, {}, SIZE, None)
    cover = np.full((1, SIZE, SIZE, 1), 11.0)
    with pytest.raises(ValueError, match="An input has 11 in its LULC; classes are 0-9: "):
        task({"S1GRD": np.zeros((1, SIZE, SIZE, 2)), "LULC": cover})
    for folder in ("radar", "masks"):
        (tmp_path / folder).symlink_to(root / folder)
    geo.write(tmp_path / "cover/train0.tif", cover[0].astype(np.uint8))
    paths = {name: tmp_path / folder / "train0.tif" for name, folder in FOLDERS.items()}
    with pytest.raises(ValueError, match=f"{paths['LULC']} has 11 in its LULC"):
        predict.read(task, Scene("train0", paths, geo.place(paths["LULC"]), {}))
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("train0")
    with pytest.raises(ValueError, match="train0 has 11 in its LULC"):
        finetune.train(settings(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()
