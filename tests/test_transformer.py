"""The transformer: published sizes, initialisation, attention rules, and the slot path against the dense path."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from terramind_jax import modalities, model, sharding, zoo
from terramind_jax.modalities import Stream
from terramind_jax.model import PADDING, TerraMind, TransformerConfig

ENCODER = (
    Stream("coords", "coords", "sequence", vocab_size=40, max_tokens=4),
    Stream("tok_dem@224", "DEM", "tokens", vocab_size=30),
    Stream("untok_sen1grd@224", "S1GRD", "pixels", channels=2),
)
DECODER = (*ENCODER[:2], Stream("tok_lulc@224", "LULC", "tokens", vocab_size=25))
SMALL = TransformerConfig(
    dim=32, encoder_depth=2, decoder_depth=2, num_heads=2, gated_mlp=True, use_bias=True, encoder=ENCODER, decoder=DECODER
)


@partial(jax.jit, static_argnums=0)
def _init(config):
    return meta.unbox(model.init(TerraMind(config), jax.random.key(0)))


@pytest.fixture(scope="module")
def variables():
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), _init(SMALL))  # biases and buffers show too


def _batch(seed=0, size=8, inputs=12, targets=10):
    """Random slots: in every sample 2 coords, 3 DEM tokens and patches, some padding; targets of all three decoder streams."""
    rng = np.random.default_rng(seed)
    input_modality = np.array([0, 0, 1, 1, 1, 2, 2, 2, 2, 2, PADDING, PADDING], np.uint8)[:inputs]
    target_modality = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, PADDING], np.uint8)[:targets]
    input_id = np.stack(
        [np.concatenate([rng.integers(0, 40, 2), rng.integers(0, 30, 3), 5 * i + np.arange(5), [0, 0]]) for i in range(size)]
    )
    positions = np.stack([rng.permutation(196) for _ in range(size)])
    target_id = np.stack(
        [np.concatenate([rng.integers(0, 40, 3), rng.integers(0, 30, 3), rng.integers(0, 25, 3), [0]]) for _ in range(size)]
    )
    target_position = np.concatenate([np.tile(np.arange(3), (size, 1)), positions[:, 20:27]], 1)
    return {
        "input_modality": np.tile(input_modality, (size, 1)),
        "input_position": np.concatenate([np.tile([0, 1], (size, 1)), positions[:, :10]], 1).astype(np.uint16),
        "input_id": input_id.astype(np.int32),
        "patches": {"untok_sen1grd@224": rng.normal(-12, 4, (1, 5 * size, 512)).astype(np.float16)},
        "target_modality": np.tile(target_modality, (size, 1)),
        "target_position": target_position.astype(np.uint16),
        "target_input": np.where(target_modality == 0, rng.integers(0, 40, (size, targets)), 0).astype(np.int32),
        "target_id": target_id.astype(np.int32),
    }


@partial(jax.jit, static_argnums=0)
def _losses(config, variables, batch):
    return TerraMind(config).apply(variables, batch, method="losses")


@partial(jax.jit, static_argnums=0)
def _gradients(config, variables, batch):
    return jax.grad(lambda p: _losses(config, {**variables, "params": p}, batch)[0].sum())(variables["params"])


@pytest.mark.parametrize("size", zoo.SIZES)
def test_parameter_counts_are_the_published_ones(size):
    module = TerraMind(TransformerConfig(**zoo.SIZES[size]))
    shapes = meta.unbox(jax.eval_shape(partial(model.init, module), jax.random.key(0)))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes["params"])) == zoo.PARAMETERS[size]


def test_initialisation_follows_the_reference():
    params = _init(dataclasses.replace(SMALL, dim=64, num_heads=1))["params"]
    assert float(jnp.abs(params["encoder"]["attn"]["qkv"]["kernel"]).max()) <= math.sqrt(3 / 64)
    assert float(params["encoder"]["attn"]["qkv"]["kernel"].std()) == pytest.approx(math.sqrt(1 / 64), rel=0.05)
    assert float(params["encoder_token_emb"]["coords"].std()) == pytest.approx(0.02, rel=0.1)
    assert float(params["decoder_token_emb"]["coords"].std()) == pytest.approx(math.sqrt(2 / (64 + 40)), rel=0.1)
    assert float(params["patch_proj"]["untok_sen1grd@224"].std()) == pytest.approx(math.sqrt(2 / (512 + 64)), rel=0.05)
    assert float(params["encoder"]["norm1"]["scale"].std()) == 0 and float(jnp.abs(params["encoder"]["mlp"]["fc1"]["bias"]).max()) == 0


def test_a_fresh_model_is_near_uniform_over_each_vocabulary():
    config = dataclasses.replace(SMALL, dim=64, num_heads=1)
    sums, counts = _losses(config, _init(config), _batch())
    vocab = np.array([s.vocab_size for s in DECODER])
    excess = config.dim / (vocab + config.dim)  # half the variance of the logits of a Xavier table
    np.testing.assert_allclose(sums / counts, np.log(vocab) + excess, atol=0.5)


def test_slots_equal_the_dense_path(variables):
    """`losses` on slots against embed, encode, queries, decode and logits on whole modalities."""
    batch, module = _batch(size=2), TerraMind(SMALL)
    size = len(batch["input_id"])
    sums, counts = _losses(SMALL, variables, batch)

    def dense(module, b):
        rows = batch["input_id"][b, 5:10]
        pixels = modalities.standardize("S1GRD", batch["patches"]["untok_sen1grd@224"][0, rows].reshape(5, 16, 16, 2))
        image = np.zeros((1, 224, 224, 2), np.float32)
        where = batch["input_position"][b, 5:10]
        for patch, position in zip(pixels, where, strict=True):
            y, x = divmod(int(position), 14)
            image[0, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16] = patch
        content, emb = module.embed("untok_sen1grd@224", jnp.asarray(image))
        parts = [
            module.embed("coords", batch["input_id"][b : b + 1, :2]),
            module.embed("tok_dem@224", batch["input_id"][b : b + 1, 2:5], batch["input_position"][b : b + 1, 2:5]),
            (content[:, where], emb[:, where]),
        ]
        content, emb = (jnp.concatenate(x, 1) for x in zip(*parts, strict=True))
        context = module.encode(content, emb)
        y = jnp.concatenate([module.queries(s.key, *_targets(batch, b, m)) for m, s in enumerate(DECODER)], 1)
        y = module.decode(y, context, None, _naive_mask()[None])
        return [
            -jnp.take_along_axis(jax.nn.log_softmax(module.logits(s.key, y[0, 3 * m : 3 * m + 3])), _ids(batch, b, m), 1).sum()
            for m, s in enumerate(DECODER)
        ]

    expected = sum(np.array(module.apply(variables, b, method=dense)) for b in range(size))
    np.testing.assert_allclose(sums, expected, rtol=2e-5)
    assert counts.tolist() == [3 * size] * 3


def _targets(batch, b, m):
    part = slice(3 * m, 3 * m + 3)
    positions = jnp.asarray(batch["target_position"][b : b + 1, part].astype(int))
    return (positions, batch["target_input"][b : b + 1, part]) if m == 0 else (positions,)


def _ids(batch, b, m):
    return jnp.asarray(batch["target_id"][b, 3 * m : 3 * m + 3, None])


def _naive_mask():
    """Hidden pairs of nine targets, three a modality, the first of which is a sequence (spec 4.3)."""
    modality = np.repeat(np.arange(3), 3)
    hidden = modality[:, None] != modality[None]
    hidden[:3, :3] |= np.triu(np.ones((3, 3), bool), 1)
    return jnp.asarray(hidden)


def test_other_targets_and_later_tokens_are_invisible(variables):
    """No attention between target modalities; a sequence does not see its future (spec 4.3)."""
    batch = _batch()
    before = np.asarray(_losses(SMALL, variables, batch)[0])
    moved = {**batch, "target_position": batch["target_position"].copy()}
    moved["target_position"][:, 3:6] = (moved["target_position"][:, 3:6] + 7) % 196
    after = np.asarray(_losses(SMALL, variables, moved)[0])
    assert after[1] != before[1]
    np.testing.assert_allclose(after[[0, 2]], before[[0, 2]], rtol=1e-6)

    first_only = {**batch, "target_modality": np.where(np.arange(10) == 0, batch["target_modality"], PADDING).astype(np.uint8)}
    alone = np.asarray(_losses(SMALL, variables, first_only)[0])
    changed = {**first_only, "target_input": batch["target_input"].copy()}
    changed["target_input"][:, 1:3] = (changed["target_input"][:, 1:3] + 1) % 40
    np.testing.assert_allclose(np.asarray(_losses(SMALL, variables, changed)[0]), alone, rtol=1e-6)


def test_padding_changes_nothing(variables):
    batch = _batch()
    wider = {
        k: v if k == "patches" else np.pad(v, ((0, 0), (0, 3)), constant_values=PADDING if "modality" in k else 0) for k, v in batch.items()
    }
    for a, b in zip(_losses(SMALL, variables, batch), _losses(SMALL, variables, wider), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_batch_of_padding_alone_has_zero_loss_and_finite_gradients(variables):
    empty = {**_batch(), "input_modality": np.full((8, 12), PADDING, np.uint8), "target_modality": np.full((8, 10), PADDING, np.uint8)}
    gradients = _gradients(SMALL, variables, empty)
    assert float(_losses(SMALL, variables, empty)[0].sum()) == 0
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("change", [dict(unroll=2), dict(remat="dots"), dict(remat="full")])
def test_unrolling_and_rematerialisation_change_no_gradient(variables, change):
    expected, changed = (_gradients(config, variables, _batch()) for config in (SMALL, dataclasses.replace(SMALL, **change)))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(changed), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_mesh_does_not_change_the_loss(variables):
    batch = _batch()
    batch["patches"] = {k: np.concatenate([v] * 8) for k, v in batch["patches"].items()}  # one group a sample
    alone = _losses(SMALL, variables, batch)
    mesh = sharding.make_mesh(data=8)
    with jax.set_mesh(mesh):
        spread = _losses(SMALL, variables, jax.device_put(batch, sharding.batch_sharding(mesh)))
    for a, b in zip(alone, spread, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_buffers_are_not_parameters(variables):
    assert set(variables) == {"params", "buffers"}
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables["buffers"])}
    assert all("pos_emb" in name or "bias" in name for name in names)


def test_another_image_size_interpolates_positions(variables):
    content, emb = TerraMind(SMALL).apply(variables, "untok_sen1grd@224", jnp.zeros((1, 256, 256, 2)), method="embed")
    assert content.shape == emb.shape == (1, 256, 32)


def test_an_unknown_stream_is_refused(variables):
    with pytest.raises(ValueError, match="no stream 'tok_ndvi@224'; it has coords"):
        TerraMind(SMALL).apply(variables, "tok_ndvi@224", jnp.zeros((1, 4), jnp.int32), method="embed")
