"""Figures of an evaluation: in the modality's unit, band by band, as `metrics` has them, and of the codebook."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terramind_jax import metrics, modalities
from terramind_jax import tokenizer as networks
from terramind_jax.train import reconstruction

SIDE = 32


class Fixed:
    """Stands for a tokenizer whose reconstruction follows from the image alone, and whose tokens are all 0."""

    def __init__(self, config, reconstruct):
        self.config, self._reconstruct = config, reconstruct

    def apply(self, variables, image):
        h = SIDE // self.config.patch_size
        return self._reconstruct(image), jnp.zeros((image.shape[0], h, h, self.config.latent_dim))


def config_of(modality, channels, **options):
    return networks.TokenizerConfig(modality, channels, levels=(4, 4), dim=32, depth=1, num_heads=2, image_size=SIDE, **options)


def figures_of(module, *batches):
    measured = [reconstruction.measure(module, 1, None, None, batch, None) for batch in batches]
    return reconstruction.summarize(module.config, [sums for sums, _ in measured])


def test_errors_are_in_the_modalitys_unit():
    """A reconstruction that is off by one standard deviation everywhere is off by 951 metres; the bad image weighs nothing."""
    batch = {"image": np.stack([np.full((SIDE, SIDE, 1), x, np.int16) for x in (500, 700, 0)]), "bad": np.array([False, False, True])}
    result = figures_of(Fixed(config_of("DEM", 1), lambda image: image + jnp.array([1.0, 1.0, 9.0])[:, None, None, None]), batch)
    assert result["val/rmse"] == pytest.approx(951.272, rel=1e-4)
    assert result["val/mae"] == pytest.approx(951.272, rel=1e-4)
    assert result["val/psnr"] == pytest.approx(20 * np.log10(4000 / 951.272), rel=1e-5)
    assert result["val/loss"] == pytest.approx(1.0)
    assert result["val/codes"] == 1 / 16
    assert result["val/perplexity"] == pytest.approx(1.0)
    assert result["val/block_mean/rmse"] == pytest.approx(0, abs=1e-3)
    assert not [name for name in result if name.endswith("/elevation")]  # one band has no figures of its own


def test_figures_by_band_are_those_of_metrics():
    """Over two batches, against NumPy in float64."""
    rng = np.random.default_rng(0)
    images = rng.integers(300, 3000, (2, 3, SIDE, SIDE, 12)).astype(np.uint16)
    noise = rng.normal(scale=0.1, size=(3, SIDE, SIDE, 12)).astype(np.float32)
    batches = [{"image": image, "bad": np.zeros(3, bool)} for image in images]
    result = figures_of(Fixed(config_of("S2L2A", 12), lambda image: image + noise), *batches)
    _, std = modalities.statistics("S2L2A")
    truth = images.reshape(-1, SIDE, SIDE, 12).astype(np.float64)
    made = truth + np.concatenate([noise, noise]) * std
    everything = metrics.Errors(10_000.0).add(made, truth)
    for name in ("mae", "rmse", "psnr", "ssim"):
        assert result[f"val/{name}"] == pytest.approx(getattr(everything, name), rel=1e-4)
    for c, band in enumerate(modalities.get("S2L2A").bands):
        one = metrics.Errors(10_000.0).add(made[..., c : c + 1], truth[..., c : c + 1])
        for name in ("mae", "rmse", "psnr", "ssim"):
            assert result[f"val/{name}/{band}"] == pytest.approx(getattr(one, name), rel=1e-4)
    blocks = truth.reshape(6, 2, 16, 2, 16, 12).mean((2, 4), keepdims=True)
    blocks = np.broadcast_to(blocks, (6, 2, 16, 2, 16, 12)).reshape(truth.shape)
    assert result["val/block_mean/rmse"] == pytest.approx(metrics.rmse(blocks, truth), rel=1e-4)


def test_figures_of_clear_pixels():
    """What is under clouds and in bad images does not count."""
    rng = np.random.default_rng(0)
    images, clear = (
        rng.integers(300, 3000, (4, SIDE, SIDE, 12)).astype(np.uint16),
        rng.random((4, SIDE, SIDE)) < [[[0.2]], [[0]], [[1]], [[0.7]]],
    )
    noise = rng.normal(scale=0.1, size=images.shape[1:]).astype(np.float32)
    bad = np.array([False, False, True, False])
    batches = [{"image": images[i : i + 2], "bad": bad[i : i + 2], "clear": clear[i : i + 2]} for i in (0, 2)]
    result = figures_of(Fixed(config_of("S2L2A", 12), lambda image: image + noise), *batches)
    _, std = modalities.statistics("S2L2A")
    counting = clear & ~bad[:, None, None]
    difference = np.broadcast_to(noise * std, images.shape)[counting]
    assert result["val/clear/share"] == pytest.approx(counting.mean() * 4 / 3)
    assert result["val/clear/mae"] == pytest.approx(np.abs(difference).mean(), rel=1e-4)
    assert result["val/clear/rmse"] == pytest.approx(rmse := np.sqrt(np.square(difference).mean()), rel=1e-4)
    assert result["val/clear/psnr"] == pytest.approx(20 * np.log10(10_000 / rmse), rel=1e-4)
    blocks = np.asarray(images, float).reshape(4, 2, 16, 2, 16, 12).mean((2, 4), keepdims=True)
    blocks = np.broadcast_to(blocks, (4, 2, 16, 2, 16, 12)).reshape(images.shape)
    assert result["val/clear/block_mean/mae"] == pytest.approx(np.abs(blocks - images)[counting].mean(), rel=1e-4)
    unknown = figures_of(Fixed(config_of("S2L2A", 12), lambda image: image), batches[0] | {"clear": np.zeros((2, SIDE, SIDE), bool)})
    assert not [name for name in unknown if "clear" in name]


def test_classes():
    """Everything is reconstructed as class 1; of the block's most common class, a quarter of one block is wrong."""
    truth = np.ones((1, SIDE, SIDE, 1), np.uint8)
    truth[0, :8, :8] = 4
    module = Fixed(config_of("LULC", 10), lambda image: jnp.broadcast_to(jax.nn.one_hot(1, 10), (1, SIDE, SIDE, 10)) * 100)
    result = figures_of(module, {"image": truth, "bad": np.array([False])})
    right = 1 - 64 / SIDE**2
    assert result["val/accuracy"] == result["val/block_mean/accuracy"] == pytest.approx(right)
    assert result["val/miou"] == pytest.approx(right / 2)
    assert {name for name in result if "/iou/" in name} == {f"val/iou/{modalities.LULC_CLASSES[c]}" for c in (1, 4)}


def test_use_of_several_codebooks():
    config = config_of("DEM", 1, num_codebooks=2)
    codes = jnp.stack([jnp.array([0, 0, 0, 0]), jnp.array([0, 0, 1, 0])]).reshape(1, 1, 2, 4).astype(jnp.float32)
    counts = reconstruction.usage(config, jnp.concatenate([codes, codes + 9]), jnp.array([True, False]))
    np.testing.assert_array_equal(counts[0], np.eye(16, dtype=int)[0] * 2)
    np.testing.assert_array_equal(counts[1], np.eye(16, dtype=int)[0] + np.eye(16, dtype=int)[3])


def test_a_picture_of_every_kind(tmp_path):
    for modality in ("S2L2A", "DEM", "LULC"):
        image = np.random.default_rng(0).integers(0, 9, (2, SIDE, SIDE, 12 if modality == "S2L2A" else 1))
        reconstruction.draw(tmp_path / "pictures" / f"{modality}.png", modality, image, image, modality)
        assert (tmp_path / "pictures" / f"{modality}.png").read_bytes()[:4] == b"\x89PNG"
