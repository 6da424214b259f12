"""Transformer layers: the product whose gradient is written by hand, and the weights of attention."""

import jax
import numpy as np
import pytest

from terramind_jax.model.layers import attend, attention_weights, project


@pytest.mark.parametrize("outputs", [3, 7])  # narrower and wider than the five inputs
def test_gradients_of_a_product_are_the_products(outputs):
    shapes = (2, 3, 4, 5), (5, outputs), (2, 3, 4, outputs)
    x, kernel, g = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    y, gradient = jax.vjp(project, x, kernel)
    dx, dkernel = gradient(g)
    np.testing.assert_allclose(y, x @ kernel, rtol=1e-6)
    np.testing.assert_allclose(dx, g @ kernel.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dkernel, x.reshape(-1, 5).T @ g.reshape(-1, outputs), rtol=1e-4, atol=1e-5)


def test_attention_is_its_weights_times_the_values():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, n, 3, 4)) for i, n in enumerate((5, 6, 6)))
    mask = jax.random.bernoulli(jax.random.key(3), 0.3, (2, 1, 5, 6)).at[0, 0, 0].set(True)  # one row sees nothing
    for hidden in (mask, None):
        weights = attention_weights(q, k, hidden)
        np.testing.assert_allclose(np.einsum("bhmn,bnhd->bmhd", weights, v), attend(q, k, v, hidden), rtol=1e-4, atol=1e-6)
