"""The probe of whole held-out scenes says what generation and the scenes themselves say."""

from functools import partial

import jax
import numpy as np
import pytest
import random_networks
import tiny_run

from terramind_jax import decoding, model, sharding
from terramind_jax.modalities import standardize
from terramind_jax.train import pretrain, probe

pytestmark = pytest.mark.usefixtures("compile_fast")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of shards with 12 scenes, one of them without a readable DEM."""
    return tiny_run.pretraining(tiny_run.write_shards(tmp_path_factory.mktemp("shards")))


def probe_of(config, limit=100):
    index = pretrain.open_tokenized(config, "train")
    return probe.choose(index, *pretrain.streams(config), config.data.inputs, config.model.image_size, limit)


def test_generation_is_that_of_one_step_at_temperature_zero(config):
    module = model.TerraMind(pretrain.transformer_config(config))
    variables = random_networks.random_variables(model.init, module, scale=0.6)
    scenes, mesh = probe_of(config), sharding.make_mesh()
    assert (scenes.source.key, [s.key for s in scenes.targets]) == ("untok_dem@224", ["tok_lulc@224"])
    look = jax.jit(partial(probe.look_at, module, scenes.source.key, ["tok_lulc@224"]), out_shardings=sharding.replicated(mesh))
    found = scenes(partial(look, variables), mesh)

    readable = [i for i in range(12) if i != 3]
    levels = np.array([scenes.index.read(i, "LULC").max() for i in readable])
    pixels = np.broadcast_to(100.0 * levels[:, None, None, None], (11, 32, 32, 1))
    inputs = {scenes.source.key: standardize("DEM", pixels)}
    made = decoding.generate_tokens(module, variables, inputs, ["tok_lulc@224"], seed=0, temperature=0.0)["tok_lulc@224"]
    share = (np.asarray(made) == 2 * levels[:, None, None]).mean()
    assert found["val/generated/LULC"] == pytest.approx(share) and share > 0
    assert found["val/knn_majority"] == np.bincount(levels).max() / 11


def test_the_first_modality_that_is_read_as_pixels_and_there(config):
    config = config.copy_and_resolve_references()
    config.data.inputs = ("S1GRD", "LULC", "DEM")  # S1GRD is in no shard, LULC is only read as tokens
    assert probe_of(config).source.key == "untok_dem@224"
    assert len(probe_of(config, limit=4).scenes) == 4
    assert probe_of(config, limit=0) is None
