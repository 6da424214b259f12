"""The tokenizer loop: it learns, keeps an average, measures itself in physical units, and continues with the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from terramind_jax import checkpoint
from terramind_jax import tokenizer as networks
from terramind_jax.train import logging, meter, tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_run.write_shards(tmp_path_factory.mktemp("shards"), tokens=False)


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """The work directory of a finished run on DEM."""
    workdir = tmp_path_factory.mktemp("finished")
    tokenizer.train(tiny_run.tokenizer_training(root), workdir)
    return workdir


def losses(workdir) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in logging.read(workdir) if "loss" in line]


def test_a_run_learns_and_reports(finished):
    lines = logging.read(finished)
    assert losses(finished)[-1][1] < 0.7 * losses(finished)[0][1]
    assert {"images_per_second", "mfu", "codes_in_batch"} <= lines[-2].keys()
    assert 0 < lines[-1]["val/codes"] <= 1
    assert 1 <= lines[-1]["val/perplexity"] <= 16
    assert lines[-1]["val/rmse"] < 1000


def test_load_gives_the_averaged_weights(finished):
    module, variables = tokenizer.load(finished)
    assert module.apply(variables, np.zeros((2, 32, 32, 1), np.float32), method="encode").shape == (2, 2, 2)
    trees = checkpoint.Checkpoints(finished)
    assert trees.items() == {"params", "buffers", "opt_state", "ema"}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), variables["params"])
    saved, _ = trees.restore({"params": shapes, "ema": shapes})
    trees.close()
    jax.tree.map(np.testing.assert_array_equal, variables["params"], saved["ema"])
    assert not np.array_equal(saved["ema"]["quant_proj"]["kernel"], saved["params"]["quant_proj"]["kernel"])


def test_class_maps(root, tmp_path):
    last = tokenizer.train(tiny_run.tokenizer_training(root, "LULC"), tmp_path)
    assert losses(tmp_path)[-1][1] < losses(tmp_path)[0][1]
    assert 0 <= last["val/accuracy"] <= 1
    module, variables = tokenizer.load(tmp_path)
    assert module.apply(variables, np.zeros((2, 32, 32), np.uint8), method="encode").shape == (2, 2, 2)


def test_rmse_is_in_the_modalitys_unit():
    """A reconstruction that is off by one standard deviation everywhere is off by 951 metres."""
    config = networks.TokenizerConfig("DEM", 1, levels=(4, 4), dim=32, depth=1, num_heads=2, image_size=32)
    module = networks.Tokenizer(config)

    class Fixed:
        def __init__(self):
            self.config = config

        def apply(self, variables, image):
            return image + 1.0, jnp.zeros((*image.shape[:1], 2, 2, 2))

    batch = {"image": jnp.full((3, 32, 32, 1), 500, jnp.int16), "bad": jnp.array([False, False, True])}
    sums = tokenizer.errors(Fixed(), None, None, batch)
    result = tokenizer.validate(lambda _: sums, iter([batch]), 1, module.config)
    assert result["val/rmse"] == pytest.approx(951.272, rel=1e-5)
    assert result["val/loss"] == pytest.approx(1.0)
    assert result["val/codes"] == 1 / 16
    assert result["val/perplexity"] == pytest.approx(1.0)


def test_unreadable_images_weigh_nothing(finished):
    module, variables = tokenizer.load(finished)
    image = np.random.default_rng(0).integers(0, 3000, (2, 32, 32, 1)).astype(np.int16)
    loss = jax.jit(lambda image, bad: tokenizer.loss(module, variables["params"], variables["buffers"], {"image": image, "bad": bad})[0])
    image_of_zeros = np.stack([image[0], np.zeros_like(image[0])])
    assert float(loss(image, np.array([False, True]))) == pytest.approx(float(loss(image_of_zeros, np.array([False, True]))), rel=1e-6)
    assert float(loss(image, np.array([True, True]))) == 0


def test_a_killed_run_continues_with_the_same_numbers(root, finished, tmp_path, monkeypatch):
    add = meter.Meter.add

    def failing(self, step, metrics, waited):
        add(self, step, metrics, waited)
        if step == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(meter.Meter, "add", failing)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.train(tiny_run.tokenizer_training(root), tmp_path)
    monkeypatch.undo()
    tokenizer.train(tiny_run.tokenizer_training(root), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, tokenizer.load(tmp_path)[1], tokenizer.load(finished)[1])
    assert losses(tmp_path) == losses(finished)


def test_what_cannot_work_is_one_sentence(root, tmp_path):
    with pytest.raises(ValueError, match="S2RGB has no tokenizer; tokenizers exist for S2L2A"):
        tokenizer.train(tiny_run.tokenizer_training(root, "S2RGB"), tmp_path)
    with pytest.raises(FileNotFoundError, match="No samples"):
        tokenizer.train(tiny_run.tokenizer_training(root, "NDVI"), tmp_path)
    with pytest.raises(ValueError, match="one of pretrain; train-tokenizer takes those in configs/tokenizer"):
        tokenizer.train(tiny_run.pretraining(root), tmp_path)
    config = tiny_run.tokenizer_training(root)
    config.train.batch_size = 9
    with pytest.raises(ValueError, match=r"train\.batch_size=9 must be a multiple of the 8 devices"):
        tokenizer.train(config, tmp_path)
    config = tiny_run.tokenizer_training(root)
    config.model.decoder = "unet"
    with pytest.raises(ValueError, match="model.decoder is 'unet'; only tokenizers with the decoder 'vit' can be trained"):
        tokenizer.train(config, tmp_path)
    for field, value, message in (
        ("run.keep", 0, r"run\.keep=0; expected at least 1"),
        ("model.dtype", "float17", r"model\.dtype='float17'; expected one of auto"),
        ("data.image_size", 64, "Tiles of DEM are 48x48 pixels, smaller than image_size 64"),
    ):
        config = tiny_run.tokenizer_training(root)
        group, name = field.split(".")
        config[group][name] = value
        with pytest.raises(ValueError, match=message):
            tokenizer.train(config, tmp_path)
    assert not list(tmp_path.iterdir())
