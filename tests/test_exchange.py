"""Whole fine-tuned models in TerraTorch's names, there and back, and its configurations as ours."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import nano_models
import numpy as np
import pytest

from terramind_jax import build, cli, geo
from terramind_jax.convert import files, rules
from terramind_jax.tasks import config as fields
from terramind_jax.tasks import convert, datasets, exchange, finetune, predict, terratorch
from terramind_jax.tasks.datasets import multitemporal_crop
from terramind_jax.tasks.samples import sample

CONFIGURATIONS = Path(__file__).parent / "configurations"
YAML = (CONFIGURATIONS / "floods.yaml").read_text()


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    nano_models.shrink(monkeypatch, "tiny")


@pytest.fixture
def path(tmp_path):
    (tmp_path / "floods.yaml").write_text(YAML)
    return tmp_path / "floods.yaml"


def random_state(config, facts):
    """What TerraTorch's model of this configuration would hold, random."""
    extractor = finetune.backbone(config, facts)
    (module, _), rng = finetune.task_model(config, facts, extractor), np.random.default_rng(0)
    abstract = finetune.meta.unbox(jax.eval_shape(lambda key: module.init(key, method="everything"), jax.random.key(0)))
    shapes = rules.shapes(abstract, convert.model_rules(module))
    counts = [name for name in shapes if name.endswith("num_batches_tracked")]
    state = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return state | {name: np.array(3, np.int64) for name in counts}


def test_a_configuration_of_terratorch(path):
    config, rest = terratorch.read(path)
    fields.check(config)
    assert config.model.modalities == ("S2L1C", "S1GRD") and config.model.weights == "random" and config.model.merge_method == "max"
    assert (config.model.layers, config.model.channels, config.model.pyramid) == ((0, 1, 0, 1), (16, 16, 8, 8), True)
    assert (config.train.tune, config.train.loss, config.train.epochs, config.train.batch_size) == ("frozen", "dice", 3, 4)
    assert (config.train.monitor, config.train.stop_after, config.train.seed) == ("val/mIoU", 9, 7)
    assert (config.optimizer.learning_rate, config.optimizer.clip_norm, config.optimizer.plateau_factor) == (2e-5, 1.0, 0.5)
    assert config.data.d4 and config.data.crop == 0 and config.optimizer.decay_norms
    facts = _facts(config)
    assert facts.class_names == ("Others", "Flood") and facts.ignore_index == -1 and len(facts.bands["S2L1C"]) == 13
    assert facts.mean["S1GRD"] == (-12.0, -20.0)
    assert config.data.options.images.S1GRD.folder.val == "floods/val/s1" and config.data.options.splits.val == "floods/val.txt"
    told = "\n".join(rest)
    assert "trainer.accumulate_grad_batches=4" in rest and "train_transform=ColorJitter" in told and "16-mixed" in told
    assert "ReduceLROnPlateau.monitor=val/loss: val/mIoU here" in rest
    assert len(rest) == 4, rest


# Files with the keys of those of the TerraMind repository: which one is changed how, and what is read of it.
TIM = "_tim\n      backbone_tim_modalities: [DEM]"
REPOSITORY = {
    "burnscars": ("burnscars", {}, dict(modalities=("S2L2A",), merge_method="mean"), 6),
    "multitemporal_crop": ("multitemporal_crop", {}, dict(modalities=("S2L2A",), time="concat", times=3), 6),
    "sen1floods11": ("sen1floods11", {}, dict(name="terramind_v1_tiny", weights="hub", modalities=("S2L1C", "S1GRD")), 13),
    "tim_lulc_sen1floods11": (
        "sen1floods11",
        {
            "backbone: terramind_v1_tiny": f"backbone: terramind_v1_tiny{TIM}",
            "    no_data": "    allow_substring_file_names: true\n    no_data",
        },
        dict(name="terramind_v1_tiny_tim", tim_modalities=("DEM",)),
        13,
    ),
    "frozen": ("sen1floods11", {"freeze_backbone: false": "freeze_backbone: true"}, dict(channels=(16, 16, 8, 8)), 13),
}


