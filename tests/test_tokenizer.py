"""Tokenizers: shapes and counts of the released ones (spec 6, 10.4, 10.5), and what must hold for a small one."""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terramind_jax import tokenizer
from terramind_jax.model.positions import resize_bicubic, sincos_2d
from terramind_jax.tokenizer import fsq
from terramind_jax.tokenizer.vit import patchify, unpatchify

SMALL = tokenizer.TokenizerConfig("S2L2A", 3, dim=32, depth=2, num_heads=2, image_size=64)
LULC = dataclasses.replace(SMALL, modality="LULC", channels=4, levels=(7, 5, 5, 5, 5))
RELEASED_LULC = tokenizer.TokenizerConfig("LULC", 10, levels=(7, 5, 5, 5, 5))


FAST = {"xla_backend_optimization_level": 0}  # compiles in a third of the time, and nothing here computes for long


def build(config):
    """A jitted module and variables drawn by NumPy, which compiles nothing."""
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.normal(scale=0.2, size=leaf.shape).astype(np.float32), shapes(config))
    positions = sincos_2d(config.grid, config.grid, config.dim).reshape(config.grid, config.grid, config.dim)
    variables["buffers"] = jax.tree.map(lambda _: positions, variables["buffers"])
    return jax.jit(tokenizer.Tokenizer(config).apply, static_argnames="method", compiler_options=FAST), variables


def shapes(config):
    module = tokenizer.Tokenizer(config)
    return nn.unbox(jax.eval_shape(lambda: tokenizer.init(module, jax.random.key(0))))


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def small():
    return build(SMALL)


@pytest.fixture(scope="module")
def lulc():
    return build(LULC)


@pytest.fixture(scope="module")
def image():
    return normal(1, (2, 48, 32, 3))


# The released models


def test_released_lulc_has_the_references_parameter_count():
    variables = shapes(RELEASED_LULC)
    assert count(variables) == 183_894_021  # spec 6.1; the reference counts both pos_emb, parameters to it, buffers to us
    assert count(variables["buffers"]) == 2 * 768 * 16 * 16


@pytest.mark.parametrize(("channels", "millions"), [(12, 92.3), (2, 90.4), (1, 90.2)])
def test_released_encoders_have_the_references_parameter_count(channels, millions):
    variables = shapes(tokenizer.TokenizerConfig("S2L2A", channels))
    assert count([variables["params"]["encoder"], variables["buffers"]["encoder"]]) / 1e6 == pytest.approx(millions, abs=0.05)


