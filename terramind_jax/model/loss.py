"""Cross-entropy where every target has the vocabulary of its own modality (spec 4.5, 4.6), without full logits.

Targets are sorted by modality; a loop over blocks of one modality's targets, with a trip count that depends on the data, computes
their logits, losses and gradients at once. No product is spent on another modality's vocabulary, at most one block of logits
exists at a time, and shapes are static.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

BLOCK = 128  # targets a block: large enough for full matmul speed, small enough to waste little on a half-empty last block


def _wide(dtype) -> jnp.dtype:
    """Of sums and losses: float32, or float64 where the products are."""
    return jnp.promote_types(dtype, jnp.float32)


def _block(x: jax.Array, table: jax.Array, ids: jax.Array, start: jax.Array, end: jax.Array, dtype) -> tuple:
    """One block of sorted targets from `start`: its rows, validity, table indices, cross-entropies and softmax numerators."""
    valid = jnp.arange(BLOCK) + start < end
    xb = jax.lax.dynamic_slice_in_dim(x, start, BLOCK).astype(dtype)
    label = jnp.where(valid, jax.lax.dynamic_slice_in_dim(ids, start, BLOCK), 0)  # a neighbour's id may exceed this vocabulary
    logits = jnp.dot(xb, table.astype(dtype).T, preferred_element_type=_wide(dtype))
    top = logits.max(-1, keepdims=True)
    exp = jnp.exp(logits - top)
    total = exp.sum(-1, keepdims=True)
    own = jnp.take_along_axis(logits, label[:, None], 1)
    loss = jnp.where(valid, (top + jnp.log(total) - own)[:, 0], 0.0)
    return xb, valid, label, loss, exp, total


def _bounds(group_sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    ends = jnp.cumsum(group_sizes)
    return ends - group_sizes, ends


def _pad(x: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.pad(x, ((0, BLOCK), (0, 0))), jnp.pad(ids, (0, BLOCK))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sorted_cross_entropy(x: jax.Array, tables: Sequence[jax.Array], ids: jax.Array, group_sizes: jax.Array, dtype) -> jax.Array:
    starts, ends = _bounds(group_sizes)
    x, ids = _pad(x, ids)

    def of_modality(m: int, table: jax.Array) -> jax.Array:
        def body(i, total):
            return total + _block(x, table, ids, starts[m] + i * BLOCK, ends[m], dtype)[3].sum()

        return jax.lax.fori_loop(0, -(-group_sizes[m] // BLOCK), body, jnp.zeros((), _wide(dtype)))

    return jnp.stack([of_modality(m, table) for m, table in enumerate(tables)])


def _forward(x, tables, ids, group_sizes, dtype):
    """The losses, and as residuals their gradients: computed here, where the logits exist, and only scaled in the backward pass."""
    n = x.shape[0]
    starts, ends = _bounds(group_sizes)
    x, ids = _pad(x, ids)
    dx = jnp.zeros_like(x)
    losses, dtables = [], []
    for m, table in enumerate(tables):

        def body(i, carry, m=m, table=table):
            loss, dx, dtable = carry
            start = starts[m] + i * BLOCK
            xb, valid, label, ce, exp, total = _block(x, table, ids, start, ends[m], dtype)
            weight = valid.astype(exp.dtype)
            dlogits = (exp * (weight[:, None] / total)).at[jnp.arange(BLOCK), label].add(-weight).astype(dtype)
            rows = jax.lax.dynamic_slice_in_dim(dx, start, BLOCK)
            rows = rows + jnp.dot(dlogits, table.astype(dtype), preferred_element_type=_wide(dtype)).astype(dx.dtype)
            dx = jax.lax.dynamic_update_slice_in_dim(dx, rows, start, 0)
            return loss + ce.sum(), dx, dtable + jnp.dot(dlogits.T, xb, preferred_element_type=_wide(dtype))

        start = (jnp.zeros((), _wide(dtype)), dx, jnp.zeros(table.shape, _wide(dtype)))
        loss, dx, dtable = jax.lax.fori_loop(0, -(-group_sizes[m] // BLOCK), body, start)
        losses.append(loss)
        dtables.append(dtable)
    return jnp.stack(losses), (dx[:n], dtables, group_sizes)


def _backward(dtype, residuals, g):
    dx, dtables, group_sizes = residuals
    modality = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(dx.shape[0]), side="right")
    scale = jnp.append(g, 0.0)[modality].astype(dx.dtype)  # targets after the last group are padding
    return dx * scale[:, None], [g[m] * d for m, d in enumerate(dtables)], None, None


_sorted_cross_entropy.defvjp(_forward, _backward)


def _local_cross_entropy(x, tables, ids, modality, dtype) -> jax.Array:
    order = jnp.argsort(modality, stable=True)
    group_sizes = (modality[:, None] == jnp.arange(len(tables))).sum(0)
    return _sorted_cross_entropy(x[order], tables, ids[order], group_sizes, dtype)


def cross_entropy(x: jax.Array, tables: Sequence[jax.Array], ids: jax.Array, modality: jax.Array, dtype=jnp.float32) -> jax.Array:
    """Sum of cross-entropies per modality.

    Args:
      x: ``[N, D]`` decoder outputs.
      tables: one ``[V_m, D]`` output embedding a modality.
      ids: ``[N]`` target ids, each below the vocabulary of its modality.
      modality: ``[N]`` index into `tables`; anything from ``len(tables)`` on is padding.
      dtype: of the products; losses and softmax are float32.

    Returns:
      ``[len(tables)]`` float32. Under a mesh every device sorts and sums its own rows (``shard_map``), then the sums are added.
    """
    tables, modality = list(tables), modality.astype(jnp.int32)
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(a for a in ("data", "fsdp") if mesh.shape.get(a, 1) > 1)
    if not axes:
        return _local_cross_entropy(x, tables, ids, modality, dtype)

    def local(x, tables, ids, modality):
        return _local_cross_entropy(x, tables, ids, modality, dtype)[None]

    rows = P(axes)
    return jax.shard_map(local, in_specs=(rows, P(), rows, rows), out_specs=rows, check_vma=False)(x, tables, ids, modality).sum(0)


def combine(loss_sum: jax.Array, count: jax.Array, vocab_sizes: Sequence[int], kind: str = "mod") -> jax.Array:
    """One scalar from per-modality sums and counts (spec 4.6).

    ``mod``: mean over modalities of each one's mean, modalities without targets counting as zero. ``token``: the means weighted
    by targets times vocabulary, as the reference does.
    """
    means = loss_sum / jnp.maximum(count, 1)
    if kind == "mod":
        return means.mean()
    if kind == "token":
        weights = count * jnp.asarray(vocab_sizes, jnp.float32)
        return (means * weights).sum() / jnp.maximum(weights.sum(), 1)
    raise ValueError(f"Unknown loss {kind!r}; known losses: mod, token.")
