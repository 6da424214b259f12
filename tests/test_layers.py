"""Transformer layers: the product whose gradient is written by hand."""

import jax
import numpy as np
import pytest

from terramind_jax.model.layers import project


@pytest.mark.parametrize("outputs", [3, 7])  # narrower and wider than the five inputs
def test_gradients_of_a_product_are_the_products(outputs):
    shapes = (2, 3, 4, 5), (5, outputs), (2, 3, 4, outputs)
    x, kernel, g = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    y, gradient = jax.vjp(project, x, kernel)
    dx, dkernel = gradient(g)
    np.testing.assert_allclose(y, x @ kernel, rtol=1e-6)
    np.testing.assert_allclose(dx, g @ kernel.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dkernel, x.reshape(-1, 5).T @ g.reshape(-1, outputs), rtol=1e-4, atol=1e-5)