def test_released_lulc_has_the_references_parameters():
    params = shapes(RELEASED_LULC)["params"]
    got = {"/".join(k.key for k in path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    block = {
        **{f"{n}/{p}": (12, 768) for n in ("norm1", "norm2") for p in ("scale", "bias")},
        "attn/qkv/kernel": (12, 768, 3, 12, 64),
        "attn/qkv/bias": (12, 3, 12, 64),
        "attn/proj/kernel": (12, 12, 64, 768),
        "attn/proj/bias": (12, 768),
        "mlp/fc1/kernel": (12, 768, 3072),
        "mlp/fc1/bias": (12, 3072),
        "mlp/fc2/kernel": (12, 3072, 768),
        "mlp/fc2/bias": (12, 768),
    }
    trunk = {f"blocks/{k}": v for k, v in block.items()} | {
        "norm_mlp/scale": (768,),
        "norm_mlp/bias": (768,),
        "post_mlp/fc1/kernel": (768, 3072),
        "post_mlp/fc1/bias": (3072,),
        "post_mlp/fc2/kernel": (3072, 768),
        "post_mlp/fc2/bias": (768,),
    }
    encoder = trunk | {"proj/kernel": (16, 16, 10, 768), "proj/bias": (768,)}
    decoder = trunk | {
        "out_proj/kernel": (768, 2560),
        "out_proj/bias": (2560,),
        "post_quant_proj/kernel": (5, 768),
        "post_quant_proj/bias": (768,),
    }
    expected = {f"encoder/{k}": v for k, v in encoder.items()} | {f"decoder/{k}": v for k, v in decoder.items()}
    assert got == expected | {"quant_proj/kernel": (768, 5), "quant_proj/bias": (5,)}


def test_positions_at_224_are_the_references():
    grid = resize_bicubic(sincos_2d(16, 16, 768).reshape(16, 16, 768), (14, 14))  # spec 12
    channels = np.array([0, 1, 192, 384, 576])
    np.testing.assert_allclose(grid[0, 0, channels], [0.047904, 0.046187, 0.977096, 0.047904, 0.977096], atol=2e-6)
    np.testing.assert_allclose(grid[3, 5, channels], [-0.360910, -0.198820, -0.963489, -0.507056, 0.877304], atol=2e-6)


# Initialisation


def test_initialisation_bounds():
    init = jax.jit(lambda key: tokenizer.init(tokenizer.Tokenizer(SMALL), key), compiler_options=FAST)
    variables = nn.unbox(init(jax.random.key(0)))
    params = variables["params"]
    for part in ("encoder", "decoder"):
        np.testing.assert_array_equal(variables["buffers"][part]["pos_emb"].reshape(16, 32), sincos_2d(4, 4, 32))

    def fills(x, bound):
        assert 0.8 * bound < np.abs(x).max() <= bound

    encoder, decoder = params["encoder"], params["decoder"]
    fills(encoder["proj"]["kernel"], (256 * 3) ** -0.5)  # convolutions: PyTorch's default, bias too
    fills(encoder["proj"]["bias"], (256 * 3) ** -0.5)
    fills(params["quant_proj"]["kernel"], 32**-0.5)
    fills(decoder["post_quant_proj"]["kernel"], 5**-0.5)
    fills(decoder["post_quant_proj"]["bias"], 5**-0.5)
    fills(encoder["blocks"]["attn"]["qkv"]["kernel"], (6 / 64) ** 0.5)  # q, k and v each as a matrix of its own
    fills(encoder["blocks"]["attn"]["proj"]["kernel"], (6 / 64) ** 0.5)
    fills(encoder["blocks"]["mlp"]["fc1"]["kernel"], (6 / (32 + 128)) ** 0.5)
    fills(decoder["post_mlp"]["fc2"]["kernel"], (6 / (32 + 128)) ** 0.5)
    fills(decoder["out_proj"]["kernel"], (6 / (32 + 768)) ** 0.5)
    for bias in (decoder["out_proj"]["bias"], encoder["blocks"]["attn"]["qkv"]["bias"], encoder["post_mlp"]["fc1"]["bias"]):
        assert not bias.any()
    layers = encoder["blocks"]["mlp"]["fc1"]["kernel"]
    assert (layers[0] != layers[1]).any()


def test_parameters_carry_logical_axes():
    specs = nn.get_partition_spec(jax.eval_shape(lambda: tokenizer.init(tokenizer.Tokenizer(SMALL), jax.random.key(0))))["params"]
    assert specs["encoder"]["blocks"]["mlp"]["fc1"]["kernel"] == jax.P("layers", "embed", "mlp")
    assert specs["encoder"]["blocks"]["norm1"]["scale"] == jax.P("layers", "norm")
    assert specs["decoder"]["out_proj"]["kernel"][0] == "embed"


# Encoding and decoding


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def everything(config, variables, image):
    """(reconstruction, codes, tokens, decoded tokens) in one program."""
    module = tokenizer.Tokenizer(config)
    tokens = module.apply(variables, image, method="encode")
    return *module.apply(variables, image), tokens, module.apply(variables, tokens, method="decode")


def test_encode_decode_is_the_forward_pass(small, image):
    reconstruction, codes, tokens, decoded = everything(SMALL, small[1], image)
    assert tokens.shape == (2, 3, 2) and tokens.dtype == jnp.int32
    assert reconstruction.shape == image.shape and reconstruction.dtype == jnp.float32
    np.testing.assert_array_equal(fsq.codes_to_tokens(codes, SMALL.levels), tokens)
    np.testing.assert_allclose(decoded, reconstruction, atol=1e-5)


def test_several_codebooks_are_several_tokens_a_patch(image):
    config = dataclasses.replace(SMALL, num_codebooks=3, levels=(8, 5))
    reconstruction, codes, tokens, decoded = everything(config, build(config)[1], image)
    assert tokens.shape == (2, 3, 2, 3) and tokens.max() < config.codebook_size == 40
    assert codes.shape == (2, 3, 2, 6)
    np.testing.assert_array_equal(fsq.codes_to_tokens(codes[..., 2:4], (8, 5)), tokens[..., 1])
    np.testing.assert_allclose(decoded, reconstruction, atol=1e-5)


def test_samples_do_not_see_each_other(small, image):
    apply, variables = small
    changed = image * np.array([1, 0], np.float32)[:, None, None, None]
    np.testing.assert_array_equal(apply(variables, image)[0][0], apply(variables, changed)[0][0])


def test_unrolled_scan_is_the_scan(small, image):
    apply, variables = small
    unrolled, _ = build(dataclasses.replace(SMALL, unroll=2))
    np.testing.assert_allclose(unrolled(variables, image)[0], apply(variables, image)[0], atol=1e-5)


def test_patch_embedding_is_the_strided_convolution(small, image):
    apply, variables = small
    kernel = variables["params"]["encoder"]["proj"]["kernel"]
    expected = jax.lax.conv_general_dilated(image, kernel, (16, 16), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    got = patchify(image, 16) @ kernel.reshape(-1, 32)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_patches_are_row_major_and_return(image):
    patches = patchify(image, 16)
    np.testing.assert_array_equal(patches[1, 2, 1], image[1, 32:48, 16:32].reshape(-1))
    np.testing.assert_array_equal(unpatchify(patches, 16), image)


def test_decoder_stores_its_outputs_channel_major(small, image):
    """Output (c, row, column) of `out_proj` is pixel (row, column), channel c of the patch (spec 6.4)."""
    apply, variables = small
    tokens = jnp.zeros((2, 3, 2), jnp.int32)
    plain = apply(variables, tokens, method="decode")
    changed = jax.tree.map(np.copy, variables)
    changed["params"]["decoder"]["out_proj"]["bias"].reshape(3, 16, 16)[2, 5, 7] += 10
    difference = apply(changed, tokens, method="decode") - plain
    moved = np.argwhere(np.abs(difference[0]) > 1)
    assert (moved % [16, 16, 3] == [5, 7, 2]).all() and len(moved) == 6  # one pixel in each of the 3 x 2 patches


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(small, image):
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    jaxpr = str(jax.make_jaxpr(tokenizer.Tokenizer(config).apply)(small[1], image))
    assert jaxpr.count("bf16[2,6,128]") > 2  # the hidden layer of the blocks' MLP
    assert jax.eval_shape(tokenizer.Tokenizer(config).apply, small[1], image)[0].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes(config))} == {jnp.dtype("float32")}


# Features


def test_features_are_every_layers_outputs_and_both_sides_of_the_quantizer(small, image):
    config = dataclasses.replace(SMALL, depth=3)
    module, (_, variables) = tokenizer.Tokenizer(config), build(config)
    features = jax.jit(lambda kind: module.apply(variables, image, kind, method="features"), static_argnums=0, compiler_options=FAST)
    layers = features("embedding")
    assert [x.shape for x in layers] == [(2, 3, 2, 32)] * 3 and {x.dtype for x in layers} == {jnp.dtype("float32")}
    np.testing.assert_allclose(
        layers[-1], jax.jit(lambda v: module.apply(v, image, method=lambda m, x: m.encoder(x)))(variables), atol=1e-4
    )
    latent, quantized = features("latent"), features("quantized")
    projected = layers[-1] @ variables["params"]["quant_proj"]["kernel"] + variables["params"]["quant_proj"]["bias"]
    np.testing.assert_allclose(latent, projected, atol=1e-4)
    np.testing.assert_array_equal(quantized, fsq.quantize(latent, config.levels))
    with pytest.raises(ValueError, match="Unknown return_type 'tokens'; known types: embedding, latent, quantized"):
        features("tokens")


# LULC


def test_class_maps_are_their_one_hot(lulc):
    apply, variables = lulc
    classes = np.random.default_rng(2).integers(0, 4, (2, 32, 32))
    expected = apply(variables, np.eye(4, dtype=np.float32)[classes], method="encode")
    np.testing.assert_array_equal(apply(variables, classes, method="encode"), expected)
    np.testing.assert_array_equal(apply(variables, classes[..., None].astype(np.uint8), method="encode"), expected)


def test_loss_of_class_maps_is_cross_entropy():
    loss = jax.jit(functools.partial(tokenizer.reconstruction_loss, LULC))
    logits = normal(3, (2, 16, 32, 4))
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    classes = np.random.default_rng(4).integers(0, 4, (2, 16, 32))
    expected = -np.take_along_axis(log_probability, classes[..., None], -1)[..., 0].mean((1, 2))
    np.testing.assert_allclose(loss(logits, classes), expected, rtol=1e-5)
    soft = np.exp(normal(5, logits.shape))
    soft /= soft.sum(-1, keepdims=True)
    np.testing.assert_allclose(loss(logits, soft), -(soft * log_probability).sum(-1).mean((1, 2)), rtol=1e-5)


# Training


def test_loss_of_measurements_is_mean_squared_error(image):
    reconstruction = image + np.array([1, 2], np.float32)[:, None, None, None]
    np.testing.assert_allclose(tokenizer.reconstruction_loss(SMALL, reconstruction, image), [1.0, 4.0], rtol=1e-5)


def test_gradients_reach_every_parameter(small, image):
    _, variables = small

    def loss(params):
        reconstruction, _ = tokenizer.Tokenizer(SMALL).apply({**variables, "params": params}, image)
        return tokenizer.reconstruction_loss(SMALL, reconstruction, image).mean()

    gradients = jax.jit(jax.grad(loss), compiler_options=FAST)(variables["params"])
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


# Errors


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (SMALL, (2, 3, 32, 32), r"S2L2A has shape \(2, 3, 32, 32\), expected \[B, H, W, 3\], channels last"),
        (SMALL, (2, 32, 32), "channels last"),
        (SMALL, (2, 32, 40, 3), "must be multiples of 16"),
        (LULC, (2, 32, 32, 3), "or class maps"),
        (LULC, (2, 20, 32), "must be multiples of 16"),
    ],
)
def test_wrong_shapes_are_refused(config, shape, message):
    module = tokenizer.Tokenizer(config)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: module.apply(shapes(config), x, method="encode"), jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder": "gan"}, "Unknown tokenizer decoder 'gan'; known decoders: vit, unet"),
        ({"num_heads": 3}, "multiple of 4 and of num_heads 3"),
        ({"image_size": 100}, "image_size 100 must be a multiple of patch_size 16"),
    ],
)
def test_wrong_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        shapes(dataclasses.replace(SMALL, **change))
