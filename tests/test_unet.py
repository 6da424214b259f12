"""The diffusion decoder's network: its parts against plain formulas, the released ones' sizes (spec 6.1, 6.5, 10.4, 12)."""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terramind_jax import tokenizer
from terramind_jax.convert import rules as convert
from terramind_jax.convert import tokenizers
from terramind_jax.tokenizer import conv, unet

SMALL = tokenizer.TokenizerConfig(
    "S1GRD", 2, dim=32, depth=1, num_heads=2, image_size=64, decoder="unet", model_channels=32, channel_mult=(1, 2), num_res_blocks=1
)
FAST = {"xla_backend_optimization_level": 0}


def shapes(config):
    return nn.unbox(jax.eval_shape(lambda: tokenizer.init(tokenizer.Tokenizer(config), jax.random.key(0))))


def build(config, scale=0.2):
    """Variables drawn by NumPy: nothing is zero, as it would be after initialisation."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(scale=scale, size=leaf.shape).astype(np.float32), shapes(config))


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def predict(config, variables, codes, x, t):
    run = jax.jit(lambda *arrays: tokenizer.Tokenizer(config).apply(*arrays, method="predict"), compiler_options=FAST)
    return run(variables, codes, x, t)


@pytest.fixture(scope="module")
def variables():
    return build(SMALL)


@pytest.fixture(scope="module")
def inputs():
    """Codes and noisy images of 64 x 32 pixels, and timesteps."""
    codes = np.random.default_rng(1).uniform(size=(2, 4, 2, 5)).astype(np.float32)
    return codes, normal(2, (2, 64, 32, 2)), np.array([999, 12])


# The released models


@pytest.mark.parametrize(
    ("modality", "channels", "count"), [("S2L2A", 12, 289_290_693), ("S1RTC", 2, 286_587_173), ("NDVI", 1, 286_316_821)]
)
def test_released_tokenizers_have_the_references_parameters(modality, channels, count):
    config = tokenizer.TokenizerConfig(modality, channels, decoder="unet")
    names = convert.shapes(shapes(config), tokenizers.rules(config))
    assert len(names) == 601 and sum(math.prod(shape) for shape in names.values()) == count
    assert names["decoder.input_blocks.0.0.weight"] == (256, 16 * channels + 5, 3, 3)
    assert names["decoder.input_blocks.5.0.skip_connection.weight"] == (512, 256, 1, 1)
    assert names["decoder.input_blocks.12.0.op.weight"] == (512, 512, 3, 3)
    assert names["decoder.output_blocks.11.0.in_layers.2.weight"] == (512, 768, 3, 3)
    assert names["decoder.output_blocks.7.1.qkv.weight"] == (1536, 512, 1)
    assert names["decoder.output_blocks.7.2.conv.bias"] == names["decoder.output_blocks.11.1.conv.bias"] == (512,)
    assert names["encoder.pos_emb"] == (1, 768, 16, 16)


@pytest.mark.parametrize("channels", [10, 9])
def test_released_lulc_tokenizers_have_the_references_names(channels):
    config = tokenizer.TokenizerConfig("LULC", channels, levels=(7, 5, 5, 5, 5))
    names = convert.shapes(shapes(config), tokenizers.rules(config))
    assert len(names) == 310
    assert names["decoder.out_proj.weight"] == (256 * channels, 768) and names["post_quant_proj.weight"] == (768, 5, 1, 1)


def test_a_fresh_network_predicts_zero(inputs):
    fresh = jax.jit(lambda key: nn.unbox(tokenizer.init(tokenizer.Tokenizer(SMALL), key)), compiler_options=FAST)(jax.random.key(0))
    assert not fresh["params"]["decoder"]["middle"]["attn"]["proj"]["kernel"].any()
    assert not fresh["params"]["decoder"]["up_1"]["res_0"]["conv2"]["kernel"].any()
    kernel = fresh["params"]["decoder"]["down_1"]["res_0"]["conv1"]["kernel"]
    assert 0.9 * (9 * 32) ** -0.5 < np.abs(kernel).max() <= (9 * 32) ** -0.5
    assert not predict(SMALL, fresh, *inputs).any()


# Parts


def test_timestep_embedding_is_the_references():
    embedding = unet.timestep_embedding(jnp.array([999]), 256)[0]  # spec 12
    expected = [0.999650, 0.963785, 0.994243, -0.026461, -0.266679, 0.107147]
    np.testing.assert_allclose(embedding[np.array([0, 1, 127, 128, 129, 255])], expected, atol=2e-5)


def test_patches_have_their_channels_slowest():
    x = normal(0, (2, 8, 12, 3))
    patches = unet.to_patches(x, 4)
    np.testing.assert_array_equal(patches[1, 1, 2].reshape(3, 4, 4), x[1, 4:8, 8:12].transpose(2, 0, 1))
    np.testing.assert_array_equal(unet.from_patches(patches, 4), x)


def test_enlarging_repeats_every_place():
    x = normal(0, (2, 3, 4, 5))
    np.testing.assert_array_equal(unet.enlarge(x, 3), x.repeat(3, axis=1).repeat(3, axis=2))


@pytest.mark.parametrize("shape", [(2, 5, 3, 64), (2, 15, 96)])
def test_group_norm_is_flaxs(shape):
    x = 3 + 2 * normal(0, shape)
    params = {"scale": normal(1, shape[-1:]), "bias": normal(2, shape[-1:])}
    expected = nn.GroupNorm(num_groups=32, epsilon=1e-5).apply({"params": params}, x)
    np.testing.assert_allclose(unet.GroupNorm().apply({"params": params}, x), expected, atol=1e-5)
    np.testing.assert_allclose(unet.GroupNorm(silu=True).apply({"params": params}, x), nn.silu(expected), atol=1e-5)


def test_attention_is_one_head_over_all_places():
    x = normal(0, (2, 3, 2, 32))
    block = unet.AttentionBlock("float32")
    params = jax.tree.map(lambda leaf: normal(leaf.size, leaf.shape) / 4, nn.unbox(jax.eval_shape(block.init, jax.random.key(0), x)))
    p = params["params"]
    tokens = nn.GroupNorm(num_groups=32, epsilon=1e-5).apply({"params": p["norm"]}, x).reshape(2, 6, 32)
    q, k, v = jnp.split(tokens @ p["qkv"]["kernel"] + p["qkv"]["bias"], 3, axis=-1)
    out = jax.nn.softmax(q @ k.swapaxes(1, 2) / np.sqrt(32)) @ v @ p["proj"]["kernel"] + p["proj"]["bias"]
    np.testing.assert_allclose(block.apply(params, x), x + out.reshape(x.shape), atol=1e-4)


# Convolutions


@pytest.mark.parametrize("shape", [(1, 14, 16, 8), (3, 2, 4, 5)])
def test_winograd_is_the_convolution(shape):
    x, kernel = normal(0, shape), normal(1, (3, 3, shape[-1], 7))
    got = jax.jit(conv.winograd)(x, conv.transform_kernel(kernel))
    np.testing.assert_allclose(got, conv.convolve(x, kernel), atol=1e-4)


def test_a_strided_convolution_pads_one_on_each_side():
    x, kernel = normal(0, (1, 4, 4, 3)), normal(1, (3, 3, 3, 2))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.einsum("hwi,hwio->o", padded[0, 2:5, 2:5], kernel)
    np.testing.assert_allclose(conv.convolve(x, kernel, 2)[0, 1, 1], expected, atol=1e-5)


def test_transformed_kernels_change_nothing(variables, inputs):
    codes, x, t = np.tile(inputs[0], (1, 1, 2, 1)), np.tile(inputs[1], (1, 1, 2, 1)), inputs[2]  # a grid of 16 x 16 patches
    kernels = conv.transform_kernels(variables["params"])
    assert kernels["decoder"]["up_0"]["res_1"]["conv1"]["kernel"].shape == (16, 64, 32)
    transformed = {**variables, conv.COLLECTION: kernels}
    assert "f32[16,128,32]" in str(
        jax.make_jaxpr(lambda v: tokenizer.Tokenizer(SMALL).apply(v, codes, x, t, method="predict"))(transformed)
    )
    expected = predict(SMALL, variables, codes, x, t)
    np.testing.assert_allclose(predict(SMALL, transformed, codes, x, t), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("platform", "is_convolution"), [("cpu", False), ("tpu", True), ("cuda", True)])
def test_accelerators_keep_their_convolution(platform, is_convolution):
    layer = conv.Conv(8)
    params = {"kernel": normal(0, (3, 3, 4, 8)), "bias": normal(1, (8,))}
    variables = {"params": params, conv.COLLECTION: conv.transform_kernels(params)}
    lowered = jax.jit(layer.apply).trace(variables, normal(2, (1, 16, 16, 4))).lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.convolution" in lowered) == is_convolution
    assert ("stablehlo.dot_general" in lowered) != is_convolution


# The network


def test_samples_and_their_timesteps_are_independent(variables, inputs):
    codes, x, t = inputs
    both = predict(SMALL, variables, codes, x, t)
    for i in range(2):
        alone = predict(SMALL, variables, codes[i : i + 1], x[i : i + 1], t[i])
        np.testing.assert_allclose(both[i], alone[0], atol=1e-5 * np.abs(alone).max())
    assert both.shape == x.shape
    assert np.abs(both - predict(SMALL, variables, codes, x, np.array([999, 13])))[1].max() > 1e-3
    assert np.abs(both - predict(SMALL, variables, 1 - codes, x, t)).max() > 1e-3


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(variables, inputs):
    half = dataclasses.replace(SMALL, dtype="bfloat16")
    jaxpr = str(jax.make_jaxpr(lambda v: tokenizer.Tokenizer(half).apply(v, *inputs, method="predict"))(variables))
    assert "bf16[3,3,64,64]" in jaxpr and "bf16[2,8,4,64] = conv_general_dilated" in jaxpr
    got, expected = predict(half, variables, *inputs), predict(SMALL, variables, *inputs)
    assert got.dtype == jnp.float32
    assert np.abs(got - expected).mean() < 0.05 * np.abs(expected).mean()


def test_training_reaches_every_parameter(variables, inputs):
    """The forward pass that predicts an image from itself under noise."""
    _, x, t = inputs

    def loss(params):
        prediction, _ = tokenizer.Tokenizer(SMALL).apply({**variables, "params": params}, x, x + 1, t)
        return jnp.square(prediction - x).mean()

    gradients = jax.jit(jax.grad(loss), compiler_options=FAST)(variables["params"])
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
