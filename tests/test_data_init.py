"""The start of a tokenizer's training that depends on the data."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from terramind_jax import tokenizer as networks
from terramind_jax.train.data_init import LATENT_STD, data_init, zero_output
from terramind_jax.train.reconstruction import usage


@pytest.fixture(scope="module")
def network():
    config = networks.TokenizerConfig("DEM", 1, levels=(8, 5, 5, 5), dim=32, depth=1, num_heads=2, image_size=64)
    module = networks.Tokenizer(config)
    variables = meta.unbox(jax.jit(partial(networks.init, module))(jax.random.key(0)))
    return module, variables["params"], variables["buffers"]


def plain() -> jax.Array:
    """Standardised heights of a plain: far from the mean, hardly varying."""
    rng = np.random.default_rng(0)
    return jnp.asarray(-0.7 + 0.05 * rng.normal(size=(16, 4, 4, 1)).repeat(16, 1).repeat(16, 2) + 0.01 * rng.normal(size=(16, 64, 64, 1)))


def used(network, params, image) -> int:
    module, _, buffers = network
    codes = module.apply({"params": params, "buffers": buffers}, image, method="quantize")
    return int((usage(module.config, codes, jnp.ones(len(image))) > 0).sum())


def test_a_plain_has_many_tokens_from_the_start(network):
    module, params, buffers = network
    spread = data_init(module, params, buffers, plain(), jnp.ones(16))
    assert used(network, spread, plain()) > 5 * used(network, params, plain())
    latent = module.apply({"params": spread, "buffers": buffers}, plain(), method="latent")
    np.testing.assert_allclose(latent.mean((0, 1, 2)), 0, atol=1e-3)
    varying = np.asarray(latent - latent.mean(0)).reshape(-1, latent.shape[-1])
    np.testing.assert_allclose(np.cov(varying.T, bias=True), LATENT_STD**2 * np.eye(latent.shape[-1]), atol=1e-2)


def test_images_that_could_not_be_read_do_not_count(network):
    module, params, buffers = network
    image = plain()
    weight = jnp.arange(16) < 12
    spoiled = jnp.where(weight[:, None, None, None], image, 100.0)
    one, other = (data_init(module, params, buffers, x, weight) for x in (image, spoiled))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), one, other)


def test_what_does_not_vary_stays(network):
    module, params, buffers = network
    same = data_init(module, params, buffers, jnp.zeros((2, 64, 64, 1)), jnp.zeros(2))
    assert all(jax.tree.leaves(jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), same)))
    np.testing.assert_array_equal(same["encoder"]["proj"]["kernel"], params["encoder"]["proj"]["kernel"])


def test_flat_patches_stay_flat_from_a_last_layer_of_zeros(network):
    """Nothing is drawn at first; then all pixels of a patch that is flat learn the same, which drawn weights do not."""
    module, params, buffers = network
    image = jnp.round(plain()[:, ::16, ::16] * 20).repeat(16, 1).repeat(16, 2) / 20

    def drawn(params):
        return module.apply({"params": params, "buffers": buffers}, image)[0]

    def spread(params):  # within patches
        return float(np.asarray(drawn(params)).reshape(16, 4, 16, 4, 16).std((2, 4)).max())

    def learned(params):
        grads = jax.grad(lambda params: jnp.square(drawn(params) - image).mean())(params)
        return jax.tree.map(lambda x, g: x - 0.1 * g, params, grads)

    zero = zero_output(params)
    assert not drawn(zero).any() and drawn(params).any()
    after = learned(zero)
    assert float(jnp.abs(drawn(after)).max()) > 1e-3 and spread(after) < 1e-5 < 1e-2 < spread(learned(params))
