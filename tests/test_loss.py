"""The fused cross-entropy equals plain autodiff, for every way targets can be spread over modalities."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from terramind_jax import sharding
from terramind_jax.model import loss

VOCAB = (300, 3, 1000)
WIDTH = 32


def _problem(sizes, seed=0):
    rng = np.random.default_rng(seed)
    modality = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    limits = np.array([*VOCAB, 1])[modality]
    ids = rng.integers(0, limits)
    x = jnp.asarray(rng.normal(size=(len(modality), WIDTH)), jnp.float32)
    tables = [jnp.asarray(rng.normal(size=(v, WIDTH)), jnp.float32) for v in VOCAB]
    return x, tables, jnp.asarray(ids, jnp.int32), jnp.asarray(modality, jnp.uint8)


def _plain(x, tables, ids, modality):
    sums = []
    for m, table in enumerate(tables):
        logp = jax.nn.log_softmax(x @ table.T)
        picked = jnp.take_along_axis(logp, jnp.minimum(ids, len(table) - 1)[:, None], 1)[:, 0]
        sums.append(-jnp.where(modality == m, picked, 0).sum())
    return jnp.stack(sums)


@partial(jax.jit, static_argnums=0)
def _value_and_gradients(function, x, tables, ids, modality):
    weights = jnp.asarray([1.0, 0.3, 2.0])
    return jax.value_and_grad(lambda x, tables: (function(x, tables, ids, modality) * weights).sum(), (0, 1))(x, tables)


B = loss.BLOCK


@pytest.mark.parametrize("sizes", [(B, 0, 3 * B - 1, B + 1), (1, 1, 1, 5 * B - 3), (0, 0, 0, 5 * B), (B, 2 * B, 1, 2 * B - 1)])
def test_losses_and_gradients_equal_autodiff(sizes):
    problem = _problem(sizes)
    value, gradients = _value_and_gradients(loss.cross_entropy, *problem)
    expected, expected_gradients = _value_and_gradients(_plain, *problem)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("mesh", [(4, 2, 1), (1, 1, 8), (2, 2, 2)])
def test_eight_devices_sum_to_the_same_losses_and_gradients(mesh):
    """Along tensor they split the vocabularies, of which eight do not divide 300, and 3 leaves some devices nothing."""
    x, tables, ids, modality = _problem((300, 90, 410, 24))
    alone = _value_and_gradients(loss.cross_entropy, x, tables, ids, modality)
    losses = jax.jit(loss.cross_entropy)(x, tables, ids, modality)
    mesh = sharding.make_mesh(*mesh)
    with jax.set_mesh(mesh):
        rows = jax.device_put(x, sharding.batch_sharding(mesh))
        together = _value_and_gradients(loss.cross_entropy, rows, tables, ids, modality)
        without_gradients = jax.jit(loss.cross_entropy)(rows, tables, ids, modality)
    for a, b in zip(jax.tree.leaves((*alone, losses)), jax.tree.leaves((*together, without_gradients)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-5)  # logits reach 20


def test_the_tables_of_a_tensor_axis_are_never_whole_on_a_device():
    x, tables, ids, modality = _problem((300, 90, 410, 24))
    mesh = sharding.make_mesh(tensor=8)
    with jax.set_mesh(mesh):
        tables[2] = jax.device_put(tables[2], NamedSharding(mesh, PartitionSpec("tensor")))
        text = _value_and_gradients.lower(loss.cross_entropy, x, tables, ids, modality).compile().as_text()
    assert "f32[125,32]" in text and "f32[1000,32]" not in text


def test_mod_averages_over_modalities_empty_ones_included():
    sums, count = jnp.asarray([20.0, 0.0, 9.0]), jnp.asarray([10.0, 0.0, 3.0])
    assert float(loss.combine(sums, count, VOCAB, "mod")) == pytest.approx((2 + 0 + 3) / 3)


def test_token_weights_by_targets_times_vocabulary():
    sums, count = jnp.asarray([20.0, 0.0, 9.0]), jnp.asarray([10.0, 0.0, 3.0])
    assert float(loss.combine(sums, count, VOCAB, "token")) == pytest.approx((2 * 3000 + 3 * 3000) / 6000)


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="Unknown loss 'sum'"):
        loss.combine(jnp.zeros(1), jnp.zeros(1), (2,), "sum")
