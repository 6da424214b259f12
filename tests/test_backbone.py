"""The feature extractor: layers against a plain loop, merges, dropping, bands, sizes, time series (spec 5)."""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from terramind_jax import model
from terramind_jax.modalities import S2L2A_BANDS, STREAMS, Stream
from terramind_jax.model import Backbone, BackboneConfig, backbone, temporal
from terramind_jax.model.layers import EncoderBlock, LayerNorm, drop_path

S1, DEM = STREAMS["untok_sen1grd@224"], STREAMS["untok_dem@224"]
TOKENS = Stream("tok_lulc@224", "LULC", "tokens", vocab_size=25)
COORDS = Stream("coords", "coords", "sequence", vocab_size=40, max_tokens=4)
PLANET = Stream("PLANET", "PLANET", "pixels", channels=6)
SIZES = dict(dim=16, encoder_depth=3, num_heads=2, gated_mlp=True, use_bias=True, image_size=48)
CONFIG = BackboneConfig(**SIZES, streams=(S1, DEM, TOKENS, COORDS, PLANET), merge_method=None)
IMAGES = (S1.key, DEM.key, TOKENS.key)


def random_variables(module, seed=0):
    """Every leaf away from its initial value, so that buffers and biases show."""
    rng = np.random.default_rng(seed)
    fresh = meta.unbox(jax.jit(functools.partial(model.init, module))(jax.random.key(0)))
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), fresh)


@pytest.fixture(scope="module")
def variables():
    return random_variables(Backbone(dataclasses.replace(CONFIG, merge_method="concat", num_register_tokens=2)))


