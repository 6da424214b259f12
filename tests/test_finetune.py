"""Fine-tuning: it learns, trains what it says, goes on with the same numbers, keeps its best parameters, and predicts from them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import nano_models
import numpy as np
import pytest
import tiny_run
from ml_collections import ConfigDict

from terramind_jax import cli, flops, geo, sharding, tim, weights
from terramind_jax import config as configuration
from terramind_jax.convert import rules
from terramind_jax.draws import probabilities
from terramind_jax.scenes import windows, writing
from terramind_jax.tasks import datasets, feeding, finetune, predict, thinking, validation
from terramind_jax.tasks import model as networks
from terramind_jax.tasks.config import check, decoder_config, finetuning
from terramind_jax.tasks.datasets import Facts
from terramind_jax.tasks.samples import sample
from terramind_jax.train import logging

SIZE = 48

pytestmark = pytest.mark.usefixtures("nano")


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    nano_models.shrink(monkeypatch, "tiny")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    out = tmp_path_factory.mktemp("floods") / "data"
    sample("sen1floods11", out, count=16, size=SIZE)
    return out


def settings(root, **groups):
    """Two nano layers with a linear decoder; `groups` are fields by group."""
    config = finetuning()
    config.model.update(name="terramind_v1_tiny", weights="random", modalities=("S1GRD",), decoder="linear", layers=(1,))
    config.data.update(dataset="sen1floods11", root=str(root), crop=32)
    config.optimizer.update(learning_rate=1e-2, schedule="constant")
    config.train.update(batch_size=8, steps=8)
    config.run.update(log_every=1, progress=False, tensorboard=False, eval_every=4, checkpoint_every=4)
    for group, values in groups.items():
        config[group].update(values)
    return config


def losses(workdir):
    return [line["loss"] for line in logging.read(workdir) if "loss" in line]


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        nano_models.shrink(patch, "tiny")
        finetune.train(settings(root, train=dict(steps=24)), workdir)
    return workdir


def test_a_run_learns_water_from_radar(finished):
    lines = [line for line in logging.read(finished) if "val/loss" in line]
    assert losses(finished)[-1] < 0.7 * losses(finished)[0]
    assert lines[-1]["val/pixel_accuracy"] > 0.75
    assert {"val/mIoU", "val/F1", "val/accuracy"} <= lines[-1].keys()
    assert 0 < [line["mfu"] for line in logging.read(finished) if "mfu" in line][-1] < 1


def test_a_run_goes_on_with_the_same_numbers(root, tmp_path, finished):
    """Stopped after 8 of 24 steps, with dropped learning rate and best parameters as if it had not been."""
    config = settings(root, train=dict(steps=24))
    stopped = config.copy_and_resolve_references()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "total_samples", lambda config, samples: 8 * 8)
        finetune.train(stopped, tmp_path)
    finetune.train(config, tmp_path)
    np.testing.assert_array_equal(losses(tmp_path), losses(finished))
    ours, theirs = (rules.flatten(jax.device_get(finetune.load(d).variables)) for d in (tmp_path, finished))
    for name, x in theirs.items():
        np.testing.assert_array_equal(ours[name], x, err_msg=name)


@pytest.mark.parametrize("tune", [pytest.param("frozen", marks=pytest.mark.slow), "lora"])
def test_what_is_trained(root, tmp_path, tune):
    """A frozen backbone stays as it was drawn; LoRA changes its attention alone."""
    config = settings(root, train=dict(tune=tune, steps=2), model=dict(lora_rank=2), run=dict(eval_every=2))
    facts = finetune.open_split(config, "train").facts
    module, _ = finetune.task_model(config, facts, finetune.backbone(config, facts))
    finetune.train(config, tmp_path)
    drawn = jax.jit(lambda key: networks.init(module, key, tune, 2))(jax.random.key(0))
    before = rules.flatten({"params": jax.device_get(jax.tree.map(lambda x: x, finetune.meta.unbox(drawn)))["buffers"]["frozen"]})
    after = rules.flatten({"params": {"encoder": jax.device_get(finetune.load(tmp_path).variables["params"]["encoder"])}})
    changed = {name for name in before if not np.allclose(before[name], after[name], atol=1e-5)}
    assert changed == (set() if tune == "frozen" else {f"params/encoder/encoder/{name}" for name in networks.ADAPTED})


def counted(monkeypatch):
    """The samples that networks which are not trained have seen, of features and of ids."""
    seen = {"features": 0, "ids": 0}
    featured, think = feeding._features, thinking.Thinker.__call__

    def features(variables, inputs, **options):
        seen["features"] += len(next(iter(inputs.values())))
        return featured(variables, inputs, **options)

    def ids(self, variables, inputs):
        seen["ids"] += len(next(iter(inputs.values())))
        return think(self, variables, inputs)

    monkeypatch.setattr(feeding, "_features", features)
    monkeypatch.setattr(thinking.Thinker, "__call__", ids)
    return seen


@pytest.mark.parametrize("name", ["terramind_v1_tiny", pytest.param("terramind_v1_tiny_tim", marks=pytest.mark.slow)])
def test_features_of_a_frozen_backbone_are_computed_once_a_sample(root, tmp_path, monkeypatch, name):
    """Of 16 samples and 8 in validation; losses are those of features that every step computes."""
    tiny_run.on_one_device(monkeypatch)
    changes = dict(model=dict(name=name), data=dict(crop=SIZE, d4=False))
    finetune.train(settings(root, train=dict(tune="frozen", cache=False), **changes), tmp_path / "anew")
    seen = counted(monkeypatch)
    finetune.train(settings(root, train=dict(tune="frozen"), **changes), tmp_path / "kept")
    assert seen == {"features": 24, "ids": 24 * name.endswith("tim")}
    for metric in ("loss", "val/loss", "val/mIoU"):
        anew, kept = ([line[metric] for line in logging.read(tmp_path / run) if metric in line] for run in ("anew", "kept"))
        np.testing.assert_allclose(kept, anew, rtol=1e-4)


def test_thinking_in_modalities(root, tmp_path, monkeypatch):
    """Ids are made once a turned sample, from the inputs alone, by the generator that is given; `predict` thinks as well."""
    given = weights.load("terramind_v1_tiny_tim", "random", modalities=["S1GRD"], tim_modalities=["LULC", "DEM"])
    weights.save(given, tmp_path / "given")
    tiny_run.on_one_device(monkeypatch)
    model = dict(name=given.name, weights=str(tmp_path / "given"), tim_modalities=("LULC", "DEM"), tim_temperature=0.0)
    config = settings(root, model=model, data=dict(crop=SIZE), train=dict(steps=24), run=dict(eval_every=12, checkpoint_every=24))
    seen = counted(monkeypatch)
    finetune.train(config, tmp_path / "run")
    assert seen["ids"] == 8 * 16 + 8 and losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    task = finetune.load(tmp_path / "run")
    splits, mesh = [finetune.open_split(config, split) for split in ("train", "val")], sharding.make_mesh(**config.mesh)
    held = jax.device_put({"generator": task.generator}, sharding.replicated(mesh))
    opened = partial(feeding.open_feed, dataset=splits[0], held_out=splits[1], scale=task.scale, mesh=mesh)
    opened = partial(opened, frozen=feeding.Frozen(task.module, task.beside, held))
    opened(config, total=8 * 16)
    assert seen["ids"] == 8 * 16 + 8 + 8  # with so few epochs a turned sample hardly repeats
    anew = settings(root, model=model, data=dict(crop=SIZE), train=dict(cache=False))
    streams = [itertools.islice(opened(each, total=24 * 8).training(16), 4) for each in (config, anew)]
    for kept, made in zip(*streams, strict=True):
        jax.tree.map(np.testing.assert_array_equal, kept, made)  # the thoughts of an image as it is turned, not those of the image turned
    jax.tree.map(np.testing.assert_array_equal, dict(task.generator), dict(given.generator[1]))
    tim.check_shared({group: task.variables[group]["encoder"] for group in ("params", "buffers")}, task.generator)
    path = datasets.load("sen1floods11", root, "val").samples[0].inputs["S1GRD"]
    made = np.asarray(geo.read(*predict.run(tmp_path / "run", {"S1GRD": path}, tmp_path / "out")))[..., 0]

    radar = datasets.load("sen1floods11", root, "val")[0]["inputs"]["S1GRD"][None]
    scaled = (radar - task.scale["S1GRD"][0]) / task.scale["S1GRD"][1]
    targets = ["tok_lulc@224", "tok_dem@224"]
    thought = tim.think(task.thinker.module, task.generator, {"untok_sen1grd@224": scaled}, targets, seed=5, temperature=0.0)
    expected = jax.jit(task.module.apply)(task.variables, {"S1GRD": scaled, **{key: thought[key] for key in targets}})
    np.testing.assert_array_equal(made[2:], expected[0].argmax(-1)[2:])  # in the corner above there is no data


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        (dict(train=dict(tune="full")), 3),
        (dict(train=dict(tune="lora")), 2),
        (dict(train=dict(tune="frozen")), 1),
        (dict(train=dict(tune="frozen"), data=dict(crop=SIZE, d4=False)), 0),
    ],
)
def test_what_a_step_costs(root, changes, passes):
    """Of the backbone as often as it runs or is gone back through, and three times a transposed convolution to two classes."""
    config = settings(root, model=dict(image_size=32), **changes)
    dataset = finetune.open_split(config, "train")
    module, _ = finetune.task_model(config, dataset.facts, finetune.backbone(config, dataset.facts))
    tokens, own = (config.data.crop // 16) ** 2, module.backbone
    patches = 2 * tokens * 16**2 * 2 * own.dim
    encode = patches + own.encoder_depth * flops.encoder_block(tokens, own.dim, own.mlp_ratio, own.gated_mlp)
    found = finetune.step_flops(config, module, dataset)
    assert found == 8 * (passes * encode + 3 * 2 * tokens * own.dim * 16**2 * 2)


@pytest.mark.parametrize("tune", ["full", "lora", "frozen"])
@pytest.mark.parametrize("decoder", ["linear", "unet"])
def test_what_a_step_costs_is_about_what_its_gradient_does(root, tune, decoder):
    narrow = dict(layers=(0, 0, 1, 1), channels=(16, 8, 8, 8)) if decoder == "unet" else {}
    config = settings(root, model=dict(image_size=32, decoder=decoder, lora_rank=2, **narrow), train=dict(tune=tune))
    dataset = finetune.open_split(config, "train")
    module, _ = finetune.task_model(config, dataset.facts, finetune.backbone(config, dataset.facts))
    loss = partial(finetune.loss, module, finetune.criterion(config, "ce"), config.model.lora_alpha)
    parted = jax.eval_shape(lambda key: finetune.meta.unbox(networks.init(module, key, tune, 2)), jax.random.key(0))
    pixels = partial(jax.ShapeDtypeStruct, (8, 32, 32))
    batch = {"inputs": {"S1GRD": jax.ShapeDtypeStruct((8, 32, 32, 2), np.float32)}, "target": pixels(np.int32), "valid": pixels(bool)}
    gradient = jax.value_and_grad(loss, has_aux=True)
    traced = flops.traced(gradient, parted["params"], parted["buffers"], parted.get("batch_stats"), batch, jax.random.key(0))
    assert finetune.step_flops(config, module, dataset) == pytest.approx(traced, rel=0.25)


def test_lora_is_less_than_two_per_cent(monkeypatch, root):
    monkeypatch.undo()
    config = settings(root, model=dict(name="terramind_v1_base", layers=(11,)))
    facts = datasets.load("sen1floods11", root).only(["S1GRD"]).facts
    module, _ = finetune.task_model(config, facts, finetune.backbone(config, facts))
    shapes = jax.eval_shape(lambda key: networks.init(module, key, "lora", config.model.lora_rank), jax.random.key(0))
    trained, held = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (shapes["params"], shapes["buffers"]["frozen"]))
    assert 0 < trained < 0.02 * held


def test_lora_begins_as_the_backbone_and_adds_products(root):
    config = settings(root)
    facts = finetune.open_split(config, "train").facts
    module, _ = finetune.task_model(config, facts, finetune.backbone(config, facts))
    parted = finetune.meta.unbox(networks.init(module, jax.random.key(0), "lora", 2))
    encoder = parted["buffers"]["frozen"]["encoder"]
    begun = networks.join(parted["params"], parted["buffers"], {}, 4.0)["params"]["encoder"]
    jax.tree.map(np.testing.assert_array_equal, dict(encoder), dict(begun))
    factors = parted["params"]["lora"]["attn_qkv_kernel"]
    factors["up"] = jax.random.normal(jax.random.key(1), factors["up"].shape)
    moved = networks.join(parted["params"], parted["buffers"], {}, 4.0)["params"]["encoder"]["encoder"]["attn"]["qkv"]["kernel"]
    kernel = np.asarray(encoder["encoder"]["attn"]["qkv"]["kernel"])
    expected = kernel[1] + (4 / 2) * (np.asarray(factors["down"][1]) @ np.asarray(factors["up"][1])).reshape(kernel.shape[1:])
    np.testing.assert_allclose(moved[1], expected, rtol=1e-5)


def test_layers_learn_at_decaying_rates():
    params = {
        "encoder": {"encoder": {"norm1": {"scale": np.ones((3, 4))}}, "mod_emb": {"a": np.ones(4)}, "encoder_norm": {"scale": np.ones(4)}},
        "decoder": {"conv": {"kernel": np.ones(4)}},
    }
    found = networks.rates(params, 3, 0.5)
    np.testing.assert_allclose(np.ravel(found["encoder"]["encoder"]["norm1"]["scale"]), [0.125, 0.25, 0.5])
    assert found["encoder"]["mod_emb"]["a"] == 0.0625
    assert found["encoder"]["encoder_norm"]["scale"] == found["decoder"]["conv"]["kernel"] == 1


@pytest.mark.parametrize(("depth", "layers"), [(12, (2, 5, 8, 11)), (24, (5, 11, 17, 23))])
def test_layers_are_evenly_spaced(root, depth, layers):
    config = settings(root, model=dict(layers=(), decoder="unet"))
    assert decoder_config(config, finetune.open_split(config, "train").facts, depth, "float32").layers == layers


def test_early_stopping_lowers_the_rate_and_keeps_the_best(root, tmp_path, monkeypatch):
    """Validations that only become worse: the rate falls, the run ends, and what is loaded is of the first; the same after a restart."""
    told = iter(np.arange(1.0, 20))
    monkeypatch.setattr(validation, "summarize", lambda facts, sums: {"loss": next(told)})
    changes = dict(train=dict(stop_after=3, steps=100), run=dict(eval_every=1, checkpoint_every=1))
    config = settings(root, optimizer=dict(schedule="plateau", plateau_patience=0), **changes)
    assert finetune.train(config, tmp_path)["step"] == 4
    rates = [line["learning_rate"] for line in logging.read(tmp_path) if "learning_rate" in line]
    np.testing.assert_allclose(rates, [1e-2, 1e-2, 5e-3, 2.5e-3], rtol=1e-6)
    assert finetune.train(config, tmp_path)["step"] == 4
    assert finetune.checkpoint.saved(tmp_path / "best").latest() == 1


@pytest.mark.slow
def test_a_unet_with_both_modalities_and_dropped_ones(root, tmp_path, monkeypatch):
    """BatchNorm's statistics are kept, and more devices, here eight, give what one does."""
    model = dict(modalities=(), decoder="unet", layers=(0, 1, 0, 1), channels=(8, 8, 8, 8), modality_drop_rate=0.5)
    config = settings(root, model=model, mesh=dict(fsdp=2), train=dict(steps=2), run=dict(eval_every=2))
    finetune.train(config, tmp_path / "eight")
    statistics = finetune.load(tmp_path / "eight").variables["batch_stats"]["decoder"]["blocks_0_conv1"]["norm"]
    assert int(statistics["count"]) == 2 and np.asarray(statistics["mean"]).any()
    config.mesh.fsdp = 1
    monkeypatch.setattr(sharding, "make_mesh", partial(sharding.make_mesh, devices=jax.devices()[:1]))
    finetune.train(config, tmp_path / "one")
    np.testing.assert_allclose(losses(tmp_path / "eight"), losses(tmp_path / "one"), rtol=1e-4)
    ours, theirs = (
        np.asarray(finetune.load(tmp_path / run).variables["batch_stats"]["decoder"]["blocks_3_conv2"]["norm"]["mean"])
        for run in ("eight", "one")
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_step_in_bfloat16_at_decaying_rates(root, tmp_path, finished):
    """AdamW's first step moves each parameter by its rate: that of the decoder, half of it in the last layer, a quarter in the first."""
    changes = dict(model=dict(dtype="bfloat16"), optimizer=dict(layer_decay=0.5, weight_decay=0.0), run=dict(eval_every=1))
    config = settings(root, train=dict(steps=1), **changes)
    finetune.train(config, tmp_path)
    assert losses(tmp_path)[0] != losses(finished)[0]
    np.testing.assert_allclose(losses(tmp_path)[0], losses(finished)[0], rtol=0.02)
    facts = finetune.open_split(config, "train").facts
    module, _ = finetune.task_model(config, facts, finetune.backbone(config, facts))
    drawn = finetune.meta.unbox(jax.jit(lambda key: networks.init(module, key))(jax.random.key(0)))["params"]
    after = finetune.load(tmp_path).variables["params"]
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)), after, drawn)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(after))
    layers = moved["encoder"]["encoder"]["attn"]["qkv"]["kernel"]
    for found, factor in ((layers[0], 0.25), (layers[1], 0.5), (moved["decoder"]["conv"]["kernel"], 1.0)):
        np.testing.assert_allclose(found.max(), 1e-2 * factor, rtol=1e-3)


