"""The analytic count against XLA's own, for programs without a loop."""

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta

from terramind_jax import flops, modalities
from terramind_jax import model as networks
from terramind_jax import tokenizer as tokenizers


def xla_flops(f, *arguments) -> float:
    return jax.jit(f).lower(*arguments).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("gated", [False, True])
def test_transformer_agrees_with_xla(gated):
    config = networks.TransformerConfig(
        dim=256,
        encoder_depth=2,
        decoder_depth=2,
        num_heads=4,
        gated_mlp=gated,
        use_bias=False,
        unroll=2,
        encoder=tuple(modalities.STREAMS[k] for k in ("untok_dem@224", "untok_sen2l2a@224")),
        decoder=(modalities.STREAMS["tok_lulc@224"],),
    )
    module = networks.TerraMind(config)
    variables = jax.eval_shape(lambda key: meta.unbox(networks.init(module, key)), jax.random.key(0))
    targets = 49

    def forward(variables, image, positions):
        content, emb = module.apply(variables, "untok_sen2l2a@224", image, method="embed")
        context = module.apply(variables, content, emb, None, method="encode")
        y = module.apply(variables, "tok_lulc@224", positions, method="queries")
        y = module.apply(variables, y, context, None, method="decode")
        return module.apply(variables, "tok_lulc@224", y, method="logits")

    image = jax.ShapeDtypeStruct((1, 224, 224, 12), jnp.float32)
    counted = xla_flops(forward, variables, image, jax.ShapeDtypeStruct((1, targets), jnp.int32))
    formula = flops.transformer_forward(config, 196, targets, {"untok_sen2l2a@224": 196}, {"tok_lulc@224": targets})
    assert formula == pytest.approx(counted, rel=0.05)  # XLA adds softmax, norms and activations


def test_tokenizer_agrees_with_xla():
    config = tokenizers.TokenizerConfig("DEM", 1, dim=256, depth=2, num_heads=4, unroll=2)
    module = tokenizers.Tokenizer(config)
    variables = jax.eval_shape(lambda key: meta.unbox(tokenizers.init(module, key)), jax.random.key(0))
    counted = xla_flops(module.apply, variables, jax.ShapeDtypeStruct((1, 224, 224, 1), jnp.float32))
    assert flops.tokenizer_forward(config, 224) == pytest.approx(counted, rel=0.05)


def test_a_step_is_three_forwards_of_the_batch():
    config = networks.TransformerConfig(dim=64, encoder_depth=1, decoder_depth=1, num_heads=1, gated_mlp=False, use_bias=True)
    assert flops.transformer_step(config, 8, 16, 16) == 24 * flops.transformer_forward(config, 16, 16)


def test_peak_of_this_machine_is_measured():
    assert flops.peak() * jax.local_device_count() > 1e9
