"""Cross-entropy where every target has the vocabulary of its own modality (spec 4.5, 4.6), without full logits.

Targets are sorted by modality; a loop over blocks of one modality's targets, with a trip count that depends on the data, computes
their logits, losses and gradients at once. No product is spent on another modality's vocabulary, at most one block of logits
exists at a time, and shapes are static.

Under a mesh every device sorts and sums its own rows. Where the mesh has a tensor axis, the devices along it share the rows and split
each vocabulary. A first loop then finds each row's normaliser over its own part, which the devices put together once, and the second
makes the gradients: trip counts differ from row to row of the mesh, so no loop waits for another device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

BLOCK = 128  # targets a block: large enough for full matmul speed, small enough to waste little on a half-empty last block


class Vocabularies(NamedTuple):
    """What is static: the dtype of the products, the sizes before padding, and the mesh axis that splits them, if any."""

    dtype: jnp.dtype
    sizes: tuple[int, ...]
    axis: str | None = None

    @property
    def wide(self) -> jnp.dtype:
        """Of sums and losses: float32, or float64 where the products are."""
        return jnp.promote_types(self.dtype, jnp.float32)

    @property
    def share(self) -> float:
        """Of a row's loss that this device counts, so that the sum over the devices of the axis counts it once."""
        return 1.0 if self.axis is None else 1 / jax.lax.axis_size(self.axis)


class Block(NamedTuple):
    """One block of sorted targets of one modality, with the logits of this device's part of the vocabulary."""

    x: jax.Array  # [BLOCK, D]
    valid: jax.Array  # [BLOCK] rows of this modality
    mine: jax.Array  # [BLOCK] of these, rows whose target is in this part
    label: jax.Array  # [BLOCK] place of the target in this part, 0 if it is not there
    logits: jax.Array  # [BLOCK, V]

    @property
    def own(self) -> jax.Array:
        """The targets' logits ``[BLOCK]``, 0 where they are not in this part."""
        return jnp.where(self.mine, jnp.take_along_axis(self.logits, self.label[:, None], 1)[:, 0], 0.0)


def _block(x: jax.Array, table: jax.Array, ids: jax.Array, start: jax.Array, end: jax.Array, vocab: Vocabularies, m: int) -> Block:
    valid = jnp.arange(BLOCK) + start < end
    xb = jax.lax.dynamic_slice_in_dim(x, start, BLOCK).astype(vocab.dtype)
    logits = jnp.dot(xb, table.astype(vocab.dtype).T, preferred_element_type=vocab.wide)
    label = jax.lax.dynamic_slice_in_dim(ids, start, BLOCK)  # a neighbour's id may exceed this vocabulary
    if vocab.axis is not None:
        first = jax.lax.axis_index(vocab.axis) * table.shape[0]
        label = label - first
        real = first + jnp.arange(table.shape[0]) < vocab.sizes[m]  # the last part may be padded
        logits = jnp.where(real, logits, jnp.finfo(logits.dtype).min)
    mine = valid & (label >= 0) & (label < table.shape[0])
    return Block(xb, valid, mine, jnp.where(mine, label, 0), logits)