@pytest.mark.parametrize("name", REPOSITORY)
def test_the_configurations_of_the_terramind_repository(tmp_path, name):
    """Nothing of theirs is left but the precision, and a model of its own shapes can be made."""
    file, changes, model, bands = REPOSITORY[name]
    text = (CONFIGURATIONS / f"{file}.yaml").read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "a.yaml").write_text(text)
    config, rest = terratorch.read(tmp_path / "a.yaml")
    fields.check(config)
    assert rest == ["trainer.precision=16-mixed: bfloat16 here, on accelerators"]
    assert {field: config.model[field] for field in model} == model and config.model.head_dropout == 0.2
    assert config.train.tune == ("frozen" if name == "frozen" else "full")
    assert config.train.loss == ("ce" if name == "multitemporal_crop" else "dice")
    assert config.data.d4 and config.data.statistics == "dataset" and config.optimizer.plateau_patience == 3
    facts = _facts(config).only(config.model.modalities)
    (_, first), *_ = facts.bands.items()
    assert len(first) == bands and facts.ignore_index == -1 and facts.num_classes == (13 if name == "multitemporal_crop" else 2)
    assert facts.has_times == (name == "multitemporal_crop") and finetune.scale_of(config, facts).keys() == facts.bands.keys()
    assert random_state(config, facts)["decoder.decoder.blocks.0.conv1.0.weight"].shape[0] == 16


@pytest.mark.slow
def test_crops_of_three_images_are_trained_and_predicted(tmp_path):
    """From the file to a map: features of three images side by side, classes that count from 1, what is not known left out."""
    sample("multitemporal_crop", tmp_path / "crops", count=8, size=48)
    config, _ = terratorch.read(CONFIGURATIONS / "multitemporal_crop.yaml")
    config.data.root = str(tmp_path)
    config.train.update(batch_size=8, steps=2)
    config.run.update(progress=False, tensorboard=False, log_every=1)
    dataset = finetune.open_split(config, "train")
    read = dataset[0]
    assert dataset.class_names[2] == "corn" and read["inputs"]["S2L2A"].shape == (3, 48, 48, 6)
    stored = geo.read_valid(dataset.samples[0].inputs["S2L2A"], range(18), "crops")
    np.testing.assert_array_equal(read["inputs"]["S2L2A"][1, ..., 3], stored[..., 6 + 3])  # all bands of a day together
    mask = geo.read_valid(dataset.samples[0].target, ("label",), "a mask")[..., 0]
    assert mask.min() == 0 and mask.max() > 1
    np.testing.assert_array_equal(read["target"], mask - 1)
    with pytest.raises(ValueError, match="model.times=2, but the series of Multi-Temporal Crop Classification have 3 images"):
        config.model.times = 2
        finetune.train(config, tmp_path / "run")
    config.model.times = 0  # those that there are
    found = finetune.train(config, tmp_path / "run")
    assert np.isfinite(found["loss"]) and np.isfinite(found["val/loss"])
    task = finetune.load(tmp_path / "run")
    assert task.module.times == 3
    path = datasets.load("generic", tmp_path, "val", **multitemporal_crop.options("crops")).samples[0].inputs["S2L2A"]
    (made,) = predict.run(tmp_path / "run", {"S2L2A": path}, tmp_path / "out")
    assert np.asarray(geo.read(made)).shape[:2] == (48, 48) and geo.same_grid(geo.place(made), geo.place(path))
    with pytest.raises(ValueError, match="joins the features of 3 images, and its input is a series of 2"):
        task({"S2L2A": read["inputs"]["S2L2A"][None, :2]})


ALL_CLASSES = "    class_names: [wild, forest, corn, soy, wet, built, water, wheat, alfalfa, fallow, cotton, sorghum, other]\n"


def crops(path, *changes):
    """`terratorch.read` of the configuration of crops with changes, each the old text and the new."""
    text = (CONFIGURATIONS / "multitemporal_crop.yaml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return terratorch.read(path)


def test_crops_without_data_are_a_class_if_zero_is_not_reduced(path):
    config, rest = crops(path, ("zero_label: true", "zero_label: false"), ("num_classes: 13", "num_classes: 14"), (ALL_CLASSES, ""))
    assert _facts(config).class_names == ("No Data", *multitemporal_crop.CLASSES) and len(rest) == 1


def test_crops_are_series_whatever_is_told(path):
    config, rest = crops(path, ("expand_temporal_dimension: true", "expand_temporal_dimension: false"))
    assert _facts(config).has_times and "data.init_args.expand_temporal_dimension=False: series of images here" in rest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("num_classes: 13", "num_classes: 14"), (ALL_CLASSES, "")], "14 classes; .* has 13, 0, no data, not among them"),
        ([("zero_label: true", "zero_label: false")], "13 classes; .* has 14, 0, no data, among them"),
        ([("    reduce_zero", "    bands: [BLUE, NIR]\n    reduce_zero")], "hold the bands BLUE, GREEN, RED, .*; NIR is none of them"),
    ],
)
def test_crops_of_other_classes_or_bands_are_refused(path, changes, message):
    with pytest.raises(ValueError, match=message):
        crops(path, *changes)


