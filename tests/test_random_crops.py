"""Random crops: within the tile, of the areas and shapes asked for, resized as PyTorch does, classes kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terramind_jax.train import random_crops

KEYS = jax.random.split(jax.random.key(0), 500)


def test_boxes_lie_in_the_tile_and_have_the_areas_asked_for():
    corner, size = jax.jit(jax.vmap(lambda key: random_crops.draw_box(key, 264, 0.8)))(KEYS)
    corner, size = np.asarray(corner), np.asarray(size)
    assert (corner >= 0).all() and (corner + size <= 264).all()
    area, aspect = size.prod(1) / 264**2, size[:, 0] / size[:, 1]
    assert 0.79 < area.min() < 0.82 and area.max() > 0.97
    assert 0.75 < aspect.min() < 0.9 and 1.1 < aspect.max() < 1.34
    assert (corner.std(0) > 2).all()


def test_a_box_that_never_fits_is_the_whole_tile():
    corner, size = random_crops.draw_box(jax.random.key(0), 264, 1.0)
    np.testing.assert_array_equal(corner, 0)
    np.testing.assert_array_equal(size, 264)


def test_a_ramp_stays_a_ramp():
    """Bilinear resampling of a linear image is exact: pixel centres map to pixel centres."""
    rows, columns = np.mgrid[:64, :64].astype(np.float32)
    corner, size = jnp.array([4.0, 10.0]), jnp.array([40.0, 50.0])
    made = random_crops.resample(jnp.stack([rows, columns], -1), corner, size, 32, nearest=False)
    np.testing.assert_allclose(made[:, 0, 0], 4 + (np.arange(32) + 0.5) * 40 / 32 - 0.5, atol=1e-4)
    np.testing.assert_allclose(made[0, :, 1], 10 + (np.arange(32) + 0.5) * 50 / 32 - 0.5, atol=1e-4)


@pytest.mark.parametrize("nearest", [True, False])
def test_a_whole_tile_at_its_own_size_is_itself(nearest):
    image = jnp.asarray(np.random.default_rng(0).integers(0, 10, (48, 48, 1)), jnp.uint8 if nearest else jnp.float32)
    made = random_crops.resample(image, jnp.zeros(2), jnp.full(2, 48.0), 48, nearest)
    np.testing.assert_allclose(made, image, atol=1e-5)
    assert made.dtype == image.dtype


def test_classes_stay_classes():
    tile = np.random.default_rng(1).choice([2, 7], (4, 48, 48, 1)).astype(np.uint8)
    made = random_crops.random_crops(KEYS[:4], tile, 64, 0.8, nearest=True)
    assert made.shape == (4, 64, 64, 1) and set(np.unique(made)) == {2, 7}
    assert not np.array_equal(made[0], random_crops.random_crops(KEYS[4:5], tile[:1], 64, 0.8, nearest=True)[0])