def inputs(*keys, batch=2, side=48, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {s.key: rng.normal(size=(batch, side, side, s.channels)).astype(np.float32) for s in (S1, DEM, PLANET)}
    arrays[TOKENS.key] = rng.integers(0, 25, (batch, side // 16, side // 16))
    arrays[COORDS.key] = rng.integers(0, 40, (batch, 3))
    return OrderedDict((key, arrays[key]) for key in keys)


def run(variables, arrays, **changes):
    return jax.tree.map(np.asarray, backbone.features(Backbone(dataclasses.replace(CONFIG, **changes)), variables, arrays))


def close(a, b):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), a, b)


@jax.jit
def by_hand(variables, arrays):
    """Block after block on the whole row of tokens, then the norm."""
    parts = [Backbone(CONFIG).apply(variables, key, value, method="embed") for key, value in arrays.items()]
    x = jnp.concatenate([content + emb for content, emb in parts], axis=1)
    block = EncoderBlock(num_heads=2, mlp_ratio=4.0, gated_mlp=True, use_bias=True)
    outputs = []
    for i in range(CONFIG.encoder_depth):
        layer = {c: jax.tree.map(lambda leaf, i=i: leaf[i], variables[c]["encoder"]) for c in ("params", "buffers")}
        x, _ = block.apply(layer, x, None)
        outputs.append(x)
    return [*outputs[:-1], norm(variables, x)]


def norm(variables, x):
    return LayerNorm().apply({c: variables[c]["encoder_norm"] for c in ("params", "buffers")}, x)


def test_layers_equal_a_loop_over_blocks(variables):
    arrays = inputs(S1.key, COORDS.key)
    close(run(variables, arrays), by_hand(variables, arrays))


@pytest.mark.parametrize("change", [dict(unroll=3), dict(remat="full")])
def test_unrolling_and_rematerialisation_change_nothing(variables, change):
    close(run(variables, inputs(DEM.key), **change), run(variables, inputs(DEM.key)))


def test_names_are_the_pretraining_models():
    """So that weights are taken by name."""
    decoder = dict(decoder_depth=1, encoder=CONFIG.streams, decoder=(TOKENS,))
    whole = model.TerraMind(model.TransformerConfig(**SIZES, **decoder))
    shapes = [meta.unbox(jax.eval_shape(functools.partial(model.init, m), jax.random.key(0))) for m in (Backbone(CONFIG), whole)]
    ours, theirs = ({jax.tree_util.keystr(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(s)} for s in shapes)
    assert ours == {k: v for k, v in theirs.items() if "decoder" not in k and "mask_token" not in k}


# ---- merging ----


def test_merges_are_of_the_images_in_the_callers_order(variables):
    arrays = inputs(DEM.key, COORDS.key, S1.key)
    row = run(variables, arrays)
    dem, coords, s1 = zip(*(np.split(x, [9, 12], axis=1) for x in row), strict=True)
    close(run(variables, arrays, merge_method="mean"), [(a + b) / 2 for a, b in zip(dem, s1, strict=True)])
    close(run(variables, arrays, merge_method="max"), [np.maximum(a, b) for a, b in zip(dem, s1, strict=True)])
    parts = [dict(zip(arrays, layer, strict=True)) for layer in zip(dem, coords, s1, strict=True)]
    close(run(variables, arrays, merge_method="dict"), parts)
    filler = np.broadcast_to(variables["params"]["missing_mod_token"], dem[0].shape)  # of tokens and PLANET, whatever is missing
    joined = [np.concatenate([a, b, filler, filler], -1) for a, b in zip(dem, s1, strict=True)]
    close(run(variables, arrays, merge_method="concat"), joined)


def test_out_channels_are_the_outputs(variables):
    for method in ("mean", "max", "concat", "dict", None):
        module = Backbone(dataclasses.replace(CONFIG, merge_method=method))
        outputs = backbone.features(module, variables, inputs(S1.key, DEM.key))
        assert module.out_channels == tuple(jax.tree.leaves(x)[0].shape[-1] for x in outputs)


def test_registers_come_first_and_are_not_merged(variables):
    arrays = inputs(S1.key, DEM.key)
    row = run(variables, arrays, num_register_tokens=2)
    assert row[0].shape == (2, 2 + 18, 16)
    parts = run(variables, arrays, num_register_tokens=2, merge_method="dict")
    assert sorted(parts[0]) == sorted([backbone.REGISTER_TOKENS, *arrays])
    close([x[:, :2] for x in row], [part[backbone.REGISTER_TOKENS] for part in parts])
    merged = run(variables, arrays, num_register_tokens=2, merge_method="mean")
    close(merged, [(part[S1.key] + part[DEM.key]) / 2 for part in parts])
    assert np.abs(merged[0] - run(variables, arrays, merge_method="mean")[0]).max() > 1e-3  # but the encoder reads them


def test_a_sample_does_not_depend_on_its_batch(variables):
    arrays = inputs(*IMAGES, batch=3)
    together = run(variables, arrays, merge_method="mean")
    for i in range(3):
        alone = run(variables, {k: v[i : i + 1] for k, v in arrays.items()}, merge_method="mean")
        close([x[i : i + 1] for x in together], alone)


def test_attention_is_split_by_who_looks_at_what(variables):
    arrays = inputs(S1.key, DEM.key, COORDS.key)
    arrays[COORDS.key][0, 1:] = 0  # padding
    found = backbone.attention(Backbone(dataclasses.replace(CONFIG, num_register_tokens=2)), variables, arrays)
    sizes = {backbone.REGISTER_TOKENS: 2, S1.key: 9, DEM.key: 9, COORDS.key: 3}
    for name, row in found.items():
        assert {other: w.shape for other, w in row.items()} == {other: (3, 2, 2, sizes[name], n) for other, n in sizes.items()}
        np.testing.assert_allclose(sum(w.sum(-1) for w in row.values()), 1, rtol=1e-5)
        assert (row[COORDS.key][:, 0, ..., 1:] == 0).all() and (row[COORDS.key][:, 1] > 0).all()


# ---- randomness in training ----


@functools.partial(jax.jit, static_argnames="module")
def train(variables, arrays, key, *, module):
    return module.apply(variables, arrays, train=True, rngs={"dropout": key})


def test_drop_path_keeps_the_mean_and_drops_whole_samples():
    x = jnp.ones((4000, 3, 2))
    y = np.asarray(drop_path(x, jnp.float32(0.3), jax.random.key(0)))
    assert set(np.unique(y[:, 0, 0])) == {np.float32(0), np.float32(1 / 0.7)} and (y == y[:, :1, :1]).all()
    assert y.mean() == pytest.approx(1, abs=0.03)
    np.testing.assert_array_equal(drop_path(x, jnp.float32(0), jax.random.key(0)), x)
    np.testing.assert_array_equal(drop_path(x, jnp.float32(1), jax.random.key(0)), 0 * x)


def test_drop_path_rises_from_no_drop_in_the_first_block(variables):
    """At rate 1 the last block is the identity and the first one is whole."""
    module, arrays = Backbone(dataclasses.replace(CONFIG, drop_path_rate=1.0)), inputs(S1.key)
    plain = run(variables, arrays)
    dropped = train(variables, arrays, jax.random.key(0), module=module)
    close(dropped[0], plain[0])
    close(dropped[2], norm(variables, dropped[1]))
    others = [train(variables, arrays, jax.random.key(i), module=module)[1] for i in range(8)]
    assert len({np.asarray(x).tobytes() for x in others}) > 1  # the middle block drops by chance
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(_gradient(module, variables, arrays)))


@functools.partial(jax.jit, static_argnums=0)
def _gradient(module, variables, arrays):
    def loss(params):
        return module.apply({**variables, "params": params}, arrays, train=True, rngs={"dropout": jax.random.key(0)})[-1].sum()

    return jax.grad(loss)(variables["params"])


def test_rate_zero_and_evaluation_are_the_identity(variables):
    arrays = inputs(S1.key, DEM.key)
    close(train(variables, arrays, jax.random.key(0), module=Backbone(CONFIG)), run(variables, arrays))
    close(run(variables, arrays, drop_path_rate=0.5, modality_drop_rate=0.5), run(variables, arrays))


@pytest.mark.parametrize("merge_method", ["mean", "max", "concat"])
def test_a_dropped_modality_is_as_if_it_were_absent(variables, merge_method):
    """At rate 1 one image survives, with whatever merge, and a sequence never is the only one."""
    module = Backbone(dataclasses.replace(CONFIG, modality_drop_rate=1.0, merge_method=merge_method))
    arrays = inputs(COORDS.key, DEM.key, S1.key)
    alone = {key: run(variables, {key: arrays[key]}, merge_method=merge_method) for key in (DEM.key, S1.key)}
    survivors = set()
    for seed in range(8):
        got = train(variables, arrays, jax.random.key(seed), module=module)
        key = min(alone, key=lambda k: float(np.abs(alone[k][0] - got[0]).max()))
        close(got, alone[key])
        survivors.add(key)
    assert survivors == set(alone)


def test_dropped_modalities_are_zeros_where_nothing_is_merged(variables):
    arrays = inputs(DEM.key, S1.key, COORDS.key)
    for seed in range(4):
        module = Backbone(dataclasses.replace(CONFIG, modality_drop_rate=1.0, merge_method="dict", num_register_tokens=2))
        layer = train(variables, arrays, jax.random.key(seed), module=module)[0]
        kept = [key for key in arrays if np.abs(layer[key]).max() > 0]
        assert len(kept) == 1 and np.abs(layer[backbone.REGISTER_TOKENS]).max() > 0
        alone = run(variables, {kept[0]: arrays[kept[0]]}, merge_method="dict", num_register_tokens=2)[0]
        close({key: layer[key] for key in alone}, alone)


def test_modalities_are_dropped_at_the_rate(variables):
    module = Backbone(dataclasses.replace(CONFIG, modality_drop_rate=0.3))

    def draw(key):
        return module.apply(variables, list(IMAGES), rngs={"dropout": key}, method="_draw_modalities")

    kept = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 2000)))
    np.testing.assert_allclose(kept.mean(0), 1 / 3 + 2 / 3 * 0.7, atol=0.04)  # one of three is sure to survive
    assert kept.any(1).all()


