"""What the released models compute, against numbers that TerraTorch computed from the same weights: ``make golden`` writes them down."""

import dataclasses

import golden_models as golden
import jax
import numpy as np
import pytest
from parity import batches

from terramind_jax import build
from terramind_jax.convert import rules
from terramind_jax.sources import rules_of
from terramind_jax.weights import complete

OUTPUTS = golden.load("outputs.json")


def model(name, **options):
    """A model of ours with the weights of `golden_models`, which come through the state dict."""
    empty = build.model(name, **options)
    module = empty.module
    table = rules_of(module)
    shapes = rules.shapes(empty.variables, table)
    positions = rules.to_torch(complete(module, {}, jax.random.key(0)), table)
    state = golden.weights(shapes, positions)
    return dataclasses.replace(empty, variables=rules.from_torch(dict(state), table, empty.variables))


def close(ours, name, bound):
    theirs = np.array(OUTPUTS[name])
    assert np.abs(np.array(golden.summary(ours)) - theirs).max() <= bound * theirs.std()


def test_features():
    out = model("terramind_v1_tiny", modalities=list(golden.FEATURES))({k: golden.image(c) for k, c in golden.FEATURES.items()})
    close(out[0], "features of the first layer", 1e-4)
    close(out[-1], "features of the last layer", 1e-4)


def test_pretraining_losses():
    loss, losses = model("terramind_v1_tiny_encdec")(batches.draw(2, 64, 64, seed=3, empty=8))
    assert float(loss) == pytest.approx(OUTPUTS["pretraining loss"], rel=1e-5)
    assert {key: float(x) for key, x in losses.items()} == pytest.approx(OUTPUTS["pretraining losses"], rel=1e-5)


@pytest.mark.slow
def test_the_class_map_tokenizer():
    m = model("terramind_v1_tokenizer_lulc")
    assert np.asarray(m.encode(golden.classes())).ravel().tolist() == OUTPUTS["LULC tokens"]
    close(m.decode(golden.tokens(4375, 4)), "LULC logits", 1e-4)


@pytest.mark.slow
def test_the_diffusion_tokenizer():
    m = model("terramind_v1_tokenizer_dem")
    assert np.asarray(m.encode(golden.image(1, 64))).ravel().tolist() == OUTPUTS["DEM tokens"]
    close(m.decode(golden.tokens(15360, 2), noise=golden.noise(1, 32), timesteps=2, sampler="ddim"), "DEM pixels", 1e-3)