def test_predict_writes_maps_where_the_input_lies(finished, root, tmp_path):
    """The command, from the work directory alone; windows of 32 pixels, of which two neighbours share 16, are blended."""
    dataset = datasets.load("sen1floods11", root, "val")
    path = dataset.samples[0].inputs["S1GRD"]
    assert cli.main(["predict", f"--weights={finished}", f"--input=S1GRD={path}", f"--out={tmp_path}"]) == 0
    made = geo.read(next(tmp_path.glob("*.tif")))
    assert made.dtype == np.uint8 and geo.same_grid(made.place, geo.place(path))
    task = finetune.load(finished)
    radar, total = dataset[0]["inputs"]["S1GRD"], np.zeros((SIZE, SIZE, 2), np.float32)
    for top, left in np.ndindex(2, 2):
        at = np.s_[16 * top : 16 * top + 32, 16 * left : 16 * left + 32]
        total[at] += windows.weights(32, 16)[..., None] * probabilities(np.asarray(task({"S1GRD": radar[at][None]}))[0])
    expected = total.argmax(-1)
    expected[:2, :2] = 255  # where the radar has no data
    np.testing.assert_array_equal(np.asarray(made)[..., 0], expected)
    header = geo.read_header(next(tmp_path.glob("*.tif")))
    assert header.nodata == 255 and not (tmp_path / "unfinished").exists()
    assert header.tags["classes"] == "land, water" and header.tags["terramind_jax_dtype"] == "float32"
    assert cli.main(["predict", f"--weights={finished}", f"--input=S1GRD={path}", f"--out={tmp_path}"]) == 2
    with pytest.raises(ValueError, match="The model takes S1GRD; S2L1C is given."):
        predict.run(finished, {"S2L1C": path}, tmp_path / "other")


