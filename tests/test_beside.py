"""Inputs that enter as tokens, which frozen tokenizers make of them: in training, in prediction, in thoughts, and in TerraTorch's names."""

from __future__ import annotations

import dataclasses
import functools

import jax
import nano_models
import numpy as np
import pytest
from ml_collections import ConfigDict

from terramind_jax import geo, tokenizer, weights
from terramind_jax.convert import rules
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
    aside, module = beside.of(extractor, 0), finetune.task_model(config, facts, extractor)
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


def test_tokenizers_lie_elsewhere_or_have_other_sizes(root, tmp_path, monkeypatch):
    """A pretraining of one's own need not hold tokenizers."""
    own = weights.load("terramind_v1_tiny", "random", modalities=["S1GRD", "LULC"])
    module, variables = own.tokenizers["LULC"]
    weights.save(dataclasses.replace(own, tokenizers={}), tmp_path / "own")
    config = settings(root, weights=str(tmp_path / "own"))
    facts = finetune.open_split(config, "train").facts
    extractor = finetune.backbone(config, facts)
    init = functools.partial(networks.init, finetune.task_model(config, facts, extractor), beside=beside.of(extractor, 0))
    with pytest.raises(FileNotFoundError, match="There is no tokenizer of LULC in"):
        finetune.initial(config, init, extractor)
    config.model.tokenizers = "random"
    assert finetune.initial(config, init, extractor)["buffers"]["tokenizers"].keys() == {"LULC"}
    other = tokenizer.Tokenizer(dataclasses.replace(module.config, dim=64))
    load, held = weights.load, {"LULC": (other, variables)}
    monkeypatch.setattr(weights, "load", lambda *given, **options: dataclasses.replace(load(*given, **options), tokenizers=held))
    with pytest.raises(ValueError, match="random holds a tokenizer of LULC of other sizes than the released one; set"):
        finetune.initial(config, init, extractor)


def test_tokenizers_of_other_codes_or_classes_than_the_inputs_are_refused(root):
    config = settings(root)
    facts = finetune.open_split(config, "train").facts
    config.model.codebooks = ConfigDict({"LULC": 20})
    with pytest.raises(ValueError, match="The tokenizer of LULC has 4375 codes, but the model was trained with 20"):
        finetune.task_model(config, facts, finetune.backbone(config, facts))
    config = settings(root, name="terramind_v01_base")
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
