"""How the streams of a scene become encoder tokens (spec 3): what the pretraining model and the feature extractor share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from terramind_jax.modalities import Stream
from terramind_jax.model.codebooks import CodebookFusion, PerStream
from terramind_jax.model.layers import xavier
from terramind_jax.model.positions import SEQUENCE_LENGTH, resize_bicubic, sincos_1d, sincos_2d

NORMAL = nn.initializers.normal(0.02)


class Tables(nn.Module):
    """One parameter per stream; calling it gives ``{stream key: array}``."""

    shapes: Mapping[str, tuple[int, ...]]
    initializer: Callable[..., Callable]  # called with the shape
    axes: tuple[str, ...]

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        # Rows are whole where they are used. Else XLA lets each device of the fsdp axis look up its slice of every row of the batch.
        whole = tuple(None if axis == "embed" else PartitionSpec.UNCONSTRAINED for axis in self.axes)

        def table(key: str, shape: tuple[int, ...]) -> jax.Array:
            values = self.param(key, nn.with_logical_partitioning(self.initializer(*shape), self.axes), shape)
            return nn.with_logical_constraint(values, whole)

        return {key: table(key, shape) for key, shape in self.shapes.items()}


class Positions(nn.Module):
    """One buffer of fixed positions per stream, as the reference stores them; calling it gives ``{stream key: [n, D]}`` (spec 2.3)."""

    grids: Mapping[str, int]  # patches along one side of the image, 0 for a sequence
    dim: int

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        def fixed(grid: int) -> jax.Array:
            return jnp.asarray(sincos_2d(grid, grid, self.dim) if grid else sincos_1d(SEQUENCE_LENGTH, self.dim))

        return {key: self.variable("buffers", key, fixed, grid).value for key, grid in self.grids.items()}


def token_tables(streams: Sequence[Stream], dim: int, initializer: Callable[..., Callable]) -> Tables:
    """Token embeddings ``[V, D]`` of the streams that have one vocabulary; several are for `codebooks.PerStream`."""
    shapes = {s.key: (s.vocab_size, dim) for s in streams if s.kind != "pixels" and not s.codes}
    return Tables(shapes, initializer, ("vocab", "embed"))


class Embedder(nn.Module):
    """Base of the networks that read streams.

    `config` has ``dim``, ``dtype``, ``encoder`` (the streams that enter), ``streams`` (all that have a modality embedding),
    ``patch_size_of(stream)`` and ``grid_of(stream)``.
    """

    config: Any

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.config.dtype)

    def setup_embeddings(self) -> None:
        """The variables of this class; called in `setup`."""
        c = self.config
        patches = {s.key: (c.patch_size_of(s) ** 2 * s.channels, c.dim) for s in c.encoder if s.kind == "pixels"}
        self.mod_emb = Tables({s.key: (c.dim,) for s in c.streams}, lambda *_: NORMAL, ("norm",))
        self.patch_proj = Tables(patches, xavier, ("patch", "embed"))
        self.encoder_token_emb = token_tables(c.encoder, c.dim, lambda *_: NORMAL)
        self.encoder_codebook_emb = PerStream(CodebookFusion, c.encoder, c.dim, self.dtype)
        self.encoder_pos_emb = Positions({s.key: c.grid_of(s) for s in c.encoder}, c.dim)

    def embed(self, key: str, values: jax.Array, positions: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """One whole modality as encoder input (spec 3.1-3.3).

        Args:
          key: an encoder stream.
          values: pixels ``[B, H, W, C]`` standardised, or ids ``[B, n]`` or ``[B, h, w]``, of K codebooks ``[..., K]``.
          positions: ``[B, n]`` of ids that are not the whole grid in order.

        Returns:
          Content and position-plus-modality embedding, each ``[B, n, D]``.
        """
        stream = self.stream(key, self.config.encoder)
        if stream.kind == "pixels":
            patches = patchify(values, self.config.patch_size_of(stream))
            grid = patches.shape[1:3]
            patches = patches.reshape(values.shape[0], -1, patches.shape[3])
            content = patches.astype(self.dtype) @ self.patch_proj()[key].astype(self.dtype)
        else:
            grid = stream.grid_shape(values.shape)
            grid = grid if len(grid) == 2 else (round(grid[0] ** 0.5),) * 2
            ids = values.reshape(values.shape[0], -1, *stream.codes)
            if stream.codes:
                content = self.encoder_codebook_emb()[key](ids)
            else:
                table = jnp.asarray(self.encoder_token_emb()[key])  # loaded weights may be NumPy's, which traced ids cannot index
                content = table[ids].astype(self.dtype)
        return content, self.place(stream, self.encoder_pos_emb()[key], content.shape[:2], positions, grid)

    def place(
        self, stream: Stream, table: jax.Array, shape: tuple[int, int], positions: jax.Array | None, grid: tuple[int, int]
    ) -> jax.Array:
        """Position plus modality embedding ``[*shape, D]``; without `positions`, of a whole image of `grid` patches or a whole sequence."""
        if stream.kind != "sequence" and positions is None:
            own = (self.config.grid_of(stream),) * 2
            table = resize_bicubic(table.reshape(*own, -1), tuple(grid)).reshape(-1, self.config.dim)
        positions = jnp.broadcast_to(jnp.arange(shape[1]), shape) if positions is None else positions
        return (jnp.asarray(table)[positions] + self.mod_emb()[stream.key]).astype(self.dtype)

    def touch_embeddings(self) -> None:
        """Reads every variable of this class once, as `init` must."""
        for table in (self.mod_emb, self.patch_proj, self.encoder_token_emb, self.encoder_pos_emb):
            table()
        for fusion in self.encoder_codebook_emb().values():
            fusion(jnp.zeros((1, fusion.num_codebooks), jnp.int32))

    def stream(self, key: str, streams: Sequence[Stream]) -> Stream:
        """The stream called `key`; a ValueError names those that there are."""
        for stream in streams:
            if stream.key == key:
                return stream
        raise ValueError(f"This model has no stream {key!r}; it has {', '.join(s.key for s in streams)}.")


def patchify(pixels: jax.Array, patch_size: int) -> jax.Array:
    """``[B, H, W, C]`` -> ``[B, H/P, W/P, P*P*C]``: inside a patch (row, column, channel), channel fastest (spec 3.1).

    Whole rows of P*C numbers move.
    """
    b, height, width, channels = pixels.shape
    h, w = height // patch_size, width // patch_size
    return pixels.reshape(b, h, patch_size, w, patch_size * channels).swapaxes(2, 3).reshape(b, h, w, -1)