# ---- bands ----


def select_bands(config, variables, bands, key):
    return backbone.with_bands(config, bands), backbone.select_bands(variables, bands, key)


def test_bands_choose_columns():
    s2 = STREAMS["untok_sen2l2a@224"]
    config = dataclasses.replace(CONFIG, streams=(s2, DEM), merge_method="mean")
    variables = random_variables(Backbone(config))
    wanted = ["SWIR_2", "MINE", "BLUE", "SWIR_2"]
    few, fewer = select_bands(config, variables, {s2.key: wanted}, jax.random.key(1))
    assert few.streams[0].channels == 4
    old, new = (v["params"]["patch_proj"][s2.key].reshape(256, -1, 16) for v in (variables, fewer))
    for i, band in enumerate(wanted):
        if band in S2L2A_BANDS:
            np.testing.assert_array_equal(new[:, i], old[:, S2L2A_BANDS.index(band)])
    assert np.abs(new[:, 1]).max() <= (256 * 4) ** -0.5 and new[:, 1].std() == pytest.approx((256 * 4) ** -0.5 / 3**0.5, rel=0.05)
    assert fewer["params"]["patch_proj"][DEM.key] is variables["params"]["patch_proj"][DEM.key]
    # All bands in another order are the same model with its channels in that order.
    order = np.random.default_rng(0).permutation(12)
    same, moved = select_bands(config, variables, {s2.key: [S2L2A_BANDS[i] for i in order]}, jax.random.key(1))
    image = np.random.default_rng(0).normal(size=(1, 48, 48, 12)).astype(np.float32)
    expected = backbone.features(Backbone(config), variables, {s2.key: image})
    close(backbone.features(Backbone(same), moved, {s2.key: image[..., order]}), expected)


