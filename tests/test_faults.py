"""Samples that cannot be read: which they were and why is found out when somebody asks."""

import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from terramind_jax import sharding
from terramind_jax.data.faults import SHOWN, Faults, read_streams
from terramind_jax.train import pretrain


@pytest.fixture
def config(tmp_path):
    return tiny_run.pretraining(tiny_run.write_shards(tmp_path))


def faults_of(config) -> Faults:
    index = pretrain.open_tokenized(config, "train")
    encoder, decoder = pretrain.streams(pretrain.with_codebooks(config))
    return Faults(index, partial(read_streams, index, (*encoder, *decoder), config.model.image_size))


def run(config, faults: Faults, batches: int):
    index = pretrain.open_tokenized(config, "train")
    return list(itertools.islice(pretrain.device_batches(config, index, sharding.make_mesh(), faults=faults), batches))


def test_the_bad_samples_are_named_with_their_reasons(config):
    faults = faults_of(config)
    assert faults.reasons() == "those of this host are none of them."
    batches = run(config, faults, 8)
    assert sum(int(batch["bad"].sum()) for batch in batches) > 0
    assert faults.reasons() == f"{config.data.root}/train/DEM/tiny_shard_000001.tar: sample 's003' is no zip file (File is not a zip file)."


def test_only_the_last_few_are_named():
    faults = Faults(None, lambda i: (_ for _ in ()).throw(OSError(f"Sample {i} is gone.")))
    batch = {"sample": np.arange(-1, 9), "bad": np.ones(10, bool)}
    assert len(list(faults.following(iter([batch, batch])))) == 2
    assert faults.reasons() == " ".join(f"Sample {i} is gone." for i in range(9 - SHOWN, 9))


def test_one_that_can_be_read_again_is_said(config):
    faults = faults_of(config)
    batch = {"sample": np.array([5]), "bad": np.array([True])}
    list(faults.following(iter([batch])))
    assert faults.reasons() == "Sample 's005' can be read now."


def test_a_token_shard_that_went_bad_is_found(config):
    faults = faults_of(config)
    for path in (Path(config.data.root) / "train" / "LULC_tokens").glob("*.tar"):
        path.write_bytes(path.read_bytes().replace(b"NUMPY", b"numpy"))
    assert int(run(config, faults, 4)[0]["bad"].sum()) > 0
    assert "LULC" in faults.reasons() and "can be read now" not in faults.reasons()


def test_a_run_with_too_many_stops_and_names_them(config, tmp_path):
    config.run.max_bad_fraction = 0.005
    with pytest.raises(ValueError, match=r"more than run\.max_bad_fraction=0\.005: [^\n]*sample 's003' is no zip file"):
        pretrain.train(config, tmp_path / "run")
