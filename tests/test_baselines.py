"""Baselines against NumPy's own least squares and the conditions of their optima."""

from __future__ import annotations

import numpy as np
import pytest

from terramind_jax import baselines


def test_linear_regression_streams_to_least_squares():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 10, 10, 3)) * [1, 500, 0.01] + [0, 2000, 5]
    y = x @ rng.normal(size=(3, 2)) + 7 + rng.normal(size=(4, 10, 10, 2))
    valid = rng.random((4, 10, 10)) < 0.8
    regression = baselines.LinearRegression(3, 2)
    for scene in zip(x, y, valid, strict=True):
        regression.add(*scene)
    design = np.append(x[valid], np.ones((valid.sum(), 1)), axis=1)
    expected = np.linalg.lstsq(design, y[valid], rcond=None)[0]
    np.testing.assert_allclose(regression.fit()(x), np.append(x, np.ones((4, 10, 10, 1)), -1) @ expected, atol=1e-2)
    np.testing.assert_allclose(regression.mean(), y[valid].mean(0))
    assert regression.count == valid.sum()


def test_linear_regression_survives_constant_and_repeated_bands():
    x = np.random.default_rng(0).normal(size=(100, 1)) @ np.ones((1, 2))
    x = np.append(x, np.full((100, 1), 3.0), axis=1)
    y = 2 * x[:, :1] + 1
    np.testing.assert_allclose(baselines.LinearRegression(3, 1).add(x, y).fit()(x), y, atol=1e-4)


def test_logistic_regression_matches_the_class_moments():
    """At the optimum, predicted and true classes have the same mean of every input: the gradient of the likelihood is zero."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 4, 3000)
    x = rng.normal(size=(3000, 3)) * [1, 100, 1] + np.eye(4, 3)[classes] * [2, 150, 1]
    model = baselines.logistic_regression(x, classes, 6)  # classes 4 and 5 never occur
    logits = model(x)
    probability = np.exp(logits - logits.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    moments = np.append(x / x.std(0), np.ones((3000, 1)), 1).T @ (probability - np.eye(6)[classes]) / 3000
    np.testing.assert_allclose(moments, 0, atol=1e-4)
    assert (logits.argmax(1) == classes).mean() > 0.6
    assert set(logits.argmax(1)) <= {0, 1, 2, 3}


def test_logistic_regression_separates_and_stays_finite():
    x = np.linspace(-1, 1, 200)[:, None]
    classes = (x[:, 0] > 0.2).astype(int)
    model = baselines.logistic_regression(x, classes, 2)
    assert np.isfinite(model.weight).all()
    assert (model(x).argmax(1) == classes).all()


def test_majority_class_and_sampled_pixels():
    assert baselines.majority_class(np.array([3, 9, 9])) == 1
    x = np.arange(60).reshape(5, 6, 2)
    bands, plain = baselines.sample_pixels(np.random.default_rng(0), (x, x[..., 0]), 12)
    assert bands.shape == (12, 2) and len(np.unique(plain)) == 12
    np.testing.assert_array_equal(bands[:, 0], plain)


def test_errors_say_what_is_wrong():
    regression = baselines.LinearRegression(3, 1)
    with pytest.raises(ValueError, match="Got 2 input and 1 target bands, expected 3 input and 1 target bands"):
        regression.add(np.zeros((4, 2)), np.zeros((4, 1)))
    with pytest.raises(ValueError, match="not the same pixels"):
        regression.add(np.zeros((4, 3)), np.zeros((5, 1)))
    with pytest.raises(ValueError, match="No valid pixel"):
        regression.fit()
    with pytest.raises(ValueError, match=r"pixels \[n, C\] and classes \[n\]"):
        baselines.logistic_regression(np.zeros((4, 3)), np.zeros(5, int), 2)