@pytest.mark.parametrize(
    ("decoder", "expected", "name", "shape"),
    [
        (
            "UperNetDecoder\n      decoder_pool_scales: [1, 2]",
            dict(channels=(256,), pool_scales=(1, 2)),
            "decoder.bottleneck.conv",
            (256, 64 + 2 * 256),
        ),
        ("FCNDecoder\n      decoder_num_convs: 2\n      decoder_channels: 16", dict(num_convs=2), "decoder.convs.1.1", (16, 16)),
        (
            "LinearDecoder\n      decoder_upsampling_size: 8\n      decoder_num_classes: 5",
            dict(upsampling=8, channels=(5,)),
            "decoder.conv",
            (64, 5, 8, 8),
        ),
        ("LinearDecoder\n      decoder_upsampling_size: 8\n      decoder_num_classes: 5", {}, "head.head.2", (2, 5, 1, 1)),
    ],
)
def test_sizes_of_decoders(path, decoder, expected, name, shape):
    """What is not told has TerraTorch's defaults."""
    path.write_text(YAML.replace("UNetDecoder\n      decoder_channels: [16, 16, 8, 8]\n      head_dropout: 0.2", decoder))
    config, rest = terratorch.read(path)
    assert {field: config.model[field] for field in expected} == expected and config.model.head_dropout == 0
    assert not [line for line in rest if "decoder" in line]
    state = random_state(config, _facts(config))
    assert state[f"{name}.weight"].shape[: len(shape)] == shape and "decoder.convs.2.1.weight" not in state


