"""The tokenizer loop: it learns, keeps an average, measures itself in physical units, and continues with the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from terramind_jax import checkpoint
from terramind_jax import tokenizer as networks
from terramind_jax.train import logging, tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_run.write_shards(tmp_path_factory.mktemp("shards"), tokens=False)


@pytest.mark.parametrize(("modality", "quality"), [("DEM", "val/rmse"), ("LULC", "val/accuracy")])
def test_a_run_learns_and_loads(root, tmp_path, modality, quality):
    config = tiny_run.tokenizer_training(root, modality, steps=60)
    last = tokenizer.train(config, tmp_path)
    lines = [line for line in logging.read(tmp_path) if "loss" in line]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert {"images_per_second", "mfu", "codes_in_batch"} <= lines[-1].keys()
    assert 0 < last["val/codes"] <= 1
    assert 1 <= last["val/perplexity"] <= 16
    assert last[quality] == logging.read(tmp_path)[-1][quality]
    module, variables = tokenizer.load(tmp_path)
    image = np.zeros((2, 32, 32) if modality == "LULC" else (2, 32, 32, 1), np.float32)
    assert module.apply(variables, image, method="encode").shape == (2, 2, 2)
    trees = checkpoint.Checkpoints(tmp_path)
    assert trees.items() == {"params", "buffers", "opt_state", "ema"}


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


def test_unreadable_images_weigh_nothing(root):
    config = networks.TokenizerConfig("DEM", 1, levels=(4, 4), dim=32, depth=1, num_heads=2, image_size=32)
    module = networks.Tokenizer(config)
    variables = jax.tree.map(jnp.asarray, networks.init(module, jax.random.key(0)))
    image = jnp.asarray(np.random.default_rng(0).integers(0, 3000, (2, 32, 32, 1)), jnp.int16)
    one = tokenizer.loss(module, variables["params"], variables["buffers"], {"image": image[:1], "bad": jnp.array([False])})[0]
    two = tokenizer.loss(module, variables["params"], variables["buffers"], {"image": image, "bad": jnp.array([False, True])})[0]
    assert float(one) == pytest.approx(float(two), rel=1e-5)


def test_a_stopped_run_continues_with_the_same_numbers(root, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    tokenizer.train(tiny_run.tokenizer_training(root), whole)
    add = logging.Meter.add

    def failing(self, step, metrics, waited):
        add(self, step, metrics, waited)
        if step == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(logging.Meter, "add", failing)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.train(tiny_run.tokenizer_training(root), broken)
    monkeypatch.undo()
    tokenizer.train(tiny_run.tokenizer_training(root), broken)
    jax.tree.map(np.testing.assert_array_equal, tokenizer.load(broken)[1], tokenizer.load(whole)[1])
    losses = [[(line["step"], line["loss"]) for line in logging.read(w) if "loss" in line] for w in (broken, whole)]
    assert losses[0] == losses[1]


def test_what_cannot_work_is_one_sentence(root, tmp_path):
    with pytest.raises(ValueError, match="S2RGB has no tokenizer; tokenizers exist for S2L2A"):
        tokenizer.train(tiny_run.tokenizer_training(root, "S2RGB"), tmp_path)
    with pytest.raises(FileNotFoundError, match="No samples"):
        tokenizer.train(tiny_run.tokenizer_training(root, "NDVI"), tmp_path)
    config = tiny_run.tokenizer_training(root)
    config.train.batch_size = 9
    with pytest.raises(ValueError, match=r"train\.batch_size=9 must be a multiple of the 8 devices"):
        tokenizer.train(config, tmp_path)