def _bounds(group_sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    ends = jnp.cumsum(group_sizes)
    return ends - group_sizes, ends


def _pad(x: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.pad(x, ((0, BLOCK), (0, 0))), jnp.pad(ids, (0, BLOCK))


def _over_blocks(body, group_sizes: jax.Array, m: int, start):
    """`body(i, carry)` for every block of modality `m`."""
    return jax.lax.fori_loop(0, -(-group_sizes[m] // BLOCK), body, start)


def _normalise(block: Block) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of a block's rows ``[BLOCK, 1]``: the greatest logit, and the numerators ``[BLOCK, V]`` and denominator of a softmax."""
    top = block.logits.max(-1, keepdims=True)
    exp = jnp.exp(block.logits - top)
    return top, exp, exp.sum(-1, keepdims=True)


def _normalisers(x, tables, ids, group_sizes, vocab: Vocabularies) -> tuple[jax.Array, jax.Array]:
    """The logarithm of each row's sum of exponentials over the whole vocabulary ``[N]``, and the losses of the modalities."""
    n = x.shape[0]
    starts, ends = _bounds(group_sizes)
    x, ids = _pad(x, ids)
    logs = own = jnp.zeros(x.shape[0], vocab.wide)
    for m, table in enumerate(tables):

        def body(i, carry, m=m, table=table):
            start = starts[m] + i * BLOCK
            block = _block(x, table, ids, start, ends[m], vocab, m)
            top, _, total = _normalise(block)
            # Rows past the end are another modality's, which comes later, or nobody's.
            rows = (top + jnp.log(total))[:, 0], block.own
            return tuple(jax.lax.dynamic_update_slice_in_dim(a, b, start, 0) for a, b in zip(carry, rows, strict=True))

        logs, own = _over_blocks(body, group_sizes, m, (logs, own))
    logs, own = logs[:n], own[:n]
    if vocab.axis is not None:
        top = jax.lax.pmax(logs, vocab.axis)
        logs = top + jnp.log(jax.lax.psum(jnp.exp(logs - top), vocab.axis))
        own = jax.lax.psum(own, vocab.axis)
    rows = jnp.arange(n)
    of = (starts[:, None] <= rows) & (rows < ends[:, None])
    return logs, jnp.where(of, logs - own, 0.0).sum(1) * vocab.share


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sorted_cross_entropy(x, tables, ids, group_sizes, vocab: Vocabularies) -> jax.Array:
    return _normalisers(x, tables, ids, group_sizes, vocab)[1]


def _forward(x, tables, ids, group_sizes, vocab: Vocabularies):
    """The losses, and as residuals their gradients: computed here, where the logits exist, and only scaled in the backward pass."""
    n, wide = x.shape[0], vocab.wide
    logs, known = (None, None) if vocab.axis is None else _normalisers(x, tables, ids, group_sizes, vocab)
    logs = None if logs is None else jnp.pad(logs, (0, BLOCK))
    starts, ends = _bounds(group_sizes)
    x, ids = _pad(x, ids)
    dx = jnp.zeros_like(x)
    losses, dtables = [], []
    for m, table in enumerate(tables):

        def body(i, carry, m=m, table=table):
            loss, dx, dtable = carry
            start = starts[m] + i * BLOCK
            block = _block(x, table, ids, start, ends[m], vocab, m)
            if logs is None:
                top, exp, total = _normalise(block)
                loss += jnp.where(block.valid, (top + jnp.log(total))[:, 0] - block.own, 0.0).sum()
            else:
                top, total = jax.lax.dynamic_slice_in_dim(logs, start, BLOCK)[:, None], jnp.ones((BLOCK, 1), wide)
                exp = jnp.exp(jnp.where(block.valid[:, None], block.logits - top, -jnp.inf))
            dlogits = exp * (block.valid[:, None] / total)
            dlogits = dlogits.at[jnp.arange(BLOCK), block.label].add(-block.mine.astype(wide)).astype(vocab.dtype)
            rows = jax.lax.dynamic_slice_in_dim(dx, start, BLOCK)
            rows = rows + jnp.dot(dlogits, table.astype(vocab.dtype), preferred_element_type=wide).astype(dx.dtype)
            dx = jax.lax.dynamic_update_slice_in_dim(dx, rows, start, 0)
            return loss, dx, dtable + jnp.dot(dlogits.T, block.x, preferred_element_type=wide)

        loss, dx, dtable = _over_blocks(body, group_sizes, m, (jnp.zeros((), wide), dx, jnp.zeros(table.shape, wide)))
        losses.append(loss)
        dtables.append(dtable)
    return jnp.stack(losses) if known is None else known, (dx[:n], dtables, group_sizes)


def _backward(vocab: Vocabularies, residuals, g):
    dx, dtables, group_sizes = residuals
    modality = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(dx.shape[0]), side="right")
    scale = jnp.append(g, 0.0)[modality].astype(dx.dtype)  # targets after the last group are padding
    return dx * scale[:, None], [g[m] * d for m, d in enumerate(dtables)], None, None


_sorted_cross_entropy.defvjp(_forward, _backward)


def _local_cross_entropy(x, tables, ids, modality, vocab: Vocabularies) -> jax.Array:
    order = jnp.argsort(modality, stable=True)
    group_sizes = (modality[:, None] == jnp.arange(len(tables))).sum(0)
    return _sorted_cross_entropy(x[order], tables, ids[order], group_sizes, vocab)


def cross_entropy(x: jax.Array, tables: Sequence[jax.Array], ids: jax.Array, modality: jax.Array, dtype=jnp.float32) -> jax.Array:
    """Sum of cross-entropies per modality.

    Args:
      x: ``[N, D]`` decoder outputs.
      tables: one ``[V_m, D]`` output embedding a modality.
      ids: ``[N]`` target ids, each below the vocabulary of its modality.
      modality: ``[N]`` index into `tables`; anything from ``len(tables)`` on is padding.
      dtype: of the products; losses and softmax are float32.

    Returns:
      ``[len(tables)]`` float32. Under a mesh (``shard_map``) rows lie on the axes data and fsdp and vocabularies on the axis tensor.
    """
    tables, modality = list(tables), modality.astype(jnp.int32)
    sizes = tuple(table.shape[0] for table in tables)
    shape = jax.sharding.get_abstract_mesh().shape
    rows = tuple(a for a in ("data", "fsdp") if shape.get(a, 1) > 1)
    split = shape.get("tensor", 1)
    vocab = Vocabularies(jnp.dtype(dtype), sizes, "tensor" if split > 1 else None)
    if not rows and split == 1:
        return _local_cross_entropy(x, tables, ids, modality, vocab)

    def local(x, tables, ids, modality):
        return _local_cross_entropy(x, tables, ids, modality, vocab)[None]

    # Every device counts its part of the losses, along tensor too, so the cotangent that reaches it is the true one.
    tables = [jnp.pad(table, ((0, -size % split), (0, 0))) for table, size in zip(tables, sizes, strict=True)]
    inputs = (P(rows), P(vocab.axis), P(rows), P(rows))
    parts = jax.shard_map(local, in_specs=inputs, out_specs=P((*rows, *("tensor",) * (split > 1))), check_vma=False)
    return parts(x, tables, ids, modality).sum(0)


def count(modality: jax.Array, tables: int) -> jax.Array:
    """Number of targets per modality ``[tables]`` float32; anything from `tables` on is padding."""
    return (modality.reshape(-1, 1) == jnp.arange(tables)).sum(0).astype(jnp.float32)


def combine(loss_sum: jax.Array, count: jax.Array, vocab_sizes: Sequence[int], kind: str = "mod") -> jax.Array:
    """One scalar from per-modality sums and counts (spec 4.6). For given counts it is linear in the sums.

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
