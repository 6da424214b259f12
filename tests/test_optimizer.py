"""AdamW: equal to optax's, the reference's decay rule, the schedule, and steps that are skipped."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from terramind_jax import config as configuration
from terramind_jax import model as networks
from terramind_jax.train import optimizer, state


@pytest.fixture
def params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "norm1": {"scale": jnp.ones(4)},
        "fc1": {"kernel": jax.random.normal(keys[0], (4, 3)), "bias": jax.random.normal(keys[1], (3,))},
        "mod_emb/x": jax.random.normal(keys[2], (4,)),
    }


def settings(**changes):
    config = configuration.pretraining().optimizer.unlock()
    config.update(changes)
    return config


@pytest.mark.parametrize(("clip", "norms"), [(0.0, False), (0.5, True)])
def test_equals_optax(params, clip, norms):
    tx = optimizer.adamw(settings(clip_norm=clip, decay_norms=norms))
    reference = optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        optax.adamw(1e-2, 0.9, 0.95, 1e-8, weight_decay=0.05, mask=None if norms else optimizer.decayed),
    )
    ours, theirs = (params, tx.init(params)), (params, reference.init(params))

    @jax.jit
    def both(ours, theirs, step):
        grads = jax.tree.map(lambda p: jnp.sin(p * (step + 1)), params)
        norm = optimizer.global_norm(grads)
        updates, opt_state = tx.update(grads, ours[1], ours[0], learning_rate=1e-2, grad_norm=norm, ok=jnp.array(True))
        ours = optax.apply_updates(ours[0], updates), opt_state
        updates, opt_state = reference.update(grads, theirs[1], theirs[0])
        return ours, (optax.apply_updates(theirs[0], updates), opt_state)

    for step in range(5):
        ours, theirs = both(ours, theirs, step)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-7), ours[0], theirs[0])


def test_decay_spares_norms_and_biases_only(params):
    assert optimizer.decayed(params) == {"norm1": {"scale": False}, "fc1": {"kernel": True, "bias": False}, "mod_emb/x": True}
    assert all(jax.tree.leaves(optimizer.decayed(params, norms=True)))


def test_decay_of_the_whole_model():
    config = networks.TransformerConfig(dim=64, encoder_depth=1, decoder_depth=1, num_heads=1, gated_mlp=False, use_bias=True)
    boxed = jax.eval_shape(partial(networks.init, networks.TerraMind(config)), jax.random.key(0))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(optimizer.decayed(meta.unbox(boxed)))
    spared = {jax.tree_util.keystr(path, simple=True, separator=".") for path, decay in leaves if not decay}
    kept = {jax.tree_util.keystr(path, simple=True, separator=".") for path, decay in leaves if decay}
    assert all(name.endswith(("scale", "bias")) for name in spared)
    assert not any(name.endswith(("scale", "bias")) for name in kept)
    assert "mask_token" in kept
    assert sum(name.startswith("mod_emb") for name in kept) == 13


def test_schedule_is_linear_then_cosine():
    config = settings(learning_rate=2.0, min_learning_rate=0.5)
    rate = partial(optimizer.learning_rate, warmup=0.1, config=config)
    at = {p: float(rate(jnp.float32(p))) for p in (0.0, 0.05, 0.1, 0.55, 1.0, 1.2)}
    assert at == pytest.approx({0.0: 0.0, 0.05: 1.0, 0.1: 2.0, 0.55: 1.25, 1.0: 0.5, 1.2: 0.5}, abs=1e-6)


def test_schedule_counts_samples_not_steps():
    """Half as many steps of twice the batch see the same rates."""
    small = [state.progress(jnp.array([0, n], jnp.uint32), 64) for n in range(0, 64, 8)]
    large = [state.progress(jnp.array([0, n], jnp.uint32), 64) for n in range(0, 64, 16)]
    np.testing.assert_array_equal(small[::2], large)


def test_samples_count_past_32_bits():
    words = jnp.array([0, 2**32 - 3], jnp.uint32)
    after = jax.jit(state.advance, static_argnums=1)(words, 8)
    assert state.consumed(after) == 2**32 + 5
    for total in (2.0**33, 2**33):  # of a run's length in tokens, an integer
        assert float(state.progress(after, total)) == pytest.approx(0.5)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_only_the_counters(params, where, value):
    config = settings(clip_norm=1.0)
    tx = optimizer.adamw(config)
    step = jax.jit(partial(state.apply, tx=tx, config=config, batch_size=4, total=100.0, warmup=0.01, ema_decay=0.9))
    good = jax.tree.map(jnp.ones_like, params)
    before, _ = step(state.create(params, tx, ema=True), loss=jnp.float32(1), grads=good)
    before, _ = step(before, loss=jnp.float32(1), grads=good)
    bad = {**good, "mod_emb/x": good["mod_emb/x"].at[1].set(value)} if where == "gradient" else good
    after, metrics = step(before, loss=jnp.float32(value if where == "loss" else 1), grads=bad)
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(after, name))
    assert (int(after.step), state.consumed(after.samples), int(after.skipped), int(metrics["skipped"])) == (3, 12, 1, 1)
    further, _ = step(after, loss=jnp.float32(1), grads=good)
    assert not np.array_equal(further.params["mod_emb/x"], after.params["mod_emb/x"])
    assert not np.array_equal(further.ema["mod_emb/x"], after.ema["mod_emb/x"])
