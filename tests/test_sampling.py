"""Schedules, filters and keys of the sampler (spec 8.1, 8.2, 12)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terramind_jax import sampling

SPEC_PROBABILITIES = np.log(np.array([0.15, 0.5, 0.06, 0.25, 0.04], np.float32))  # spec 12, shuffled


def kept(logits, **filters):
    return np.flatnonzero(np.isfinite(np.asarray(sampling.filter_logits(jnp.asarray(logits), **filters)))).tolist()


def test_linear_schedule_is_the_specs():
    assert sampling.token_schedule("linear", 10, 196) == (20,) * 6 + (19,) * 4
    assert sampling.token_schedule("linear", 300, 196) == (1,) * 196
    assert sampling.token_schedule("linear", 1, 196) == (196,)


def test_cosine_schedule_is_the_specs():
    assert sampling.token_schedule("cosine", 8, 196) == (7, 21, 32, 38, 38, 32, 21, 7)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 400])
@pytest.mark.parametrize("tokens", [1, 3, 16, 196])
def test_schedules_write_every_token_and_no_empty_step(kind, steps, tokens):
    counts = sampling.token_schedule(kind, steps, tokens)
    assert sum(counts) == tokens and min(counts) > 0 and len(counts) <= steps


def test_schedule_errors():
    with pytest.raises(ValueError, match="decoding steps is 0"):
        sampling.token_schedule("linear", 0, 4)
    with pytest.raises(ValueError, match="known schedules: linear, cosine"):
        sampling.token_schedule("square", 2, 4)
    with pytest.raises(ValueError, match="known schedules: constant, linear"):
        sampling.temperature_schedule("square", 1.0, (2, 2))
    with pytest.raises(ValueError, match="must be 0"):
        sampling.temperature_schedule("constant", -1.0, (2, 2))


def test_linear_temperature_falls_with_the_missing_share():
    np.testing.assert_allclose(sampling.temperature_schedule("linear", 2.0, (8, 6, 2)), [2.0, 1.0, 0.25])
    np.testing.assert_allclose(sampling.temperature_schedule("constant", 2.0, (8, 6)), [2.0, 2.0])
    assert sampling.temperature_schedule("linear", 0.0, (8, 6)).tolist() == [0.0, 0.0]


def test_top_p_keeps_the_specs_numbers():
    assert kept(SPEC_PROBABILITIES, top_p=0.8) == [0, 1, 3]
    assert kept(SPEC_PROBABILITIES, top_p=0.5) == [1, 3]
    assert kept(SPEC_PROBABILITIES, top_p=0.45) == [1]
    assert kept(SPEC_PROBABILITIES, top_p=0.0) == kept(SPEC_PROBABILITIES, top_p=1.0) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.98])
def test_top_p_equals_a_sort(top_p):
    logits = np.random.default_rng(0).normal(size=(3, 7, 200), scale=3).astype(np.float32)
    probability = np.exp(logits.astype(np.float64))
    probability /= probability.sum(-1, keepdims=True)
    descending = -np.sort(-probability, axis=-1)
    number = ((np.cumsum(descending, axis=-1) - descending) <= top_p).sum(-1)
    filtered = np.asarray(sampling.filter_logits(jnp.asarray(logits), top_p=top_p))
    np.testing.assert_array_equal(np.isfinite(filtered).sum(-1), number)
    order = np.argsort(-logits, axis=-1)
    kept_in_order = np.isfinite(np.take_along_axis(filtered, order, axis=-1))
    np.testing.assert_array_equal(kept_in_order, np.arange(200) < number[..., None])


def test_top_k_takes_a_number_or_a_fraction():
    assert kept(SPEC_PROBABILITIES, top_k=2) == [1, 3]
    assert kept(SPEC_PROBABILITIES, top_k=0.4) == [1, 3]
    assert kept(SPEC_PROBABILITIES, top_k=0) == kept(SPEC_PROBABILITIES, top_k=9) == [0, 1, 2, 3, 4]


def test_top_k_comes_before_top_p():
    # Of the two left by top-k, the first alone holds 0.5 / 0.75 of the mass, which exceeds 0.6; over all five it would not.
    assert kept(SPEC_PROBABILITIES, top_k=2, top_p=0.6) == [1]


def test_filter_errors():
    with pytest.raises(ValueError, match="top_p is 1.5"):
        sampling.filter_logits(jnp.zeros(3), top_p=1.5)
    with pytest.raises(ValueError, match="top_k is -1"):
        sampling.filter_logits(jnp.zeros(3), top_k=-1)
    with pytest.raises(ValueError, match="fraction of the vocabulary"):
        sampling.filter_logits(jnp.zeros(3), top_k=1.5)


def test_draws_follow_the_probabilities():
    keys = jax.random.split(jax.random.key(3), (1, 4000))
    logits = jnp.broadcast_to(sampling.filter_logits(jnp.asarray(SPEC_PROBABILITIES), top_p=0.8), (1, 4000, 5))
    ids, confidence = sampling.draw(keys, logits, 1.0)
    share = np.bincount(np.asarray(ids[0]), minlength=5) / 4000
    np.testing.assert_allclose(share, [0.15 / 0.9, 0.5 / 0.9, 0, 0.25 / 0.9, 0], atol=0.03)
    np.testing.assert_allclose(np.unique(np.asarray(confidence)), np.array([0.15, 0.25, 0.5]) / 0.9, rtol=1e-5)
    assert np.asarray(sampling.draw(keys, logits, 1e-9)[0] == 1).all()


def test_keys_depend_on_seed_target_and_step_alone():
    def numbers(seed, batch, target="coords", step=0):
        keys = sampling.step_keys(sampling.sample_keys(jnp.asarray(sampling.seed_words(seed, batch)), target), step)
        return np.asarray(jax.vmap(jax.random.bits)(keys))

    assert len(set(numbers(5, 3))) == 1
    assert numbers(5, 3)[0] == numbers(5, 1)[0] == numbers(np.array([1, 5]), 2)[1]
    assert len({numbers(5, 1)[0], numbers(6, 1)[0], numbers(5 + 2**32, 1)[0], numbers(-5, 1)[0]}) == 4
    assert numbers(5, 1)[0] != numbers(5, 1, target="tok_dem@224")[0]
    assert numbers(5, 1)[0] != numbers(5, 1, step=1)[0]


def test_seeds_of_draws_begin_with_the_seed_and_are_each_samples_own():
    assert [int(x) for x in sampling.draw_seeds(7, 2)] == [int(x) for x in sampling.draw_seeds(7, 5)[:2]]
    both = np.stack(sampling.draw_seeds(np.array([7, -1]), 3))
    assert both[0].tolist() == [7, 2**64 - 1] and len(np.unique(both)) == 6
    np.testing.assert_array_equal(both[:, 0], sampling.draw_seeds(7, 3))
    with pytest.raises(ValueError, match="number of samples is 0"):
        sampling.draw_seeds(7, 0)


def test_orders_are_permutations_of_their_own():
    keys = sampling.sample_keys(jnp.asarray(sampling.seed_words(np.arange(3), 3)), "coords")
    places = sampling.places(jnp.zeros((3, 2), int), 5, 10)
    orders = np.asarray(sampling.random_orders(keys, places))
    assert (np.sort(orders, axis=1) == np.arange(50)).all()
    assert (orders[0] != orders[1]).any() and (orders[1] != orders[2]).any()
    np.testing.assert_array_equal(orders[1:2], sampling.random_orders(keys[1:2], places[1:2]))


def test_a_window_sees_the_random_material_of_its_scene():
    """At (r, c) it is what the whole scene has there: places, draws, the order of tokens, and noise; at 2**15 rows, too."""
    keys = sampling.sample_keys(jnp.asarray(sampling.seed_words(7, 1)), "tok_dem@224")
    for first in (0, 40_000):
        scene, at = np.array([[first, first]]), np.array([[first + 2, first + 1]])
        whole, inside = np.asarray(sampling.places(scene, 6, 8)), np.asarray(sampling.places(at, 4, 4))
        np.testing.assert_array_equal(whole.reshape(6, 8)[2:, 1:5].ravel(), inside[0])
        assert len(np.unique(whole)) == 48
        ids = [np.asarray(sampling.draw(sampling.place_keys(keys, x), jnp.zeros((1, x.size, 500)), 1.0)[0])[0] for x in (whole, inside)]
        np.testing.assert_array_equal(ids[0].reshape(6, 8)[2:, 1:5].ravel(), ids[1])
        orders = [[int(x[0, i]) for i in sampling.random_orders(keys, jnp.asarray(x))[0]] for x in (whole, inside)]
        assert [place for place in orders[0] if place in orders[1]] == orders[1]
        noise = [sampling.normal(keys, x, shape, 16, 2) for x, shape in ((scene, (6, 8)), (at, (4, 4)))]
        assert noise[0].shape == (1, 96, 128, 2) and abs(float(noise[0].std()) - 1) < 0.02
        np.testing.assert_array_equal(noise[0][:, 32:, 16:80], noise[1])


def test_corner_errors():
    with pytest.raises(ValueError, match=r"option at is int64 of shape \[2\]; expected integers \[2, 2\], row and column"):
        sampling.corners(np.zeros(2, int), 2)
    with pytest.raises(ValueError, match="option at is float64"):
        sampling.corners(np.zeros((2, 2)), 2)
    with pytest.raises(ValueError, match="option at goes from -1 to 0; expected tokens of a scene's grid, 0-65535"):
        sampling.corners(np.array([[0, -1]]), 1)


def test_seed_errors():
    with pytest.raises(ValueError, match=r"shape \(3,\); expected one integer or \[2\]"):
        sampling.seed_words(np.arange(3), 2)
    with pytest.raises(ValueError, match="dtype float64"):
        sampling.seed_words(1.5, 2)
