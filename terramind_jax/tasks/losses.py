"""Losses of downstream tasks: outputs, targets and which of them count -> a number, as TerraTorch has them.

Outputs are logits ``[B, ..., K]`` or values ``[B, ...]``, targets classes or values ``[B, ...]`` (several labels: ``[B, K]`` of 0 and 1),
and `valid` ``[B, ...]`` is False where a target is not known. What is not valid has no influence, whatever it holds, not even NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
EPS = 1e-7  # least denominator of dice
FOCAL_EPS = 1e-6


def valid(target: jax.Array, ignore_index: int | None = None) -> jax.Array:
    """Where a target is neither `ignore_index` nor NaN."""
    known = ~jnp.isnan(target) if jnp.issubdtype(target.dtype, jnp.floating) else jnp.ones(target.shape, bool)
    return known if ignore_index is None else known & (target != ignore_index)


def cross_entropy(logits: jax.Array, target: jax.Array, valid: jax.Array, weights: Sequence[float] = ()) -> jax.Array:
    """Mean over what is valid; with `weights`, one a class, weighted by that of the target."""
    target = jnp.where(valid, target, 0)
    share = valid * (jnp.asarray(weights, logits.dtype)[target] if len(weights) else 1.0)
    return (optax.softmax_cross_entropy_with_integer_labels(logits, target) * share).sum() / _least(share.sum())


def dice(logits: jax.Array, target: jax.Array, valid: jax.Array) -> jax.Array:
    """One minus the soft Dice score of the whole batch, a mean over all classes, of which those that it lacks give 0."""
    axes, k = tuple(range(target.ndim)), logits.shape[-1]
    probabilities = jax.nn.softmax(logits) * valid[..., None]
    truth = jax.nn.one_hot(jnp.where(valid, target, -1), k)
    both, each, there = (probabilities * truth).sum(axes), (probabilities + truth).sum(axes), truth.sum(axes)
    return ((1 - 2 * both / jnp.maximum(each, EPS)) * (there > 0)).mean()


def focal(logits: jax.Array, target: jax.Array, valid: jax.Array, gamma: float = 2.0) -> jax.Array:
    """Focal loss of each class against all others (arXiv 1708.02002), over the sum of its weights and, as TerraTorch has it, the number of
    pixels; a mean over classes."""
    axes = tuple(range(target.ndim))
    truth = jax.nn.one_hot(jnp.where(valid, target, -1), logits.shape[-1])
    each = optax.sigmoid_binary_cross_entropy(logits, truth)
    weight = (1 - jnp.exp(-each)) ** gamma * valid[..., None]
    return ((weight * each).sum(axes) / jnp.maximum(weight.sum(axes), FOCAL_EPS)).mean() / _least(valid.sum())


def binary_cross_entropy(logits: jax.Array, target: jax.Array, valid: jax.Array) -> jax.Array:
    """Of several labels, a mean over all of them."""
    return _mean(optax.sigmoid_binary_cross_entropy(logits, jnp.where(valid, target, 0)), valid)


def mse(values: jax.Array, target: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean squared error."""
    return _mean(jnp.square(values - jnp.where(valid, target, values)), valid)


def mae(values: jax.Array, target: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean absolute error."""
    return _mean(jnp.abs(values - jnp.where(valid, target, values)), valid)


def _mean(each: jax.Array, valid: jax.Array) -> jax.Array:
    return (each * valid).sum() / _least(valid.sum())


def _least(count: jax.Array) -> jax.Array:
    """A batch in which nothing is valid has the loss 0."""
    return jnp.where(count > 0, count, 1)


# By name, and by task those that it may have, its default first.
LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dice": dice, "focal": focal, "bce": binary_cross_entropy, "mse": mse, "mae": mae}
OF_TASK = {
    "segmentation": ("ce", "dice", "focal"),
    "classification": ("ce", "focal"),
    "multilabel": ("bce",),
    "regression": ("mse", "mae"),
    "scalar_regression": ("mse", "mae"),
}
