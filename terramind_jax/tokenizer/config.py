"""What one tokenizer is: its modality, its codebook and the size of its networks (spec 6.1)."""

from __future__ import annotations

import dataclasses
import math

from terramind_jax.modalities import MODALITIES, Stream

GROUPS = 32  # of channels that the U-Net normalises together


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Defaults are the released v1 tokenizers'; LULC has 10 channels and levels (7, 5, 5, 5, 5).

    With several codebooks the latent is split into `num_codebooks` groups of ``len(levels)``, each a token of its own.
    With depth 0 there is no attention and a token describes its own patch alone. `image_size` only fixes the stored grid of
    positions: any image whose sides are multiples of `patch_size` can be encoded. The decoder is "vit" or, as all released ones but
    LULC's, "unet"; from `decoder_patch_size` on, fields are of the latter.
    """

    modality: str
    channels: int
    levels: tuple[int, ...] = (8, 8, 8, 6, 5)
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    decoder: str = "vit"
    num_codebooks: int = 1
    image_size: int = 256
    patch_size: int = 16
    dtype: str = "float32"
    unroll: int = 1
    decoder_patch_size: int = 4
    model_channels: int = 256
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        if self.dim % self.num_heads or self.dim % 4:
            raise ValueError(f"Tokenizer dim {self.dim} must be a multiple of 4 and of num_heads {self.num_heads}.")
        if self.image_size % self.patch_size:
            raise ValueError(f"Tokenizer image_size {self.image_size} must be a multiple of patch_size {self.patch_size}.")
        if self.decoder == "unet" and any(self.model_channels * m % GROUPS for m in self.channel_mult):
            raise ValueError(f"Tokenizer model_channels {self.model_channels} must be a multiple of {GROUPS}, its groups of channels.")

    @property
    def codebook_size(self) -> int:
        """Number of tokens a codebook distinguishes."""
        return math.prod(self.levels)

    def check_stream(self, stream: Stream, what: str) -> None:
        """Raises a ValueError if tokens of this tokenizer, which is `what`, are not those that a model reads or writes as `stream`."""
        found, wanted = (self.codebook_size, self.num_codebooks), (stream.vocab_size, stream.num_codebooks)
        if found != wanted:
            of = [f"{size} codes" if number == 1 else f"{number} codebooks of {size} codes" for size, number in (found, wanted)]
            raise ValueError(f"{what} has {of[0]}, but the model was trained with {of[1]}.")

    @property
    def latent_dim(self) -> int:
        return self.num_codebooks * len(self.levels)

    @property
    def grid(self) -> int:
        """Side of the stored grid of positions."""
        return self.image_size // self.patch_size

    @property
    def decoder_multiple(self) -> int:
        """Images can be decoded if their sides are multiples of this: the U-Net halves its grid of patches once a level."""
        if self.decoder != "unet":
            return self.patch_size
        return math.lcm(self.patch_size, self.decoder_patch_size * 2 ** (len(self.channel_mult) - 1))

    @property
    def is_class_map(self) -> bool:
        """Whether images are classes, one-hot on input and logits on output, rather than measurements."""
        return self.modality in MODALITIES and MODALITIES[self.modality].kind == "classes"
