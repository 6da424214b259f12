"""Commands whose shards lie in a store: the same as from the disk, or a sentence that says what is missing."""

import itertools
import json

import numpy as np
import object_store
import pytest
import tiny_run
from ml_collections import ConfigDict

from terramind_jax import cli, files, sharding, tokenize
from terramind_jax.data import storage
from terramind_jax.data.faults import listed
from terramind_jax.data.index import open_index
from terramind_jax.data.shards import ShardWriter, write_sample
from terramind_jax.train import logging, pretrain, tokenizer

pytest.importorskip("aiohttp")


@pytest.fixture
def local(tmp_path, monkeypatch):
    monkeypatch.setenv("TERRAMIND_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.01)
    root = tiny_run.write_shards(tmp_path / "served")
    for name, size in tiny_run.CODEBOOKS.items():
        files.write_text(files.folder(root / "train" / f"{name}_tokens" / "tokenizer.json"), json.dumps({"codebook_size": size + 1}))
    return root


@pytest.fixture
def served(local):
    """The address of a store whose shards are indexed."""
    with object_store.serve(local) as (address, faults):
        assert cli.main(["data", "index", address]) == 0
        yield address, faults


def untold(config):
    """Without the vocabularies, which are then looked for beside the tokens."""
    with config.unlocked():
        config.model.codebooks = ConfigDict()
    return config


def test_check_and_stats_say_the_same_as_of_the_disk(served, local, capsys):
    capsys.readouterr()
    said = {}
    for root in (served[0], str(local)):
        said[root] = [(cli.main(["data", command, root, "--workers=1"]), *capsys.readouterr()) for command in ("check", "stats")]
    remote = [(code, *(text.replace(served[0], str(local)) for text in texts)) for code, *texts in said[served[0]]]
    assert remote == said[str(local)]
    assert remote[0][0] == 1 and "sample 's003' is no zip file" in remote[0][1]


@pytest.mark.parametrize("command", ["check", "stats"])
def test_a_store_without_an_index_is_told_of_and_one_without_shards_too(local, command, tmp_path, capsys):
    with object_store.serve(local) as (address, _):
        assert cli.main(["data", command, address]) == 2
        assert f"There is no index of {address}/train; make it once with: terramind-jax data index {address}" in capsys.readouterr().err
        assert cli.main(["tokenize", f"--data={address}", "--weights=hub", f"--out={tmp_path}"]) == 2
        assert (
            f"There is no readable index of train or val in {address}; make it once with: terramind-jax data index"
            in capsys.readouterr().err
        )
    (tmp_path / "empty").mkdir()
    with object_store.serve(tmp_path / "empty") as (address, _):
        assert cli.main(["data", command, address]) == 2
        assert f"No splits in {address}" in capsys.readouterr().err


def test_an_index_here_overrules_an_old_one_in_a_store_that_cannot_be_written_to(local):
    open_index(local, "train")  # leaves an index among the shards
    with ShardWriter(local, "train", "NDVI", "tiny", 1) as shard:
        shard.add("s001", write_sample({"bands": np.zeros((1, 1, tiny_run.TILE, tiny_run.TILE), np.float16)}))
    with object_store.serve(local) as (address, _):
        assert "NDVI" not in open_index(address, "train").modalities
        assert cli.main(["data", "index", address]) == 0
        assert "NDVI" in open_index(address, "train").modalities


def test_pretraining_finds_vocabularies_validation_and_batches(served, local):
    found = {}
    for root in (served[0], str(local)):
        config = pretrain.with_codebooks(untold(tiny_run.pretraining(root)))
        index, validation = pretrain.open_tokenized(config, "train"), pretrain.open_validation(config)
        first = [list(itertools.islice(pretrain.device_batches(config, i, sharding.make_mesh()), 2)) for i in (index, validation)]
        found[root] = config.model.codebooks.to_dict(), first
    (remote_sizes, remote), (sizes, expected) = found.values()
    assert remote_sizes == sizes == {name: size + 1 for name, size in tiny_run.CODEBOOKS.items()}
    for a, b in zip(sum(remote, []), sum(expected, []), strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_array_equal(a["target_id"], b["target_id"])
        np.testing.assert_array_equal(a["patches"]["untok_dem@224"], b["patches"]["untok_dem@224"])


def test_a_store_without_a_validation_split_has_none(served):
    config = tiny_run.pretraining(served[0])
    config.data.val_split = "test"
    assert pretrain.open_validation(config) is None


def test_tokens_are_not_written_into_a_store(served, capsys):
    assert cli.main(["tokenize", f"--data={served[0]}", "--weights=hub"]) == 2
    assert f"Tokens cannot be written to {served[0]}; give a local folder with --out and copy it there." in capsys.readouterr().err


@pytest.mark.slow
def test_trainings_and_tokens_from_a_slow_store_with_errors_are_those_from_the_disk(served, local, tmp_path):
    address, faults = served
    faults.latency, faults.errors = 0.005, 0.05
    losses, tokens = {}, {}
    for name, root in (("remote", address), ("local", str(local))):
        config = tiny_run.tokenizer_training(root, steps=2)
        config.run.threads = 8
        tokenizer.train(config, tmp_path / name / "DEM")
        out = tmp_path / f"{name}_tokens"
        tokenize.tokenize(root, tmp_path / name, out, image_size=tiny_run.SIZE)
        tokens[name] = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.tar")}
        config = untold(tiny_run.pretraining(root, steps=4))
        config.run.threads = 8
        pretrain.train(config, tmp_path / f"{name}_run")
        losses[name] = [line["loss"] for line in logging.read(tmp_path / f"{name}_run") if "loss" in line]
        assert [line["key"] for line in listed(tmp_path / f"{name}_run")] == ["s003"]
    assert losses["remote"] == losses["local"] and tokens["remote"] == tokens["local"] and len(tokens["local"]) == 2
