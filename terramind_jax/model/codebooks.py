"""Image streams whose patches are several codes: an MLP makes one embedding of them, another the logits of all at once.

The released models have one code a patch, a row of a table. Of 128 codes of 8, as announced for the next TerraMind, every set is another
patch, and a patch is no row of anything: the embeddings of its codes are fused by an MLP.

A slot of a batch may be of any stream. `over_rows` runs a network on those of its own stream alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from terramind_jax.modalities import Stream
from terramind_jax.model.layers import LayerNorm, Linear

BLOCK = 128  # rows at a time, of which the last block may hold few
WIDTH = 4  # of the hidden layers, in the width of the model

RowFunction = Callable[[Any, jax.Array | None, jax.Array], jax.Array]  # variables, x [n, ...], codes [n, K] -> [n, ...], row by row


class CodebookFusion(nn.Module):
    """Codes ``[..., K]`` of one patch each -> embeddings ``[..., D]``.

    The first kernel holds the embeddings of all codes, side by side: an embedding of its own a code, concatenated and projected, would be
    the same function of more parameters.
    """

    num_codebooks: int
    vocab_size: int
    dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, codes: jax.Array) -> jax.Array:
        chosen = jax.nn.one_hot(codes, self.vocab_size, dtype=self.dtype)
        chosen = chosen.reshape(*codes.shape[:-1], self.num_codebooks * self.vocab_size)
        unit = nn.initializers.normal(self.num_codebooks**-0.5)  # K embeddings add up to unit variance
        x = Linear((WIDTH * self.dim,), ("codes", "mlp"), use_bias=True, initializer=unit, dtype=self.dtype, name="fc1")(chosen)
        x = Linear((self.dim,), ("mlp", "embed"), use_bias=True, dtype=self.dtype, name="fc2")(nn.gelu(x, approximate=False))
        return LayerNorm(self.dtype, name="norm")(x)


class CodebookLogits(nn.Module):
    """Decoder outputs ``[..., D]`` -> logits ``[..., K, V]`` float32 over the vocabulary of each codebook."""

    num_codebooks: int
    vocab_size: int
    dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        x = Linear((WIDTH * self.dim,), ("embed", "mlp"), use_bias=True, dtype=self.dtype, name="fc1")(y)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        logits = Linear((self.num_codebooks * self.vocab_size,), ("mlp", "codes"), use_bias=True, dtype=wide, name="fc2")
        return logits(nn.gelu(x, approximate=False)).reshape(*y.shape[:-1], self.num_codebooks, self.vocab_size)


class PerStream(nn.Module):
    """One `network` for each stream with several codebooks; calling it gives ``{stream key: module}``."""

    network: type[CodebookFusion] | type[CodebookLogits]
    streams: Sequence[Stream]
    dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        several = [s for s in self.streams if s.codes]
        return {s.key: self.network(s.num_codebooks, s.vocab_size, self.dim, self.dtype, name=s.key) for s in several}


def fused(network: CodebookFusion, codes: jax.Array, mine: jax.Array) -> jax.Array:
    """Embeddings ``[N, D]`` of codes ``[N, K]`` where `mine` ``[N]``, zeros elsewhere; `network` is bound."""
    module, variables = network.unbind()
    return over_rows(lambda variables, _, codes: module.apply(variables, codes), variables, None, codes, mine)


def cross_entropy(network: CodebookLogits, y: jax.Array, codes: jax.Array, mine: jax.Array) -> jax.Array:
    """Sum of the losses of the rows that are `mine` ``[N]``: y ``[N, D]``, codes ``[N, K]``; `network` is bound.

    A row's loss is the mean over its codebooks, so that it compares with that of a row with one.
    """
    module, variables = network.unbind()

    def losses(variables: Any, y: jax.Array, codes: jax.Array) -> jax.Array:
        logits = module.apply(variables, y)
        own = jnp.take_along_axis(logits, codes[..., None], -1)[..., 0]
        return (jax.nn.logsumexp(logits, -1) - own).mean(-1)

    return over_rows(losses, variables, y, codes, mine).sum()


# ---- some rows of many ----


def over_rows(function: RowFunction, variables: Mapping[str, Any], x: jax.Array | None, codes: jax.Array, mine: jax.Array) -> jax.Array:
    """``function(variables, x, codes)`` in the rows that are `mine` ``[N]``, zeros in the others, which it never sees.

    Rows are sorted and taken block by block, in a loop whose trip count depends on the data; the backward pass computes each block again.
    Under a mesh (`jax.shard_map`) every device does so with its own rows, and with the whole of `variables`.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    rows = P(tuple(a for a in ("data", "fsdp") if shape.get(a, 1) > 1))
    local = partial(_own_rows, function)
    if rows != P(()):
        local = jax.shard_map(local, in_specs=(P(), rows, rows, rows), out_specs=rows, check_vma=False)
    return local(variables, x, codes, mine)


def _own_rows(function: RowFunction, variables: Any, x: jax.Array | None, codes: jax.Array, mine: jax.Array) -> jax.Array:
    order, count, padding = jnp.argsort(~mine, stable=True), mine.sum(), -len(mine) % BLOCK

    def sort(a: jax.Array) -> jax.Array:
        return _until(count, jnp.pad(a[order], ((0, padding), *((0, 0),) * (a.ndim - 1))))

    first = _first_rows(function, variables, *jax.tree.map(sort, (x, codes.astype(jnp.int32))), count)
    return _until(count, first)[jnp.argsort(order)]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _first_rows(function: RowFunction, variables: Any, x: jax.Array | None, codes: jax.Array, count: jax.Array) -> jax.Array:
    """`function` in the blocks that hold the first `count` rows."""

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        return _put(out, function(variables, *_block((x, codes), i)), i)

    like = jax.eval_shape(function, variables, x, codes)
    return _over_blocks(body, count, jnp.zeros(like.shape, like.dtype))


def _forward(function: RowFunction, variables: Any, x: jax.Array | None, codes: jax.Array, count: jax.Array) -> tuple[jax.Array, tuple]:
    return _first_rows(function, variables, x, codes, count), (variables, x, codes, count)


def _backward(function: RowFunction, saved: tuple, g: jax.Array) -> tuple:
    variables, x, codes, count = saved

    def body(i: jax.Array, carry: tuple) -> tuple:
        total, dx = carry
        xb, codes_b, gb = _block((x, codes, g), i)
        _, pull = jax.vjp(lambda variables, x: function(variables, x, codes_b), variables, xb)
        own, dxb = pull(gb)
        return jax.tree.map(jnp.add, total, own), jax.tree.map(partial(_put, i=i), dx, dxb)

    return *_over_blocks(body, count, jax.tree.map(jnp.zeros_like, (variables, x))), None, None


_first_rows.defvjp(_forward, _backward)


def _over_blocks(body: Callable, count: jax.Array, start: Any) -> Any:
    return jax.lax.fori_loop(0, -(-count // BLOCK), body, start)


def _block(arrays: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i * BLOCK, BLOCK), arrays)


def _put(array: jax.Array, block: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, block, i * BLOCK, 0)


def _until(count: jax.Array, array: jax.Array) -> jax.Array:
    """The array with zeros in its rows from `count` on."""
    return jnp.where((jnp.arange(len(array)) < count).reshape(-1, *(1,) * (array.ndim - 1)), array, 0)
