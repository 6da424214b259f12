"""The analytic count against XLA's own, for programs without a loop, and against the products of the traced program."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta

from terramind_jax import flops, modalities
from terramind_jax import model as networks
from terramind_jax import tokenizer as tokenizers


def xla_flops(f, *arguments) -> float:
    return jax.jit(f).lower(*arguments).compile().cost_analysis()["flops"]


TARGETS = 49


def forward_of(**settings):
    """The configuration of a small transformer, its forward pass from a whole image to logits, and abstract arguments."""
    config = networks.TransformerConfig(
        dim=256,
        encoder_depth=2,
        decoder_depth=2,
        num_heads=4,
        use_bias=False,
        encoder=tuple(modalities.STREAMS[k] for k in ("untok_dem@224", "untok_sen2l2a@224")),
        decoder=(modalities.STREAMS["tok_lulc@224"],),
        **settings,
    )
    module = networks.TerraMind(config)
    variables = jax.eval_shape(lambda key: meta.unbox(networks.init(module, key)), jax.random.key(0))

    def forward(variables, image, positions):
        content, emb = module.apply(variables, "untok_sen2l2a@224", image, method="embed")
        context = module.apply(variables, content, emb, None, method="encode")
        y = module.apply(variables, "tok_lulc@224", positions, method="queries")
        y = module.apply(variables, y, context, None, method="decode")
        return module.apply(variables, "tok_lulc@224", y, method="logits")

    shapes = jax.ShapeDtypeStruct((1, 224, 224, 12), jnp.float32), jax.ShapeDtypeStruct((1, TARGETS), jnp.int32)
    return config, forward, (variables, *shapes)


@pytest.mark.parametrize("gated", [False, True])
def test_transformer_agrees_with_xla(gated):
    config, forward, arguments = forward_of(gated_mlp=gated, unroll=2)
    formula = flops.transformer_forward(config, 196, TARGETS, {"untok_sen2l2a@224": 196}, {"tok_lulc@224": TARGETS})
    assert formula == flops.traced(forward, *arguments)
    assert formula == pytest.approx(xla_flops(forward, *arguments), rel=0.03)  # XLA adds softmax, norms and activations


def test_codebooks_cost_an_mlp_either_way():
    stream = dataclasses.replace(modalities.STREAMS["tok_lulc@224"], vocab_size=8, num_codebooks=4)
    sizes = dict(dim=64, encoder_depth=1, decoder_depth=1, num_heads=1, gated_mlp=False, use_bias=True)
    module = networks.TerraMind(networks.TransformerConfig(**sizes, encoder=(stream,), decoder=(stream,)))
    variables = jax.eval_shape(lambda key: meta.unbox(networks.init(module, key)), jax.random.key(0))

    def forward(variables, codes, positions):
        def run(bound):
            context = bound.encode(*bound.embed(stream.key, codes))
            return bound.logits(stream.key, bound.decode(bound.queries(stream.key, positions), context, None))

        return module.apply(variables, method=run)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 14, 14, 4), (1, TARGETS))]
    assert flops.transformer_forward(module.config, 196, TARGETS) == flops.traced(forward, variables, *shapes)


def test_convolutions_are_counted():
    """Whatever their layout and groups; each output is a sum over the kernel."""

    def forward(x, kernel, last):
        y = jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2)
        return jax.lax.scan(lambda y, _: (y @ last, None), y, length=3)[0]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 8, 8, 4), (3, 3, 2, 6), (6, 6))]
    assert flops.traced(forward, *shapes) == 2 * (16 * 6) * (9 * 2) + 3 * 2 * 16 * 6 * 6


def test_the_largest_branch_and_one_pass_of_a_while_are_counted():
    """The former also within a scan."""

    def branched(x, _):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x @ x, x), None

    def repeated(x):
        return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x)

    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    assert flops.traced(lambda x: branched(x, None), x) == 2 * 2 * 4**3
    assert flops.traced(lambda x: jax.lax.scan(branched, x, length=3), x) == 3 * 2 * 2 * 4**3
    assert flops.traced(repeated, x) == 2 * 4**3


@pytest.mark.parametrize("gated", [False, True])
def test_what_a_remat_policy_repeats(gated):
    counted, formula = {}, {}
    for remat in ("none", "dots", "full"):
        config, forward, arguments = forward_of(gated_mlp=gated, remat=remat)
        gradient = jax.grad(lambda *a, f=forward: f(*a).sum(), allow_int=True)
        counted[remat] = flops.traced(gradient, *arguments)
        formula[remat] = flops.transformer_recomputed(config, 196, TARGETS)
    assert formula == {remat: count - counted["none"] for remat, count in counted.items()}
    assert 0 == formula["none"] < formula["dots"] < formula["full"]


@pytest.mark.parametrize("decoder", ["vit", "unet"])
def test_tokenizer_agrees_with_xla(decoder):
    sizes = dict(decoder=decoder, model_channels=64, channel_mult=(1, 2, 3), num_res_blocks=2)
    config = tokenizers.TokenizerConfig("DEM", 1, dim=256, depth=2, num_heads=4, unroll=2, **sizes)
    module = tokenizers.Tokenizer(config)
    variables = jax.eval_shape(lambda key: meta.unbox(tokenizers.init(module, key)), jax.random.key(0))
    image = jax.ShapeDtypeStruct((1, 224, 224, 1), jnp.float32)
    noised = (image, jax.ShapeDtypeStruct((1,), jnp.int32)) if decoder == "unet" else ()
    counted = xla_flops(module.apply, variables, image, *noised)
    assert flops.tokenizer_forward(config, 224) == pytest.approx(counted, rel=0.05)


def test_a_step_is_three_forwards_of_the_batch():
    config = networks.TransformerConfig(dim=64, encoder_depth=1, decoder_depth=1, num_heads=1, gated_mlp=False, use_bias=True)
    assert flops.transformer_step(config, 8, 16, 16) == 24 * flops.transformer_forward(config, 16, 16)


def test_peak_of_this_machine_is_measured():
    assert flops.peak() * jax.local_device_count() > 1e9


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5p", "v5p"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU v4", "v4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100"),
    ],
)
def test_a_device_has_its_own_peak(kind, name):
    assert flops.known_peak(kind) == flops.PEAK[name]


@pytest.mark.parametrize("kind", ["NVIDIA GeForce RTX 4060", "NVIDIA T400", "TPU v50", ""])
def test_the_peak_of_another_device_is_not_known(kind):
    assert flops.known_peak(kind) == 0