@pytest.mark.parametrize(
    "bands, message",
    [
        ({"PLANET": ["BLUE"]}, "'PLANET' is not a pixel stream with known bands; this model has untok_sen1grd@224, untok_dem@224"),
        ({"tok_lulc@224": ["LULC"]}, "not a pixel stream"),
        ({"untok_sen2l2a@224": ["BLUE"]}, "not a pixel stream"),
        ({"untok_dem@224": []}, "expected a list of names such as"),
        ({"untok_dem@224": "DEM"}, "expected a list of names such as"),
    ],
)
def test_band_errors(bands, message):
    with pytest.raises(ValueError, match=message):
        backbone.with_bands(CONFIG, bands)


# ---- sizes ----


def test_another_size_interpolates_or_has_its_own_grid(variables):
    arrays = inputs(S1.key, TOKENS.key, side=64)
    interpolated = run(variables, arrays)
    own = dataclasses.replace(CONFIG, image_size=64)
    made = jax.jit(functools.partial(model.init, Backbone(own)))(jax.random.key(0))["buffers"]["encoder_pos_emb"]
    fresh = backbone.features(Backbone(own), variables | {"buffers": variables["buffers"] | {"encoder_pos_emb": made}}, arrays)
    assert interpolated[0].shape == fresh[0].shape == (2, 32, 16)
    assert np.abs(interpolated[0] - fresh[0]).max() > 0.1
    wide = run(variables, {S1.key: np.zeros((1, 32, 80, 2), np.float32), TOKENS.key: np.zeros((1, 2, 5), int)})
    assert wide[0].shape == (1, 20, 16)


def test_a_new_modality_has_its_own_patch_size():
    config = dataclasses.replace(CONFIG, streams=(DEM, PLANET), patch_size=8)
    module = Backbone(config)
    variables = random_variables(module)
    assert variables["params"]["patch_proj"]["PLANET"].shape == (8 * 8 * 6, 16)
    assert variables["buffers"]["encoder_pos_emb"]["PLANET"].shape == (36, 16)
    assert backbone.features(module, variables, inputs(DEM.key, "PLANET"))[0].shape == (2, 9 + 36, 16)
    with pytest.raises(ValueError, match="needs equal numbers of tokens a modality; given: untok_dem@224 9, PLANET 36"):
        mean = Backbone(dataclasses.replace(config, merge_method="mean"))
        backbone.features(mean, variables, inputs(DEM.key, "PLANET"))


