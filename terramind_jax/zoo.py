"""Facts about the released models: sizes of the four transformers (spec 2.1)."""

from __future__ import annotations

SIZES: dict[str, dict[str, object]] = {
    "tiny": dict(dim=192, encoder_depth=12, decoder_depth=4, num_heads=3, gated_mlp=False, use_bias=True),
    "small": dict(dim=384, encoder_depth=12, decoder_depth=6, num_heads=6, gated_mlp=False, use_bias=True),
    "base": dict(dim=768, encoder_depth=12, decoder_depth=12, num_heads=12, gated_mlp=True, use_bias=False),
    "large": dict(dim=1024, encoder_depth=24, decoder_depth=24, num_heads=16, gated_mlp=True, use_bias=False),
}

# Unique parameters of the published encoder-decoder (spec 2.1).
PARAMETERS = {"tiny": 52_059_456, "small": 124_259_712, "base": 376_091_904, "large": 942_095_360}
