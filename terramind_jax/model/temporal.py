"""Features of time series: every step through the encoder in one call, then pooled (as TerraTorch's temporal wrapper)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Pooling = Literal["keep", "concat", "mean", "max", "diff"]
POOLINGS = ("keep", "concat", "mean", "max", "diff")


def over_time(
    encode: Callable[[dict[str, jax.Array]], list],
    inputs: Mapping[str, jax.Array],
    pooling: Pooling = "mean",
    *,
    subset_lengths: Sequence[int] | None = None,
) -> list:
    """Features of time series, as TerraTorch's ``TemporalWrapper`` has them; `FeatureExtractor.over_time` takes user names.

    Args:
      encode: from inputs without time to a list of ``[B, N, D]``, or of dicts of them, such as ``lambda x: module.apply(variables, x)``.
      inputs: ``[B, T, ...]`` by what `encode` calls them: pixels ``[B, T, H, W, C]``, tokens ``[B, T, h, w]``, sequences ``[B, T, L]``,
        with one T.
      pooling: ``keep`` gives ``[B, T, N, D]``, ``concat`` ``[B, N, T * D]``, ``mean`` and ``max`` ``[B, N, D]``, and ``diff`` the first of
        exactly two steps minus the second.
      subset_lengths: splits the T steps into groups of these lengths, which are averaged before they are pooled.

    Returns:
      The list that `encode` returns, pooled.

    Raises:
      ValueError: an unknown pooling, inputs without time or with different times, lengths that do not sum to T, or not two steps to take
        a difference of.
    """
    b, t = _batch_and_time(inputs)
    lengths = _check_pooling(pooling, t, subset_lengths)
    folded = {key: np.reshape(value, (b * t, *np.shape(value)[2:])) for key, value in inputs.items()}

    def pool(x: jax.Array) -> jax.Array:
        x = x.reshape(b, t, *x.shape[1:])
        if lengths:
            starts = [sum(lengths[:i]) for i in range(len(lengths))]
            x = jnp.stack([x[:, start : start + n].mean(1) for start, n in zip(starts, lengths, strict=True)], axis=1)
        return _pool(x, pooling)

    return jax.tree.map(pool, encode(folded))


def _pool(x: jax.Array, pooling: Pooling) -> jax.Array:
    """``[B, T, N, D]`` as one of `POOLINGS`."""
    if pooling == "concat":
        b, t, n, d = x.shape
        return jnp.moveaxis(x, 1, 2).reshape(b, n, t * d)
    if pooling == "diff":
        return x[:, 0] - x[:, 1]
    return {"keep": lambda: x, "mean": lambda: x.mean(1), "max": lambda: x.max(1)}[pooling]()


def _batch_and_time(inputs: Mapping[str, jax.Array]) -> tuple[int, int]:
    for key, value in inputs.items():
        if np.ndim(value) < 3:
            raise ValueError(f"Input {key!r} has shape {list(np.shape(value))}; a time series is [B, T, ...].")
    sizes = {key: np.shape(value)[:2] for key, value in inputs.items()}
    if len(set(sizes.values())) != 1:
        given = ", ".join(f"{key} {list(size)}" for key, size in sizes.items()) or "none"
        raise ValueError(f"The inputs need one batch size and number of steps [B, T]; given: {given}.")
    return next(iter(sizes.values()))


def _check_pooling(pooling: str, t: int, subset_lengths: Sequence[int] | None) -> list[int]:
    """The lengths as a list, empty if there are none."""
    lengths = list(subset_lengths or [])
    if pooling not in POOLINGS:
        raise ValueError(f"Unknown pooling {pooling!r}; known poolings: {', '.join(POOLINGS)}.")
    if lengths and (sum(lengths) != t or min(lengths) < 1):
        raise ValueError(f"subset_lengths {lengths} must be positive and sum to the number of steps, {t}.")
    steps = len(lengths) or t
    if pooling == "diff" and steps != 2:
        raise ValueError(f"'diff' needs exactly two steps, given {steps}; group more with subset_lengths.")
    return lengths
