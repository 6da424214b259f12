"""Fixed positions and the bicubic resize, against the check values of spec section 12."""

import numpy as np
import pytest

from terramind_jax.model.positions import SEQUENCE_LENGTH, resize_bicubic, sincos_1d, sincos_2d


@pytest.mark.parametrize(
    ("dim", "expected"),
    [
        (192, [0.141120, 0.617358, -0.989992, -0.786682, -0.958924, -0.833509, 0.283662, -0.552506]),
        (768, [0.141120, 0.278380, -0.989992, -0.960471, -0.958924, -0.998573, 0.283662, 0.053395]),
    ],
)
def test_sincos_2d_is_the_references(dim, expected):
    q = dim // 4
    token = sincos_2d(14, 14, dim)[3 * 14 + 5]
    np.testing.assert_allclose(token[[0, 1, q, q + 1, 2 * q, 2 * q + 1, 3 * q, 3 * q + 1]], expected, atol=1e-6)


def test_sincos_1d_is_the_references():
    table = sincos_1d(SEQUENCE_LENGTH, 192)
    assert table.shape == (512, 192)
    np.testing.assert_allclose(table[3, [0, 1, 96, 97]], [0.141120, 0.404142, -0.989992, -0.914696], atol=1e-6)


def test_bicubic_14_to_16_is_pytorchs():
    grid = np.asarray(resize_bicubic(sincos_2d(14, 14, 768).reshape(14, 14, 768), (16, 16)))
    quarters = [0, 192, 384, 576]
    np.testing.assert_allclose(grid[0, 0, quarters], [-0.034668, 1.018939, -0.034668, 1.018939], atol=5e-6)
    np.testing.assert_allclose(grid[15, 15, quarters], [0.459583, 0.910067, 0.459583, 0.910067], atol=5e-6)
    np.testing.assert_allclose(grid[7, 9, [0, 1, 192, 384, 576]], [-0.205811, -0.471868, 0.980264, 1.008599, 0.068387], atol=5e-6)


def test_bicubic_16_to_14_is_pytorchs():
    grid = np.asarray(resize_bicubic(sincos_2d(16, 16, 768).reshape(16, 16, 768), (14, 14)))
    channels = [0, 1, 192, 384, 576]
    np.testing.assert_allclose(grid[0, 0, channels], [0.047904, 0.046187, 0.977096, 0.047904, 0.977096], atol=5e-6)
    np.testing.assert_allclose(grid[3, 5, channels], [-0.360910, -0.198820, -0.963489, -0.507056, 0.877304], atol=5e-6)


def test_resize_to_the_same_size_is_the_identity():
    grid = sincos_2d(14, 14, 192).reshape(14, 14, 192)
    assert resize_bicubic(grid, (14, 14)) is grid