def test_series_of_a_generic_data_module(path):
    """How many images a file has is known from the transforms, or from the wrapper; whose order, from a field."""
    series = YAML.replace("label_grep", "expand_temporal_dimension: true\n    temporal_channel_major: true\n    label_grep")
    path.write_text(series)
    config, rest = terratorch.read(path)
    assert "data.init_args.expand_temporal_dimension=True" in rest and not _facts(config).has_times
    unflatten = "      - {class_path: UnflattenTemporalFromChannels, init_args: {n_timesteps: 4}}\n      - class_path: ToTensorV2"
    path.write_text(series.replace("      - class_path: ToTensorV2", unflatten))
    config, rest = terratorch.read(path)
    assert len(rest) == 4 and all(how.times == 4 and how.by_band for how in _facts(config).files.values())
    path.write_text(YAML.replace("backbone: terramind_v1_tiny", "backbone: terramind_v1_tiny\n      backbone_temporal_pooling: keep"))
    assert len(terratorch.read(path)[1]) == 4  # without the wrapper it is nothing
    path.write_text(path.read_text().replace("_pooling: keep", "_pooling: keep\n      backbone_use_temporal: true"))
    assert "model.init_args.model_args.backbone_temporal_pooling=keep" in terratorch.read(path)[1]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("{monitor: val/mIoU, patience: 9}", "{monitor: val/loss, patience: 9, min_delta: 0.1}", ["EarlyStopping.min_delta=0.1"]),
        ("{monitor: val/mIoU, patience: 9}", "{monitor: val/Jaccard_Index, patience: 9}", ["EarlyStopping.monitor=val/Jaccard_Index"]),
        (
            "class_path: ReduceLROnPlateau\n  init_args: {monitor: val/loss, factor: 0.5, patience: 5}",
            "class_path: CosineAnnealingLR\n  init_args: {T_max: 2}",
            ["lr_scheduler.T_max=2: the whole run, 3 epochs, here"],
        ),
    ],
)
def test_what_is_told_of_schedules_and_ends(path, old, new, told):
    plain = {"trainer.accumulate_grad_batches=4", "data.init_args.train_transform=ColorJitter"}
    path.write_text(YAML.replace(old, new))
    rest = [text for text in terratorch.read(path)[1] if text not in plain and "16-mixed" not in text]
    assert [text.removeprefix("trainer.callbacks.") for text in rest] == told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is no YAML file"),
        ("a: 1", "is no configuration of a fine-tuning with TerraTorch"),
        (YAML.replace("SemanticSegmentationTask", "ReconstructionTask"), "is of ReconstructionTask; known are SemanticSegmentationTask"),
        (YAML.replace("backbone: terramind_v1_tiny", "backbone: prithvi"), "The backbone is 'prithvi'; only TerraMind's"),
        (YAML.replace("backbone_modalities: [S2L1C, S1GRD]", "backbone_modalities: [S2L1C, coords]"), "has coords, which TerraTorch's"),
        (YAML.replace("UNetDecoder", "LinearDecoder"), "LinearDecoder lacks decoder_num_classes, without which"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        terratorch.read(tmp_path / "a.yaml")


def test_the_command_tells_what_has_no_equivalent(path, tmp_path, capsys):
    assert cli.main(["finetune", f"--config={path}", f"--workdir={tmp_path / 'run'}", "--config.data.root=nowhere"]) == 2
    told = capsys.readouterr().err
    assert "no equivalent: trainer.accumulate_grad_batches=4" in told and "There is no split file nowhere/floods/train.txt" in told
    assert not (tmp_path / "run").exists()


def test_models_come_and_go_with_every_byte(path, tmp_path, capsys):
    """A task's file becomes a work directory, and that the same file again; what is not a model's is left out."""
    config, _ = terratorch.read(path)
    state = random_state(config, _facts(config))
    loss = {"criterion.weight": np.ones(2, np.float32)}
    files.write(tmp_path / "theirs.safetensors", {**{f"model.{name}": x for name, x in state.items()}, **loss})
    assert cli.main(["convert", str(tmp_path / "theirs.safetensors"), str(tmp_path / "run"), f"--config={path}"]) == 0
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "ours.safetensors")]) == 0
    made = files.read(tmp_path / "ours.safetensors")
    assert made.keys() == state.keys()
    for name, x in state.items():
        np.testing.assert_array_equal(made[name], x, err_msg=name)
    assert json.loads((tmp_path / "run" / "task.json").read_text())["facts"]["class_names"] == ["Others", "Flood"]

    state.pop("head.head.2.bias")
    files.write(tmp_path / "part.safetensors", state)
    assert cli.main(["convert", str(tmp_path / "part.safetensors"), str(tmp_path / "other"), f"--config={path}"]) == 2
    assert "1 missing (head.head.2.bias)" in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert cli.main(["convert", str(tmp_path / "part.safetensors"), str(tmp_path / "run"), f"--config={path}"]) == 2


def test_a_run_from_before_a_field_and_a_value_that_is_none(path, tmp_path):
    """A work directory whose configuration lacks newer fields is read with their defaults; an import is checked as a training is."""
    config, _ = terratorch.read(path)
    files.write(tmp_path / "theirs.safetensors", random_state(config, _facts(config)))
    exchange.import_model(tmp_path / "theirs.safetensors", tmp_path / "run", config)
    told = json.loads((tmp_path / "run/config.json").read_text())
    for field in ("times", "pool_scales", "num_convs", "upsampling", "linear_after_pool"):
        del told["model"][field]
    (tmp_path / "run/config.json").write_text(json.dumps(told))
    assert finetune.load(tmp_path / "run").module.config.pool_scales == (1, 2, 3, 6)
    config.model.time = "sum"
    with pytest.raises(ValueError, match="model.time='sum'; expected one of mean, max, concat, diff, ltae"):
        exchange.import_model(tmp_path / "theirs.safetensors", tmp_path / "other", config)


