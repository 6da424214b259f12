"""The released models with networks that a test builds at once; names and options stay the real ones."""

from __future__ import annotations

import dataclasses

import pytest

from terramind_jax import build, zoo
from terramind_jax.tokenizer import Tokenizer

NANO = dict(dim=64, encoder_depth=2, decoder_depth=1, num_heads=1, gated_mlp=False, use_bias=True)
UNET = dict(model_channels=32, channel_mult=(1,), num_res_blocks=1)


def shrink(monkeypatch: pytest.MonkeyPatch, *sizes: str) -> None:
    """Makes the transformers of these sizes and every tokenizer small."""

    def small(modality, version, **options):
        released = tokenizer_of(modality, version).config
        return Tokenizer(dataclasses.replace(released, dim=32, depth=1, num_heads=2, **UNET, **options))

    tokenizer_of = build.tokenizer_of
    for size in sizes:
        monkeypatch.setitem(zoo.SIZES, size, NANO)
    monkeypatch.setattr(build, "tokenizer_of", small)
