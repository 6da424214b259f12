"""Thinking in Modalities: generation then features, against doing both by hand (spec 8.6)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax.core import meta

from terramind_jax import decoding, model, tim
from terramind_jax.modalities import STREAMS, Stream
from terramind_jax.model import Backbone, BackboneConfig, backbone

S1 = STREAMS["untok_sen1grd@224"]
A = Stream("tok_lulc@224", "LULC", "tokens", vocab_size=20)
B = Stream("tok_dem@224", "DEM", "tokens", vocab_size=30)
COORDS = Stream("coords", "coords", "sequence", vocab_size=300, max_tokens=4)
CONFIG = BackboneConfig(
    dim=16, encoder_depth=2, num_heads=2, gated_mlp=False, use_bias=True, image_size=48, streams=(S1, A, B, COORDS), merge_method=None
)
TARGETS = (A.key, B.key)


@pytest.fixture(scope="module")
def system():
    """Backbone, its variables, generator, its variables."""
    generator = tim.generator(CONFIG, (A, B, COORDS), decoder_depth=1)
    rng = np.random.default_rng(0)
    shapes = meta.unbox(jax.eval_shape(functools.partial(model.init, generator), jax.random.key(0)))

    def fill(path, x):
        # Without biases, and looking at the context more than at itself: else every token is the same.
        factor = 0 if "bias" in path[-1].key else 4 if any(p.key == "cross_attn" for p in path) else 1
        return rng.normal(size=x.shape, scale=0.6 * factor).astype(np.float32)

    given = jax.tree_util.tree_map_with_path(fill, shapes)
    return Backbone(CONFIG), given, generator, given  # a backbone's variables are part of the whole model's


def images(batch=2, side=48, seed=0):
    return {S1.key: np.random.default_rng(seed).normal(size=(batch, side, side, 2)).astype(np.float32)}


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_thoughts_are_generated_and_read(system):
    module, variables, *generator = system
    ids = decoding.generate_tokens(*generator, images(), TARGETS, seed=3, top_p=0.8)
    thought = tim.think(*generator, images(), TARGETS, seed=3)
    assert list(thought) == [S1.key, *TARGETS]
    equal({key: thought[key] for key in TARGETS}, ids)
    equal(tim.features(*system, images(), TARGETS, seed=3), backbone.features(module, variables, thought))


def test_unchained_thoughts_do_not_see_each_other(system):
    options = dict(seed=0, temperature=0.0)
    chained, apart = (tim.think(*system[2:], images(), TARGETS, chained=c, **options) for c in (True, False))
    equal(apart[A.key], chained[A.key])
    equal(apart[B.key], tim.think(*system[2:], images(), (B.key,), **options)[B.key])
    assert (apart[B.key] != chained[B.key]).any()


def test_a_target_that_is_an_input_is_not_generated(system):
    given = images() | {A.key: np.arange(18).reshape(2, 3, 3)}
    thought = tim.think(*system[2:], given, TARGETS, seed=0, temperature=0.0)
    assert list(thought) == [S1.key, A.key, B.key]
    equal(thought[A.key], given[A.key])
    again = tim.think(*system[2:], thought, TARGETS, seed=1)
    equal(again, thought)  # nothing is left to think of


def test_several_steps_and_coordinates(system):
    options = dict(seed=0, temperature=0.0)
    one, more = (tim.think(*system[2:], images(), (A.key,), steps=steps, **options)[A.key] for steps in (1, 4))
    assert (one != more).any()
    thought = tim.think(*system[2:], images(), (COORDS.key, A.key), **options)
    assert thought[COORDS.key].shape == (2, 3)  # as long as coordinates that are an input
    assert tim.features(*system, images(), (COORDS.key, A.key), **options)[0].shape == (2, 9 + 3 + 9, 16)


def test_dict_holds_the_inputs_only(system):
    config = dataclasses.replace(CONFIG, merge_method="dict", num_register_tokens=2)
    module, variables, *generator = system
    variables = variables | {"params": variables["params"] | {"register_tokens": np.ones((2, 16), np.float32)}}
    layers = tim.features(Backbone(config), variables, *generator, images(), TARGETS, seed=0)
    assert [set(layer) for layer in layers] == [{S1.key, "register_tokens"}] * 2


def test_merges_treat_thoughts_as_modalities(system):
    """Of S1, LULC and DEM; the fourth image stream of ``concat`` does not exist, as coordinates are none."""
    row = tim.features(*system, images(), TARGETS, seed=0, temperature=0.0)
    mean = Backbone(dataclasses.replace(CONFIG, merge_method="mean"))
    merged = tim.features(mean, *system[1:], images(), TARGETS, seed=0, temperature=0.0)
    for a, b in zip(row, merged, strict=True):
        np.testing.assert_allclose(a.reshape(2, 3, 9, 16).mean(1), b, rtol=1e-5, atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch(system):
    together = tim.features(*system, images(3), TARGETS, seed=np.arange(3))
    for i in range(3):
        alone = tim.features(*system, {S1.key: images(3)[S1.key][i : i + 1]}, TARGETS, seed=np.arange(3)[i : i + 1])
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[i : i + 1], b, rtol=1e-4, atol=1e-5)


def test_images_of_another_size_interpolate_positions(system):
    thought = tim.think(*system[2:], images(side=64), TARGETS, seed=0, temperature=0.0)
    assert thought[A.key].shape == thought[B.key].shape == (2, 4, 4)
    equal({key: thought[key] for key in TARGETS}, decoding.generate_tokens(*system[2:], images(side=64), TARGETS, seed=0, temperature=0.0))
    alone = tim.think(*system[2:], {COORDS.key: np.full((2, 3), 7)}, (A.key,), seed=0)
    assert alone[A.key].shape == (2, 3, 3)  # without an image, the generator's own size


def test_modality_dropping_with_two_thoughts(system):
    """The reference fails with two generated streams (spec 8.6)."""
    config = dataclasses.replace(CONFIG, merge_method="mean", modality_drop_rate=0.9)
    thought = tim.think(*system[2:], images(), TARGETS, seed=0)
    run = jax.jit(lambda key: Backbone(config).apply(system[1], thought, train=True, rngs={"dropout": key}))
    outputs = [run(jax.random.key(i)) for i in range(4)]
    assert all(np.isfinite(x).all() for layers in outputs for x in layers)
    assert len({np.asarray(layers[-1]).tobytes() for layers in outputs}) > 1


def test_the_generator_is_frozen(system):
    """Training the backbone, embeddings included, changes no thought: the two share no variables (in the reference they do)."""
    module, variables, *generator = system
    thought = tim.think(*generator, images(), TARGETS, seed=0, temperature=0.0)

    def loss(params):
        return module.apply({**variables, "params": params}, thought, train=True)[-1].sum()

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    assert float(np.abs(gradients["patch_proj"][S1.key]).max()) > 0
    trained = {**variables, "params": jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients)}
    again = tim.features(module, trained, *generator, images(), TARGETS, seed=0, temperature=0.0)
    equal(again, backbone.features(module, trained, thought))


@pytest.mark.parametrize(
    "given, targets, message",
    [
        ({"PLANET": np.zeros((1, 48, 48, 6))}, TARGETS, "no input stream 'PLANET'"),
        (images(), ("tok_ndvi@224",), "no target stream 'tok_ndvi@224'"),
        (images() | {B.key: np.zeros((2, 2, 2), int)}, TARGETS, "one size; their sides are untok_sen1grd@224 48 pixels, tok_dem@224 32"),
        ({S1.key: np.zeros((1, 48, 64, 2))}, TARGETS, r"expected \[B, S, S, 2\], S a multiple of the patch size 16"),
    ],
)
def test_errors_say_what_is_wrong(system, given, targets, message):
    with pytest.raises(ValueError, match=message):
        tim.think(*system[2:], given, targets, seed=0)
