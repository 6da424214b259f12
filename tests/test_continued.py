"""Pretraining that begins with weights: the loss is theirs, what is missing is fresh, rates apply, and what changes is told."""

import json
from functools import partial

import jax
import numpy as np
import pytest
import random_networks
import tiny_run

from terramind_jax import cli, hub, model, sharding, weights, zoo
from terramind_jax import config as configuration
from terramind_jax.convert import files, rules
from terramind_jax.sources import rules_of
from terramind_jax.train import logging, optimizer, pretrain

pytestmark = pytest.mark.usefixtures("compile_fast")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_run.write_shards(tmp_path_factory.mktemp("shards"))


def config_of(root, **changes):
    config = tiny_run.pretraining(root, steps=4)
    config.train.update(changes)
    return config


@pytest.fixture(scope="module")
def weights_file(root, tmp_path_factory):
    """Of a network with a modality more."""
    config = config_of(root)
    config.data.inputs = (*config.data.inputs, "NDVI")
    module = model.TerraMind(pretrain.transformer_config(config))
    variables = random_networks.random_variables(model.init, module, scale=0.1)
    path = tmp_path_factory.mktemp("weights") / "whole.safetensors"
    files.write(path, rules.to_torch(jax.device_get(variables), rules_of(module)))
    return path, module, variables


def test_the_first_loss_is_that_of_the_weights(root, weights_file, tmp_path):
    path, whole, variables = weights_file
    config = config_of(root, init=str(path))
    pretrain.train(config, tmp_path / "run", weights.initial)
    module, mesh = model.TerraMind(pretrain.transformer_config(config)), sharding.make_mesh()
    index = pretrain.open_tokenized(config, "train")
    batch = next(pretrain.device_batches(config, index, mesh))
    # The same slots as the larger network counts its modalities.
    of = [whole.config.encoder.index(stream) for stream in module.config.encoder]
    inputs = np.asarray(batch["input_modality"])
    moved = np.where(inputs == model.PADDING, inputs, np.take(of, np.minimum(inputs, len(of) - 1))).astype(inputs.dtype)
    loss = jax.jit(partial(pretrain.loss, whole, "mod"))  # as it stands, each operation would be compiled by itself
    expected = loss(variables["params"], variables["buffers"], {**batch, "input_modality": moved})[0]
    lines = logging.read(tmp_path / "run")
    first = next(line for line in lines if "loss" in line)
    assert first["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert lines[0]["step"] == 0 and lines[0]["val/change/LULC"] == 0
    assert lines[-1]["val/change/LULC"] == pytest.approx(lines[-1]["val/loss/LULC"] - lines[0]["val/loss/LULC"])
    assert json.loads((tmp_path / "run" / "before.json").read_text())["val/loss/DEM"] == lines[0]["val/loss/DEM"]


def test_a_released_name_is_its_file_of_the_hub(root, weights_file, tmp_path, monkeypatch):
    path, *_ = weights_file
    asked = []
    monkeypatch.setattr(hub, "weights", lambda entry, **options: asked.append(entry) or files.read(path))
    module = model.TerraMind(pretrain.transformer_config(config_of(root)))
    configs = [config_of(root, init=init) for init in ("terramind_v1_base", str(path))]
    named, given = (pretrain.initial_variables(config, module, tmp_path, weights.initial) for config in configs)
    jax.tree.map(np.testing.assert_array_equal, named, given)
    assert asked == [zoo.get("terramind_v1_base")]


def test_rates_of_parts_and_modalities(root, weights_file, tmp_path, monkeypatch):
    tiny_run.on_one_device(monkeypatch)
    config = config_of(root, init=str(weights_file[0]))
    configuration.override(config, "optimizer.rates", "{'encoder': 0.0, 'embeddings': 0.0, 'LULC': 1.0}")
    pretrain.train(config, tmp_path / "run", weights.initial)
    before = weights.initial(str(weights_file[0]), model.TerraMind(pretrain.transformer_config(config)))["params"]
    after = pretrain.load(tmp_path / "run")[1]["params"]
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)
    assert not any(jax.tree.leaves(moved["encoder"])) and any(jax.tree.leaves(moved["decoder"]))
    assert {key: any(jax.tree.leaves(x)) for key, x in moved["encoder_token_emb"].items()} == {
        key: "lulc" in key for key in moved["encoder_token_emb"]
    }
    with pytest.raises(ValueError, match=r"optimizer\.rates has 'encodr', which is no part and no modality; expected one of embeddings"):
        optimizer.check_rates({"encodr": 0.1})
    with pytest.raises(ValueError, match=r"optimizer\.rates\.DEM=-1; expected at least 0"):
        optimizer.check_rates({"DEM": -1})


def test_the_command_starts_from_a_path_and_refuses_what_does_not_fit(root, weights_file, tmp_path, capsys):
    config = tiny_run.write_config(tmp_path / "config.py", config_of(root))
    call = ["pretrain", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    assert cli.main([*call, f"--config.train.init={tmp_path / 'none.pt'}"]) == 2
    assert "There are no weights" in capsys.readouterr().err
    assert cli.main([*call, f"--config.train.init={weights_file[0]}", "--config.model.codebooks={'DEM': 40, 'LULC': 20, 'S1GRD': 10}"]) == 2
    assert "(30, 64) instead of (40, 64)" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"train\.init names weights to start from"):
        pretrain.train(config_of(root, init="terramind_v1_base"), tmp_path / "other")
    with pytest.raises(ValueError, match="cannot start from terramind_v1_tokenizer_dem, which is a tokenizer"):
        weights.initial("terramind_v1_tokenizer_dem", None)
    with pytest.raises(ValueError, match="Unknown model 'terramind_v1_bas'; did you mean 'terramind_v1_base'"):
        weights.initial("terramind_v1_bas", None)
    with pytest.raises(FileNotFoundError, match="There are no weights"):
        weights.initial("terramind_runs/whole.pt", None)