def test_checkpoints_of_lightning(path, tmp_path):
    """Of several entries the state dict is read; one with objects in it is not."""
    torch = pytest.importorskip("torch")
    config, _ = terratorch.read(path)
    state = {f"model.{n}": torch.from_numpy(np.array(x)) for n, x in random_state(config, _facts(config)).items()}
    torch.save({"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 1e-4}, "optimizer_states": [{}]}, tmp_path / "best.ckpt")
    exchange.import_model(tmp_path / "best.ckpt", tmp_path / "run", config)
    exchange.export(tmp_path / "run", tmp_path / "again.ckpt")
    again = torch.load(tmp_path / "again.ckpt", weights_only=True)
    assert again["state_dict"].keys() == state.keys() and "pytorch-lightning_version" in again
    for name, x in state.items():
        assert torch.equal(again["state_dict"][name], x), name
    torch.save({"state_dict": state, "hyper_parameters": {"path": tmp_path}}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"bad.ckpt holds Python objects beside its tensors"):
        exchange.import_model(tmp_path / "bad.ckpt", tmp_path / "other", config)


def _facts(config):
    return datasets.facts("generic", **config.data.options.to_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(time="ltae"), "TerraTorch has no L-TAE"),
        (dict(decoder="upernet_pangaea", channels=(16,)), "TerraTorch has no neck as PANGAEA's"),
    ],
)
def test_what_terratorch_cannot_hold(path, fields, message):
    config, _ = terratorch.read(path)
    config.model.update(fields)
    facts = _facts(config)
    extractor = finetune.backbone(config, facts)
    module, _ = finetune.task_model(config, facts, extractor)
    task = finetune.Task(module, {}, facts, {}, 32, extractor)
    with pytest.raises(ValueError, match=message):
        exchange.to_torch(task)


@pytest.mark.parametrize("head_channels", [(), (16,)])
def test_a_linear_decoder_without_a_head_gets_one_that_changes_nothing(path, head_channels):
    """As a configuration of TerraTorch reads it, whose linear decoders all have a head; layers of a head that is not there do not count."""
    config, _ = terratorch.read(path)
    config.model.update(decoder="linear", channels=(), head_channels=head_channels, pyramid=False)
    facts = _facts(config)
    extractor = finetune.backbone(config, facts)
    module, _ = finetune.task_model(config, facts, extractor)
    own = exchange.from_torch(random_state(config, facts), config, facts)
    state = exchange.to_torch(finetune.Task(module, own, facts, {}, 32, extractor))
    config.model.update(channels=(2,), head_channels=())
    (other, _), theirs = finetune.task_model(config, facts, extractor), exchange.from_torch(state, config, facts)
    features = [np.random.default_rng(i).normal(size=(2, 4, 64)).astype(np.float32) for i in range(4)]
    made, same = (m.apply(variables, features, method="decode") for m, variables in ((module, own), (other, theirs)))
    assert "head" in theirs["params"] and "head" not in own["params"] and made.shape == (2, 32, 32, 2)
    np.testing.assert_allclose(made, same, rtol=1e-6)


def test_series_have_a_wrapper_and_adapters_are_refused(path):
    """TerraTorch's names of a model that reads time series, there and back."""
    config, _ = terratorch.read(path)
    state, facts = random_state(config, _facts(config)), _facts(config)
    wrapped = {name.replace("encoder.", "encoder.encoder.", 1) if name.startswith("encoder.") else name: x for name, x in state.items()}
    assert exchange.reads_series({f"model.{name}": x for name, x in wrapped.items()}) and not exchange.reads_series(state)
    extractor = finetune.backbone(config, facts)
    module, _ = finetune.task_model(config, facts, extractor)
    for has_times, expected in ((False, state), (True, wrapped)):
        found = exchange.from_torch(expected, config, facts)
        task = finetune.Task(module, found, dataclasses.replace(facts, has_times=has_times), {}, 32, extractor)
        assert exchange.to_torch(task).keys() == expected.keys()
    adapted = {name.replace("encoder.", "encoder.base_model.model.", 1): x for name, x in state.items()}
    with pytest.raises(ValueError, match="holds adapters of PEFT; merge them in TerraTorch first"):
        exchange.from_torch(adapted, config, facts)


def test_the_sizes_of_a_pretraining(tmp_path):
    """A network that is no released one, for features and for thinking."""
    sizes = dict(dim=32, encoder_depth=1, num_heads=2, decoder_depth=3, mlp_ratio=2.0)
    model = build.model("terramind_v1_tiny_tim", modalities=["S2L2A"], tim_modalities=["DEM"], sizes=sizes, codebooks={"DEM": 50})
    assert (model.module.config.dim, model.module.config.encoder_depth, model.module.config.mlp_ratio) == (32, 1, 2.0)
    generator = model.generator[0].config
    assert generator.decoder_depth == 3 and [s.vocab_size for s in generator.decoder] == [50]
    with pytest.raises(ValueError, match="There is no size 'width'; known are dim"):
        build.model("terramind_v1_tiny", sizes={"width": 3})