def test_predict_goes_on_where_it_was_stopped(finished, root, tmp_path, monkeypatch):
    """Two rows of windows, of which only one is written before a Ctrl-C; a side is no multiple of 16."""
    radar = datasets.load("sen1floods11", root, "val")[0]["inputs"]["S1GRD"]
    geo.write(tmp_path / "scene.tif", radar[:45, :41], modality="S1GRD")
    inputs, write, rows = {"S1GRD": tmp_path / "scene.tif"}, writing.write_rows, []
    (whole,) = predict.run(finished, inputs, tmp_path / "whole")

    def stop_at_the_second(path, row, pixels):
        rows.append(row)
        if len(rows) == 2:
            raise KeyboardInterrupt
        write(path, row, pixels)

    monkeypatch.setattr(writing, "write_rows", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        predict.run(finished, inputs, tmp_path / "parts")
    (parts,) = predict.run(finished, inputs, tmp_path / "parts")
    assert rows == [0, 16, 16] and geo.read(parts).shape == (45, 41, 1)
    np.testing.assert_array_equal(np.asarray(geo.read(parts)), np.asarray(geo.read(whole)))


def test_predict_says_of_a_scene_that_it_has_no_crs(finished, root, tmp_path, capsys):
    radar = datasets.load("sen1floods11", root, "val")[0]["inputs"]["S1GRD"]
    geo.write(tmp_path / "scene.tif", radar, modality="S1GRD")
    predict.run(finished, {"S1GRD": tmp_path / "scene.tif"}, tmp_path / "out")
    assert "scene: the input does not say where it lies (it has no CRS), so the outputs do not either.\n" in capsys.readouterr().out


@pytest.mark.slow
def test_labels_of_images(tmp_path):
    sample("eurosat", tmp_path / "data", count=2, size=SIZE)
    model = dict(modalities=(), decoder="identity", layers=(1,))
    config = settings(tmp_path / "data", model=model, data=dict(dataset="eurosat"), train=dict(steps=30), run=dict(eval_every=30))
    assert finetune.train(config, tmp_path / "run")["val/pixel_accuracy"] > 0.3
    held_out = datasets.load("eurosat", tmp_path / "data", "val")
    (labels,) = predict.run(tmp_path / "run", held_out.samples[0].inputs, tmp_path / "out")
    expected = predict.label(finetune.load(tmp_path / "run"), held_out[0]["inputs"])
    assert json.loads(labels.read_text()) == {held_out.names[0]: expected}


def test_an_ltae_refuses_single_images(root):
    """In training, and of `predict`, which reads series as the generic data set stores them."""
    config = settings(root, model=dict(time="ltae"))
    dataset = finetune.open_split(config, "train")
    module, _ = finetune.task_model(config, dataset.facts, finetune.backbone(config, dataset.facts))
    images = {"S1GRD": np.zeros((1, 32, 32, 2), np.float32)}
    with pytest.raises(ValueError, match=r"With time='ltae' a model reads time series, .*; its input has the shape \(1, 32, 32, 2\)."):
        jax.eval_shape(lambda key: module.init(key, images), jax.random.key(0))
    with pytest.raises(ValueError, match="S1Hand.tif is one image, and the model takes series: give arrays"):
        predict.open_scene(SimpleNamespace(facts=dataset.facts, crop=32, module=module), "scene", dataset.samples[0].inputs)


def test_a_share_of_the_labels_is_drawn_of_every_stratum(tmp_path):
    """Alike are samples whose classes have the same thirds of what is labelled, a third itself being of the first."""
    of_class = [(16, 0, 0)] * 10 + [(12, 4, 0)] * 5 + [(12, 0, 4)] * 5 + [(10, 3, 2), (8, 4, 4)] * 3 + [(0, 0, 16), (0, 0, 0)]
    for i, counts in enumerate(of_class):
        row = np.repeat(np.int16([0, 1, 2, -1]), [*counts, 16 - sum(counts)])
        geo.write(tmp_path / "images" / f"{i:02d}.tif", np.ones((16, 16, 2), np.float32))
        geo.write(tmp_path / "masks" / f"{i:02d}.tif", np.tile(row, (16, 1)))
    fields = dict(images={"S1GRD": {"folder": "images", "pattern": "*.tif"}}, labels={"folder": "masks", "pattern": "*.tif"}, num_classes=3)
    config = settings(tmp_path, model=dict(modalities=()), data=dict(dataset="generic", crop=16, labels=0.5, strata=3))
    config.data.options = ConfigDict(fields)

    def drawn(seed: int, **data) -> np.ndarray:
        config.train.seed = seed
        config.data.update(data)
        return np.array([int(name) for name in finetune.open_split(config, "train").names])

    half = drawn(0)
    assert [np.isin(range(*of), half).sum() for of in ((0, 10), (10, 15), (15, 20), (20, 26), (26, 27), (27, 28))] == [5, 2, 2, 3, 1, 1]
    assert np.isin(drawn(0, labels=0.1), half).all() and len(drawn(0)) == 6
    assert not np.array_equal(drawn(1, labels=0.5), half)
    assert len(drawn(0, labels=0.1, strata=0)) == 3
    with pytest.raises(ValueError, match="has no strata, as a regression"):
        datasets.strata(dataclasses.replace(finetune.open_split(config, "train"), facts=Facts("heights", "regression", {}, ())), 3)


OPTIONS = {
    "regression": dict(images={"times": 2}, labels={"folder": "maps", "pattern": "*.tif"}, model=dict(decoder="linear", time="ltae")),
    "scalar_regression": dict(labels={"table": "values.csv"}),
    "multilabel": dict(labels={"table": "classes.csv"}, class_names=("smooth", "rough")),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", OPTIONS)
def test_other_tasks(tmp_path, task):
    """Radar that is as bright as it is rough: of pixels from time series through an L-TAE, of images a value, and several labels."""
    own, rng = OPTIONS[task], np.random.default_rng(0)
    levels = {f"{split}{i}": rng.uniform(-1, 1) for split in ("train", "val") for i in range(16 if split == "train" else 8)}
    for name, level in levels.items():
        image = -12 + 6 * level + rng.normal(size=(32, 32, 4 if task == "regression" else 2))
        geo.write(tmp_path / "data/images" / f"{name}.tif", image.astype(np.float32))
        geo.write(tmp_path / "data/maps" / f"{name}.tif", np.full((32, 32), level, np.float32))
    tables = {"values": "value", "classes": "smooth,rough"}
    for table, heading in tables.items():
        label = (lambda x: f"{x}") if table == "values" else (lambda x: f"{x < 0.3:d},{x > -0.3:d}")
        rows = [f"{name},{label(level)}" for name, level in levels.items()]
        (tmp_path / "data" / f"{table}.csv").write_text("\n".join([f"name,{heading}", *rows]))
    for split in ("train", "val"):
        (tmp_path / "data" / f"{split}.txt").write_text("\n".join(name for name in levels if name.startswith(split)))
    images = {"S1GRD": {"folder": "images", "pattern": "*.tif", **own.get("images", {})}}
    options = dict(images=images, labels=own["labels"], task=task, class_names=own.get("class_names", ()))
    model = dict(decoder="identity") | own.get("model", {})
    config = settings(tmp_path / "data", data=dict(dataset="generic"), model=model, train=dict(steps=60), run=dict(eval_every=60))
    config.data.options = ConfigDict({**options, "splits": {s: f"{s}.txt" for s in ("train", "val")}})
    found = finetune.train(config, tmp_path / "run")
    assert found["val/F1"] > 0.85 if task == "multilabel" else found["val/rmse"] < 0.3

    held_out, trained = finetune.open_split(config, "val"), finetune.load(tmp_path / "run")
    (path,) = predict.run(tmp_path / "run", {"S1GRD": tmp_path / "data/images/val0.tif"}, tmp_path / "out")
    expected = np.asarray(trained({"S1GRD": held_out[0]["inputs"]["S1GRD"][None]}))[0]
    if task == "regression":
        np.testing.assert_allclose(np.asarray(geo.read(path))[..., 0], expected, atol=1e-6)
    elif task == "scalar_regression":
        assert json.loads(path.read_text()) == {"val0": pytest.approx(float(expected))}
    else:
        assert json.loads(path.read_text()) == {"val0": [name for name, x in zip(own["class_names"], expected, strict=True) if x > 0]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(data=dict(root="")), "config.data.root is empty"),
        (dict(data=dict(crop=40)), "data.crop=40; expected a multiple of 16"),
        (dict(data=dict(crop=64)), "are 48x48 pixels; data.crop=64 can be at most 48"),
        (dict(data=dict(labels=0.0)), "data.labels=0.0; expected a number above 0"),
        (dict(data=dict(strata=-1)), "data.strata=-1; expected a number of bins"),
        (dict(train=dict(tune="half")), "train.tune='half'; expected one of full, frozen, lora"),
        (dict(train=dict(loss="mse")), "train.loss='mse'; a segmentation has one of ce, dice, focal"),
        (dict(train=dict(class_weights=(1.0, 2.0, 3.0))), "train.class_weights are 3 numbers for the loss ce"),
        (dict(train=dict(batch_size=9)), "train.batch_size=9 must be a multiple of the 8 devices"),
        (dict(model=dict(layers=(7,))), "model.layers are 7; terramind_v1_tiny has layers from 0 to 1"),
        (dict(model=dict(merge_method="dict")), "a decoder needs one of mean, max, concat"),
        (dict(model=dict(time="sum")), "model.time='sum'; expected one of mean, max, concat, diff, ltae"),
        *((dict(model=dict(time=t)), f"Sen1Floods11 has single images; model.time='{t}' is of time series") for t in networks.SERIES),
        (dict(model=dict(name="terramind_v1_tiny_tim", tim_modalities=())), "model.tim_modalities is empty"),
        (dict(model=dict(name="terramind_v1_tiny_tim", tim_modalities=("S3",))), "S3"),
        (dict(optimizer=dict(schedule="linear")), "optimizer.schedule='linear'; expected one of constant"),
    ],
)
def test_configurations_that_cannot_work(root, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        finetune.train(settings(root, **changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_true_colour_is_not_for_fine_tuning(tmp_path):
    """A file of EuroSAT has no S2RGB, which `predict` would be given."""
    config = settings(tmp_path, data=dict(dataset="eurosat"))
    config.data.options = ConfigDict({"rgb": True})
    with pytest.raises(ValueError, match="data.options.rgb is of `evaluate knn`, linear and fewshot alone"):
        finetune.train(config, tmp_path / "run")


def test_differences_are_of_two_images(tmp_path):
    config = configured("multitemporal_crop", tmp_path / "data")
    config.model.update(name="terramind_v1_tiny", weights="random", time="diff")
    with pytest.raises(ValueError, match="model.time='diff' is of two images, and the series of Multi-Temporal Crop .* have 3"):
        finetune.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_labels_of_validation_are_checked_before_the_first_step(tmp_path):
    """A class beyond the last; and a class that validation lacks is told of."""
    sample("sen1floods11", tmp_path / "data", count=4, size=SIZE)
    held_out, config = datasets.load("sen1floods11", tmp_path / "data", "val"), settings(tmp_path / "data", train=dict(steps=1))
    masks = [held_out.samples[i].target for i in range(2)]
    written = [np.asarray(geo.read(path)) for path in masks]
    for path, mask in zip(masks, written, strict=True):
        geo.write(path, np.zeros_like(mask), geo.place(path))
    with pytest.warns(UserWarning, match="No sample of the val split of Sen1Floods11 holds: water."):
        finetune.train(config, tmp_path / "run")
    written[1][0, 0] = 7
    geo.write(masks[1], written[1], geo.place(masks[1]))
    with pytest.raises(ValueError, match=f"{held_out.names[1]} has the label 7, but the 2 classes of Sen1Floods11 are 0-1"):
        finetune.train(config, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_processes_need_the_same_samples(root, tmp_path, monkeypatch):
    """In their order; the data may lie elsewhere on another machine."""
    seen = []

    class Asked(Exception):
        pass

    def ask(contents):
        seen.append(contents)
        raise Asked

    monkeypatch.setattr(finetune.loop.processes, "check_agreement", ask)
    shutil.copytree(root, tmp_path / "elsewhere")
    names = tmp_path / "elsewhere/v1.1/splits/flood_handlabeled/flood_valid_data.csv"
    for lines in (slice(None), slice(1, None)):
        names.write_text("\n".join(names.read_text().splitlines()[lines]))
        for place in (root, tmp_path / "elsewhere"):
            with pytest.raises(Asked):
                finetune.train(settings(place), tmp_path / "run")
    assert seen[0] == seen[1] == seen[2] and list(seen[0]) == ["configuration", "list of train samples", "list of val samples"]
    assert {name for name in seen[3] if seen[3][name] != seen[2][name]} == {"list of val samples"}


def test_thinking_needs_all_bands(tmp_path):
    sample("burnscars", tmp_path / "data", count=1, size=SIZE)
    model = dict(name="terramind_v1_tiny_tim", modalities=())
    with pytest.raises(ValueError, match="terramind_v1_tiny_tim reads all bands of S2L2A, and the data set has BLUE, GREEN, RED"):
        finetune.train(settings(tmp_path / "data", data=dict(dataset="burnscars"), model=model), tmp_path / "run")


def test_statistics_of_xview2_are_in_the_order_of_its_bands():
    """PANGAEA's are of an image whose first band is blue."""
    config = configuration.load("configs/finetune/xview2.py")
    facts = datasets.facts("generic", **config.data.options.to_dict())
    published = {"BLUE": (66.7703, 48.3066), "GREEN": (88.4452, 51.9129), "RED": (85.1047, 62.7612)}
    for when, (mean, std) in finetune.scale_of(config, facts).items():
        np.testing.assert_allclose(list(zip(mean, std, strict=True)), [published[band] for band in facts.bands[when]], rtol=1e-6)


def configured(name, folder):
    """A file of ``configs/finetune``, and a copy of its data set in `folder`."""
    sample(name, folder, count=2, size=SIZE)
    return configuration.load(f"configs/finetune/{name}.py", [f"--config.data.root={folder}", "--config.data.crop=32"])


CONFIGURED = sorted(path.stem for path in Path("configs/finetune").glob("*.py"))


@pytest.mark.parametrize("name", CONFIGURED)
def test_configuration_files(name, tmp_path):
    """Each reads its data set as `data sample` makes it."""
    config = configured(name, tmp_path / "data")
    check(config)
    assert configuration.command_of(config) == "finetune"
    published = config.data.options.get("splits") or datasets.SPLITS  # crops have no test split
    splits = [finetune.open_split(config, split) for split in published]
    facts = splits[0].facts
    assert len({sample for of in splits for sample in of.names}) == sum(map(len, splits)) >= 3
    assert finetune.scale_of(config, facts).keys() == splits[-1][0]["inputs"].keys() == facts.bands.keys()
    assert finetune.backbone_options(config, facts)["modalities"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURED)
def test_configurations_train(name, tmp_path):
    """Each takes a step and validates, here with the nano model and a narrow decoder."""
    config = configured(name, tmp_path / "data")
    narrow = {"unet": (16, 8, 8, 8), "upernet": (16,)}.get(config.model.decoder, ())
    config.model.update(name="terramind_v1_tiny", weights="random", layers=(0, 0, 1, 1), channels=narrow)
    config.train.update(steps=1, batch_size=8)
    config.run.update(log_every=1, progress=False, tensorboard=False)
    found = finetune.train(config, tmp_path / "run")
    assert np.isfinite(found["loss"]) and config.train.monitor in found


def test_the_validation_of_ai4smallfarms_may_be_called_val(tmp_path):
    config = configured("ai4smallfarms", tmp_path / "data")
    names = finetune.open_split(config, "val").names
    folder = tmp_path / "data" / "sentinel-2-asia"
    (folder / "validate").rename(folder / "val")
    assert finetune.open_split(config, "val").names == names


def test_a_month_of_biomassters(tmp_path):
    """Without the cloud probability, the descending orbit and marks of no data; in hundreds of tonnes."""
    tmp_path = tmp_path / "data"
    config = configured("biomassters", tmp_path)
    numbers = [int(chip, 16) for chip in finetune.open_split(config, "train").names]
    assert {number % 2 for number in numbers} == {0, 1}
    for number in numbers:  # of the month before, every second chip has no optical image
        assert (tmp_path / f"train_features/{number:08x}_S2_08.tif").exists() == bool(number % 2)
    (chip,), (read,) = (dataset := finetune.open_split(config, "val")).names, dataset
    optical, radar = (geo.read(tmp_path / f"train_features/{chip}_{kind}_09.tif") for kind in ("S2", "S1"))
    np.testing.assert_array_equal(read["inputs"]["S2L2A"], optical[..., :10])
    assert (radar[:2, :2] == -9999).all() and not read["inputs"]["S1GRD"][:2, :2].any()
    np.testing.assert_array_equal(read["inputs"]["S1GRD"][2:], radar[2:, :, :2])
    np.testing.assert_allclose(read["target"], geo.read(tmp_path / f"train_agbm/{chip}_agbm.tif")[..., 0] / 100, rtol=1e-6)


def test_buildings_of_xview2(tmp_path):
    """Two pictures, red first, and the damage that the later one shows."""
    tmp_path = tmp_path / "data"
    read = finetune.open_split(configured("xview2", tmp_path), "val")[0]
    assert not list(tmp_path.rglob("*.xml"))
    for when in ("pre", "post"):
        np.testing.assert_array_equal(read["inputs"][when], geo.read(tmp_path / f"hold/images/{read['name']}_{when}_disaster.png"))
    darker, damage = (read["inputs"]["pre"] - read["inputs"]["post"]).mean(-1), read["target"]
    assert set(np.unique(damage)) == set(range(5)) and (darker[damage == 4] > 60).all() and not darker[damage < 2].any()