# ---- bad input ----


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({}, "There is no input; this model takes untok_sen1grd@224"),
        ({"tok_ndvi@224": np.zeros((1, 3, 3), int)}, "no stream 'tok_ndvi@224'; it has untok_sen1grd@224"),
        ({S1.key: np.zeros((1, 2, 48, 48))}, "which looks channels-first; expected .B, H, W, 2."),
        ({S1.key: np.zeros((1, 48, 48, 3))}, r"shape \[1, 48, 48, 3\]; expected \[B, H, W, 2\]"),
        ({S1.key: np.zeros((48, 48, 2))}, r"expected \[B, H, W, 2\]"),
        ({S1.key: np.zeros((1, 40, 48, 2))}, "40x48 pixels; both sides must be multiples of the patch size 16"),
        ({TOKENS.key: np.zeros((1, 3, 3))}, "expected the ids of tokens, integers"),
        ({TOKENS.key: np.zeros((1, 8), int)}, "8 tokens in a row, which is no square"),
        ({COORDS.key: np.zeros((1, 2))}, "is float64 .*expected the ids of at most 512 tokens"),
        (
            {S1.key: np.zeros((1, 48, 48, 2)), DEM.key: np.zeros((2, 48, 48, 1))},
            "differ in batch size: untok_sen1grd@224 1, untok_dem@224 2",
        ),
    ],
)
def test_errors_say_what_is_wrong(variables, arrays, message):
    with pytest.raises(ValueError, match=message):
        Backbone(CONFIG).apply(variables, arrays)


def test_errors_of_merging(variables):
    with pytest.raises(ValueError, match="'mean' needs an image modality; given: coords"):
        run(variables, inputs(COORDS.key), merge_method="mean")
    with pytest.raises(ValueError, match="needs equal numbers of tokens"):
        run(variables, {**inputs(S1.key), **inputs(DEM.key, side=64)}, merge_method="max")
    with pytest.raises(ValueError, match="Unknown merge method 'sum'; known methods: mean, max, concat, dict, None"):
        dataclasses.replace(CONFIG, merge_method="sum")
    with pytest.raises(ValueError, match="drop_path_rate is 2; expected a probability"):
        dataclasses.replace(CONFIG, drop_path_rate=2)


def test_padding_of_sequences_is_hidden(variables):
    arrays = inputs(S1.key, COORDS.key)
    arrays[COORDS.key][:] = [[7, 8, 3], [9, 3, 0]]
    short = run(variables, {S1.key: arrays[S1.key][1:], COORDS.key: arrays[COORDS.key][1:, :2]})
    close([x[1:, :11] for x in run(variables, arrays)], short)


# ---- time series ----


def series(t=3):
    steps = [inputs(S1.key, DEM.key, TOKENS.key, seed=i) for i in range(t)]
    return steps, {key: np.stack([step[key] for step in steps], axis=1) for key in steps[0]}


def test_a_time_series_is_separate_calls(variables):
    steps, arrays = series()
    for method in ("mean", "dict"):
        encode = functools.partial(run, variables, merge_method=method)
        separate = [encode(step) for step in steps]
        expected = [jax.tree.map(lambda *x: np.stack(x, 1), *layer) for layer in zip(*separate, strict=True)]
        close(temporal.over_time(encode, arrays, "keep"), expected)
        close(temporal.over_time(encode, arrays, "mean"), jax.tree.map(lambda x: x.mean(1), expected))
        close(temporal.over_time(encode, arrays, "max"), jax.tree.map(lambda x: x.max(1), expected))
        joined = jax.tree.map(lambda x: np.concatenate(list(np.moveaxis(x, 1, 0)), -1), expected)
        close(temporal.over_time(encode, arrays, "concat"), joined)
        difference = jax.tree.map(lambda x: x[:, 0] - (x[:, 1] + x[:, 2]) / 2, expected)
        close(temporal.over_time(encode, arrays, "diff", subset_lengths=(1, 2)), difference)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((series()[1], "sum"), {}, "Unknown pooling 'sum'; known poolings: keep, concat, mean, max, diff"),
        ((series()[1], "diff"), {}, "'diff' needs exactly two steps, given 3"),
        ((series()[1], "mean"), dict(subset_lengths=(1, 1)), r"subset_lengths \[1, 1\] must be positive and sum to .* 3"),
        (({"a": np.zeros((2, 3, 4, 4, 1)), "b": np.zeros((2, 1, 3))},), {}, r"given: a \[2, 3\], b \[2, 1\]"),
        (({"a": np.zeros((2, 3))},), {}, r"Input 'a' has shape \[2, 3\]; a time series is \[B, T, ...\]"),
        (({},), {}, "given: none"),
    ],
)
def test_errors_of_time_series(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        temporal.over_time(lambda x: [], *arguments, **options)
