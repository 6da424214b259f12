"""Fine-tuning in both stacks: the same model, weights, data, order and hyper-parameters give the same losses."""

import copy
import sys
import warnings
from functools import partial
from pathlib import Path

import jax
import numpy as np
import peer
import pytest
import torch
import yaml
from flax.core import meta

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning
    from terratorch import datamodules, tasks
    from terratorch.models import EncoderDecoderFactory
    from terratorch.tasks import segmentation_tasks

from terramind_jax import cli
from terramind_jax.convert import rules
from terramind_jax.tasks import batches, convert, datasets, finetune
from terramind_jax.tasks import model as networks
from terramind_jax.tasks.config import finetuning
from terramind_jax.tasks.datasets import multitemporal_crop
from terramind_jax.tasks.samples import sample
from terramind_jax.train import logging

STEPS, CHANNELS = 30, (32, 16, 16, 8)
CONFIGURATIONS = Path(__file__).parents[1] / "configurations"
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def settings(root):
    config = finetuning()
    config.model.update(name="terramind_v1_tiny", weights="random", channels=CHANNELS, head_dropout=0.0)
    config.data.update(dataset="sen1floods11", root=str(root), crop=32)
    config.optimizer.update(learning_rate=3e-4, schedule="constant", weight_decay=0.3, decay_norms=True)
    config.train.update(batch_size=4, steps=STEPS, loss="dice")
    config.run.update(log_every=1, eval_every=STEPS, checkpoint_every=STEPS, progress=False, tensorboard=False)
    return config


def reference(modalities):
    necks = [{"name": "SelectIndices", "indices": [2, 5, 8, 11]}, {"name": "ReshapeTokensToImage", "remove_cls_token": False}]
    return EncoderDecoderFactory().build_model(
        task="segmentation",
        backbone="terramind_v1_tiny",
        backbone_pretrained=False,
        backbone_modalities=list(modalities),
        necks=[*necks, {"name": "LearnedInterpolateToPyramidal"}],
        decoder="UNetDecoder",
        decoder_channels=list(CHANNELS),
        head_dropout=0.0,
        num_classes=2,
    )


