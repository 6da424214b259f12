"""TerraMind's encoder-decoder over pixel patches, image tokens and sequences (spec 3 and 4).

The encoder reads *slots*: any mix of patches and tokens of one scene, each with its stream, position and content. The decoder
predicts the tokens of target slots. Training gathers the selected patches before projecting them and never forms logits over
another modality's vocabulary; `embed`, `encode`, `queries`, `decode` and `logits` are the same network in the steps that
generation takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from terramind_jax import modalities
from terramind_jax.modalities import Stream
from terramind_jax.model import codebooks, loss
from terramind_jax.model.embeddings import NORMAL, Embedder, Positions, token_tables
from terramind_jax.model.layers import DecoderBlock, EncoderBlock, LayerNorm, Linear, stack, xavier
from terramind_jax.model.positions import resize_bicubic

PADDING = 255  # value of input_modality and target_modality in a slot that holds nothing


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of one model (spec 2.1). `encoder` and `decoder` list the streams that may be inputs and targets."""

    dim: int
    encoder_depth: int
    decoder_depth: int
    num_heads: int
    gated_mlp: bool
    use_bias: bool
    mlp_ratio: float = 4.0
    encoder: tuple[Stream, ...] = modalities.ENCODER_STREAMS
    decoder: tuple[Stream, ...] = modalities.DECODER_STREAMS
    image_size: int = modalities.IMAGE_SIZE
    patch_size: int = modalities.PATCH_SIZE
    dtype: str = "float32"  # of activations and products; parameters, LayerNorm statistics, softmax and loss stay float32
    attention: str = "xla"  # xla | cudnn
    remat: str = "none"  # none | dots | full
    unroll: int = 1  # layers per iteration of the scan

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    def patch_size_of(self, stream: Stream) -> int:
        return self.patch_size

    def grid_of(self, stream: Stream) -> int:
        """Patches along one side of an image stream; 0 for a sequence."""
        return 0 if stream.kind == "sequence" else self.grid

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Every stream once; a stream that is both input and target has one modality embedding (spec 3.6)."""
        return tuple({s.key: s for s in (*self.encoder, *self.decoder)}.values())


class TerraMind(Embedder):
    """The pretraining model. Variables are ``{"params", "buffers"}``; every method is pure under ``module.apply``."""

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        self.setup_embeddings()
        # The reference's initialisation reaches decoder tables through the tied output projection, so they are Xavier (spec 4.8).
        self.decoder_token_emb = token_tables(c.decoder, c.dim, xavier)
        self.decoder_codebook_head = codebooks.PerStream(codebooks.CodebookLogits, c.decoder, c.dim, self.dtype)
        self.decoder_pos_emb = Positions({s.key: c.grid_of(s) for s in c.decoder}, c.dim)
        self.mask_token = self.param("mask_token", nn.with_logical_partitioning(NORMAL, ("norm",)), (c.dim,))
        block = dict(num_heads=c.num_heads, mlp_ratio=c.mlp_ratio, gated_mlp=c.gated_mlp, use_bias=c.use_bias, dtype=self.dtype)
        block["attention"] = c.attention
        self.encoder = stack(EncoderBlock, c.encoder_depth, c.remat, c.unroll, broadcast=1)(**block)
        self.decoder = stack(DecoderBlock, c.decoder_depth, c.remat, c.unroll, broadcast=3)(**block)
        self.encoder_norm = LayerNorm(self.dtype)
        self.decoder_norm = LayerNorm(self.dtype)
        self.decoder_proj_context = Linear((c.dim,), ("embed", None), use_bias=True, dtype=self.dtype)  # biased in every variant

    # ---- training: slots in, losses out ----

    def losses(self, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """One pass over a batch of slots (the format is described in `terramind_jax.data.pipeline`).

        Returns:
          Sum of cross-entropies and number of targets per decoder stream, both ``[len(config.decoder)]`` float32.
        """
        content, emb = self._input_slots(batch)
        padding = batch["input_modality"] == PADDING
        context = self.encode(content, emb, padding)
        y = self.decode(self._target_slots(batch), context, padding, self._target_mask(batch))
        modality = batch["target_modality"].reshape(-1)
        return self._loss_sums(y.reshape(-1, self.config.dim), modality, batch), loss.count(modality, len(self.config.decoder))

    def _loss_sums(self, y: jax.Array, modality: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Sum of cross-entropies per decoder stream, of decoder outputs ``[B * M, D]`` of the streams `modality` ``[B * M]``."""
        tables, heads, ids = self.decoder_token_emb(), self.decoder_codebook_head(), batch["target_id"].reshape(-1)
        if not heads:
            return loss.cross_entropy(y, list(tables.values()), ids, modality, self.dtype)
        place = {s.key: m for m, s in enumerate(self.config.decoder)}
        sums = {}
        for key, head in heads.items():
            codes = batch["target_codes"][..., : head.num_codebooks].reshape(-1, head.num_codebooks)
            sums[key] = codebooks.cross_entropy(head, y, codes, modality == place[key])
        if tables:
            among = np.full(PADDING + 1, PADDING)
            among[[place[key] for key in tables]] = np.arange(len(tables))
            own = loss.cross_entropy(y, list(tables.values()), ids, jnp.asarray(among)[modality], self.dtype)
            sums |= dict(zip(tables, own, strict=True))
        return jnp.stack([sums[s.key] for s in self.config.decoder])

    def _input_slots(self, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Content and position-plus-modality embedding of the input slots, both ``[B, N, D]``, zero on padding (spec 4.1)."""
        modality, ids = batch["input_modality"], batch["input_id"]
        b, n = modality.shape
        content = jnp.zeros((b, n, self.config.dim), self.dtype)
        for m, stream in enumerate(self.config.encoder):
            if stream.kind == "pixels":
                if stream.key in batch["patches"]:
                    content += self._patch_slots(stream, batch["patches"][stream.key], jnp.where(modality == m, ids, -1))
            elif stream.codes:
                content += self._code_slots(stream, batch["input_codes"], modality == m)
            else:
                content += _rows(self.encoder_token_emb()[stream.key], jnp.where(modality == m, ids, -1)).astype(self.dtype)
        return content, self._slot_embedding(self.config.encoder, self.encoder_pos_emb(), modality, batch["input_position"])

    def _patch_slots(self, stream: Stream, patches: jax.Array, rows: jax.Array) -> jax.Array:
        """Projects a buffer ``[groups, capacity, P*P*C]`` of stored values and deals its rows out; -1 takes none -> ``[B, N, D]``."""
        groups, capacity, width = patches.shape
        pixels = patches.reshape(groups, capacity, width // stream.channels, stream.channels)
        pixels = modalities.standardize(stream.modality, pixels).reshape(patches.shape)
        projected = pixels.astype(self.dtype) @ self.patch_proj()[stream.key].astype(self.dtype)
        slots = jax.vmap(_rows)(projected, rows.reshape(groups, -1))
        return slots.reshape(*rows.shape, self.config.dim)

    def _code_slots(self, stream: Stream, codes: jax.Array, mine: jax.Array) -> jax.Array:
        """Embeddings ``[B, N, D]`` of one stream's slots, `mine` ``[B, N]``, from their codes ``[B, N, K or more]``; zero in the others."""
        codes = codes[..., : stream.num_codebooks].reshape(-1, stream.num_codebooks)
        slots = codebooks.fused(self.encoder_codebook_emb()[stream.key], codes, mine.reshape(-1))
        return slots.reshape(*mine.shape, self.config.dim)

    def _target_slots(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Decoder inputs ``[B, M, D]``: the mask token for images, the previous token for sequences, plus embeddings (spec 4.2)."""
        modality = batch["target_modality"]
        is_image = sum((modality == m for m, s in enumerate(self.config.decoder) if s.kind != "sequence"), jnp.zeros(modality.shape, bool))
        content = is_image[..., None] * self.mask_token.astype(self.dtype)
        for m, stream in enumerate(self.config.decoder):
            if stream.kind == "sequence":
                previous = jnp.where(modality == m, batch["target_input"], -1)
                content += _rows(self.decoder_token_emb()[stream.key], previous).astype(self.dtype)
        return content + self._slot_embedding(self.config.decoder, self.decoder_pos_emb(), modality, batch["target_position"])

    def _target_mask(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """``[B, 1, M, M]``, True = hidden: all-to-all within an image modality, causal within a sequence, nothing across (spec 4.3)."""
        modality, position = batch["target_modality"], batch["target_position"]
        causal = sum((modality == m for m, s in enumerate(self.config.decoder) if s.kind == "sequence"), jnp.zeros(modality.shape, bool))
        other = modality[:, :, None] != modality[:, None, :]
        future = causal[:, :, None] & (position[:, None, :] > position[:, :, None])
        return (other | future | (modality == PADDING)[:, None, :])[:, None]

    def _slot_embedding(self, streams, tables: Mapping[str, jax.Array], modality: jax.Array, position: jax.Array) -> jax.Array:
        """Position plus modality embedding of slots, zero on padding."""
        lengths = jnp.asarray([tables[s.key].shape[0] for s in streams])
        rows = jnp.append(jnp.cumsum(lengths) - lengths, 0)[jnp.minimum(modality, len(streams))] + position
        pos = _rows(jnp.concatenate([tables[s.key] for s in streams]), jnp.where(modality == PADDING, -1, rows))
        mod_emb = self.mod_emb()
        one_hot = jax.nn.one_hot(modality, len(streams), dtype=jnp.float32)
        return (pos + one_hot @ jnp.stack([mod_emb[s.key] for s in streams])).astype(self.dtype)

    # ---- the same network, step by step ----

    def features(self, content: jax.Array, emb: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """The encoder's normalised output ``[B, N, D]`` of slots ``[B, N, D]`` twice; mask ``[B, N]``, True = hidden."""
        mask = None if mask is None else mask[:, None, None, :]
        x = nn.with_logical_constraint(content + emb, ("batch", "tokens", None))
        return self.encoder_norm(self.encoder(x, mask)[0])

    def encode(self, content: jax.Array, emb: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """What the decoder looks at, ``[B, N, D]`` (spec 4.4): the projected `features`, with the slots' embeddings once more."""
        return self.decoder_proj_context(self.features(content, emb, mask)) + emb

    def queries(self, key: str, positions: jax.Array, ids: jax.Array | None = None) -> jax.Array:
        """Decoder inputs ``[B, m, D]`` at `positions` ``[B, m]``: mask tokens of an image stream, or the tokens `ids` of a sequence."""
        stream = self.stream(key, self.config.decoder)
        emb = self.place(stream, self.decoder_pos_emb()[key], positions.shape, positions, (self.config.grid,) * 2)
        if stream.kind == "sequence":
            return jnp.asarray(self.decoder_token_emb()[key])[ids].astype(self.dtype) + emb
        return self.mask_token.astype(self.dtype) + emb

    def decode(self, y: jax.Array, context: jax.Array, context_mask: jax.Array | None, self_mask: jax.Array | None = None) -> jax.Array:
        """Decoder blocks and final norm: y ``[B, M, D]``, context ``[B, N, D]``, masks ``[B, N]`` and ``[B, (1,) M, M]``, True = hidden."""
        context_mask = None if context_mask is None else context_mask[:, None, None, :]
        self_mask = self_mask[:, None] if self_mask is not None and self_mask.ndim == 3 else self_mask
        y, _ = self.decoder(y, self_mask, context, context_mask)
        return self.decoder_norm(y)

    def logits(self, key: str, y: jax.Array) -> jax.Array:
        """``[..., D]`` -> ``[..., V]`` float32 over the vocabulary of one stream, by its tied token embedding (spec 3.4).

        Of a stream with K codebooks ``[..., K, V]``, by an MLP.
        """
        heads = self.decoder_codebook_head()
        if key in heads:
            return heads[key](y)
        return jnp.dot(y.astype(self.dtype), self.decoder_token_emb()[key].astype(self.dtype).T, preferred_element_type=jnp.float32)

    def everything(self) -> jax.Array:
        """Touches every parameter once: what `init` runs."""
        self.touch_embeddings()
        for table in (self.decoder_token_emb, self.decoder_pos_emb):
            table()
        tokens = jnp.zeros((1, 1, self.config.dim), self.dtype)
        y = self.decode(tokens, self.encode(tokens, tokens), None)
        for head in self.decoder_codebook_head().values():
            head(y)
        return y


def _rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """``table[index]``, zeros where `index` is negative; those rows send no gradient back."""
    index = jnp.where(index < 0, table.shape[0], index)
    return table.at[index].get(mode="fill", fill_value=0)


def init(module: TerraMind, key: jax.Array) -> dict:
    """Fresh variables ``{"params", "buffers"}`` as spec 4.8, boxed with logical axes (`flax.core.meta.unbox` removes the boxes)."""
    return module.init(key, method="everything")


def at_size(module: TerraMind, variables: Mapping[str, Any], image_size: int) -> tuple[TerraMind, Mapping[str, Any]]:
    """The same network for images of another size, a multiple of the patch size: positions are interpolated (spec 5.6)."""
    config = module.config
    if image_size == config.image_size:
        return module, variables
    grid = (image_size // config.patch_size,) * 2

    def resize(tables: Mapping[str, jax.Array], streams: Sequence[Stream]) -> dict[str, jax.Array]:
        images = {s.key for s in streams if s.kind != "sequence"}
        own = (config.grid, config.grid, config.dim)
        return {k: resize_bicubic(jnp.reshape(x, own), grid).reshape(-1, config.dim) if k in images else x for k, x in tables.items()}

    buffers = dict(meta.unbox(variables)["buffers"])
    buffers["encoder_pos_emb"] = resize(buffers["encoder_pos_emb"], config.encoder)
    buffers["decoder_pos_emb"] = resize(buffers["decoder_pos_emb"], config.decoder)
    return TerraMind(dataclasses.replace(config, image_size=image_size)), {**variables, "buffers": buffers}
