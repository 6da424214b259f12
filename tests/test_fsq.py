"""Finite scalar quantization: check values of spec 6.3 and what must hold for any levels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terramind_jax.tokenizer import fsq

LEVELS = [(8, 8, 8, 6, 5), (7, 5, 5, 5, 5)]


def test_check_values():
    levels = LEVELS[0]
    middle = fsq.quantize(jnp.zeros(5), levels)
    np.testing.assert_allclose(middle, np.array([4, 4, 4, 2, 2]) / (np.array(levels) - 1), rtol=1e-6)  # 3.5 -> 4, 2.5 -> 2
    assert fsq.codes_to_tokens(middle, levels) == 7460
    assert fsq.codes_to_tokens(fsq.quantize(jnp.full(5, jnp.inf), levels), levels) == 15359
    np.testing.assert_allclose(fsq.tokens_to_codes(jnp.array(9), levels), [1 / 7, 1 / 7, 0, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("levels", LEVELS)
def test_every_token_returns(levels):
    tokens = jnp.arange(fsq.codebook_size(levels))
    codes = fsq.tokens_to_codes(tokens, levels)
    np.testing.assert_array_equal(fsq.codes_to_tokens(codes, levels), tokens)
    assert codes.min() == 0 and codes.max() == 1


@pytest.mark.parametrize("levels", LEVELS)
def test_first_dimension_varies_fastest(levels):
    codes = fsq.tokens_to_codes(jnp.arange(levels[0] + 1), levels)
    np.testing.assert_allclose(codes[:-1, 0] * (levels[0] - 1), np.arange(levels[0]), rtol=1e-6)
    assert codes[-1, 0] == 0 and codes[-1, 1] > 0


def test_codes_lie_on_the_grid_nearest_to_the_sigmoid():
    z = jax.random.normal(jax.random.key(0), (100, 5)) * 3
    codes = fsq.quantize(z, LEVELS[0])
    top = np.array(LEVELS[0]) - 1
    np.testing.assert_allclose(codes * top, np.round(codes * top), atol=1e-5)
    assert np.abs((codes - jax.nn.sigmoid(z)) * top).max() <= 0.5 + 1e-5


def test_gradient_is_the_sigmoids():
    z = jnp.array([-2.0, 0.0, 0.3, 5.0, 1.0])
    gradient = jax.grad(lambda z: fsq.quantize(z, LEVELS[1]).sum())(z)
    expected = jax.nn.sigmoid(z) * (1 - jax.nn.sigmoid(z))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_low_precision_latents_quantize_in_float32():
    z = jax.random.normal(jax.random.key(1), (50, 5)).astype(jnp.bfloat16)
    codes = fsq.quantize(z, LEVELS[0])
    assert codes.dtype == jnp.float32
    np.testing.assert_array_equal(codes, fsq.quantize(z.astype(jnp.float32), LEVELS[0]))