def test_thirty_steps(tmp_path):
    """Ours is the command's; theirs begins with what ours drew, loaded strictly, and in the end holds what ours holds."""
    sample("sen1floods11", tmp_path / "data", count=6, size=48)
    config = settings(tmp_path / "data")
    finetune.train(config, tmp_path / "run")
    ours = [line["loss"] for line in logging.read(tmp_path / "run") if "loss" in line]

    dataset = finetune.open_split(config, "train")
    module, _ = finetune.task_model(config, dataset.facts, finetune.backbone(config, dataset.facts))
    drawn = jax.jit(lambda key: meta.unbox(networks.init(module, key)), compiler_options={"xla_backend_optimization_level": 1})
    parted = drawn(jax.random.key(0))
    own = partial(rules.to_torch, rules=convert.model_rules(module))
    theirs = reference(dataset.facts.bands)
    peer.load_state(theirs, own(networks.join(parted["params"], parted["buffers"], parted["batch_stats"])))
    criterion = segmentation_tasks.init_loss("dice", ignore_index=-1)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=3e-4, weight_decay=0.3)
    stream = batches.training(dataset, finetune.scale_of(config, dataset.facts), crop=32, batch_size=4, d4=True)
    expected = []
    for batch in (next(stream) for _ in range(STEPS)):
        output = theirs.train()({name: peer.nchw(x) for name, x in batch["inputs"].items()}).output
        loss = criterion(output, torch.from_numpy(np.where(batch["valid"], batch["target"], -1)).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert expected[-1] < 0.9 * expected[0]
    np.testing.assert_allclose(ours, expected, atol=1e-3)

    task = finetune.load(tmp_path / "run")
    peer.load_state(theirs, own(task.variables))
    images = finetune.open_split(config, "val")[0]["inputs"]
    cut = {name: x[None, :32, :32] for name, x in images.items()}
    with torch.no_grad():
        scaled = {name: peer.nchw((x - task.scale[name][0]) / task.scale[name][1]) for name, x in cut.items()}
        assert peer.relative_error(task(cut), peer.nhwc(theirs.eval()(scaled).output)) < 1e-4


BACKBONE, PYRAMID = "backbone: terramind_v1_tiny", "        - name: LearnedInterpolateToPyramidal\n"
THINKING = f"{BACKBONE}_tim\n      backbone_tim_modalities: [LULC]\n      backbone_tim_temps: 0.0"
SERIES = f"{BACKBONE}\n      backbone_use_temporal: true\n      backbone_temporal_pooling: max"
CLASSES = "      num_classes: 2\n    loss: dice"
UNET = "UNetDecoder\n      decoder_channels: [16, 16, 8, 8]\n"
CHANGES = {
    "segmentation": {},
    "thinking": {BACKBONE: THINKING},
    "series": {BACKBONE: SERIES},
    "regression": {
        "SemanticSegmentationTask": "PixelwiseRegressionTask",
        CLASSES: "    loss: mse",
        "    class_names: [Others, Flood]\n": "",
    },
    "classification": {
        **{"SemanticSegmentationTask": "ClassificationTask", "loss: dice": "loss: ce", PYRAMID: "", "/label": ".csv"},
        UNET: "IdentityDecoder\n      head_linear_after_pool: true\n",
    },
    "crops": {},
    "upernet": {UNET: "UperNetDecoder\n      decoder_channels: 16\n      decoder_pool_scales: [1, 2]\n"},
    "fcn": {UNET: "FCNDecoder\n      decoder_channels: 16\n      decoder_num_convs: 2\n", PYRAMID: ""},
    "linear": {UNET: "LinearDecoder\n      decoder_upsampling_size: 8\n      decoder_num_classes: 3\n", PYRAMID: ""},
    "land cover": {
        "modalities: [S2L1C, S1GRD]": "modalities: [LULC, S1GRD]",
        **{f"S2L1C: floods/{split}/s2": f"LULC: floods/{split}/cover" for split in ("train", "val")},
        'S2L1C: "*_S2.tif"': 'LULC: "*_LULC.tif"',
    },
    "difference": {BACKBONE: SERIES.replace("max", "diff")},
}
TIMES = {"series": 3, "crops": 3, "difference": 2}
SLOW = ("thinking", "upernet", "fcn", "difference", "land cover")


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CHANGES])
def test_tasks_come_and_go(tmp_path, case):
    """A task's checkpoint, as Lightning writes it, becomes a work directory of equal outputs, and what that exports loads strictly."""
    text = (CONFIGURATIONS / f"{'multitemporal_crop' if case == 'crops' else 'floods'}.yaml").read_text()
    for old, new in CHANGES[case].items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "floods.yaml").write_text(text)
    told = yaml.safe_load(text)["model"]
    options, kind = told["init_args"], getattr(tasks, told["class_path"].rpartition(".")[2])
    task = kind(**copy.deepcopy(options))
    peer.randomize(task.model, seed=2)
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(tmp_path / "best.ckpt")

    assert cli.main(["convert", f"{tmp_path}/best.ckpt", f"{tmp_path}/run", f"--config={tmp_path}/floods.yaml"]) == 0
    ours = finetune.load(tmp_path / "run")
    rng, side = np.random.default_rng(0), 64
    shape = (2, TIMES[case], side, side) if case in TIMES else (2, side, side)
    images = {name: rng.normal(size=(*shape, len(bands))).astype(np.float32) for name, bands in ours.facts.bands.items()}
    images |= {name: rng.integers(10, size=(*shape, 1)).astype(np.float32) for name in images if name == "LULC"}
    theirs = {name: torch.from_numpy(np.moveaxis(x, -1, 1).copy()) for name, x in images.items()}
    with torch.no_grad():
        expected = task.model.eval()(theirs).output
    expected = peer.nhwc(expected) if expected.ndim == 4 else peer.array(expected)
    physical = {name: x * std + mean for name, x in images.items() for mean, std in [ours.scale[name]]}
    assert peer.relative_error(ours(physical), expected) < 1e-3

    assert cli.main(["convert", f"{tmp_path}/run", f"{tmp_path}/again.ckpt"]) == 0
    again = kind.load_from_checkpoint(tmp_path / "again.ckpt", **options, map_location="cpu")
    state = again.model.state_dict()
    for name, x in task.model.state_dict().items():
        if case != "thinking" or "tokenizer." not in name:  # those of what is generated, which we do not hold
            assert torch.equal(state[name], x), name


def test_crops_are_read_alike(tmp_path):
    """The data set of TerraTorch's module from our sample: pixels, classes, splits and statistics."""
    sample("multitemporal_crop", tmp_path, count=2, size=32)
    theirs = datamodules.MultiTemporalCropClassificationDataModule(data_root=str(tmp_path))
    theirs.setup("fit")
    ours = multitemporal_crop.options()
    for split, expected in (("train", theirs.train_dataset), ("val", theirs.val_dataset)):
        dataset = datasets.load("generic", tmp_path, split, **ours)
        assert len(dataset) == len(expected)
        for found, other in zip(dataset, expected, strict=True):
            np.testing.assert_array_equal(np.moveaxis(found["inputs"]["S2L2A"], -1, 0), other["image"])
            np.testing.assert_array_equal(found["target"], other["mask"])
    assert dataset.class_names == expected.class_names
    np.testing.assert_allclose(ours["images"]["S2L2A"]["mean"], theirs.means)
    np.testing.assert_allclose(ours["images"]["S2L2A"]["std"], theirs.stds)


@pytest.mark.slow
def test_benchmark_runs_both_sides(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    sys.modules.pop("finetune", None)
    import finetune as benchmark

    flags = dict(size="tiny", side=32, batch=2, repeats=1)
    ours, theirs = (benchmark.measure(kind, "frozen", **flags) for kind in ("ours", "peer"))
    assert ours["seconds"] > 0 and theirs["seconds"] > 0
    assert ours["trained"] == theirs["trained"]
