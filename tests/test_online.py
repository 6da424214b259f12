"""Tokens made in the training step: the same ids, the same loss, and only what is needed for them travels."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from test_tokenize import random_tokenizer

from terramind_jax import cli, plan, tokenize
from terramind_jax.data import pipeline
from terramind_jax.data.shards import ShardWriter, write_sample
from terramind_jax.train import logging, online, pretrain

pytestmark = pytest.mark.usefixtures("compile_fast")
SIZE, TILE = tiny_run.SIZE, tiny_run.TILE


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Samples whose crops all differ; every third has no LULC. Tokens lie beside the pixels."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for split, n in (("train", 12), ("val", 5)):
        for name, high, dtype in (("DEM", 3000, np.int16), ("LULC", 10, np.uint8)):
            with ShardWriter(folder, split, name, "tiny", 1) as shard:
                for i in range(n):
                    bands = rng.integers(0, high, (1, 1, TILE, TILE)).astype(dtype)
                    if name == "DEM" or i % 3:
                        shard.add(f"s{i:03d}", write_sample({"bands": bands, "center_lon": np.float64(i), "center_lat": np.float64(-i)}))
    return folder


@pytest.fixture(scope="module")
def weights(root, tmp_path_factory):
    """The folder of the tokenizers, which have tokenized `root`."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for name in ("DEM", "LULC"):
        (folder / name).mkdir()
        (folder / name / "seed").write_text("0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "load", load)
        tokenize.tokenize(root, folder, image_size=SIZE)
    return folder


def load(name, folder):
    return random_tokenizer(name, Path(folder), levels=(8, 8), num_codebooks=2 if name == "LULC" else 1)


def configs(root, weights, steps=3, **data):
    """With stored tokens, and with those made online."""
    stored = tiny_run.pretraining(root, steps)
    with stored.unlocked():
        stored.model.codebooks = type(stored)()
    stored.data.update(**{"inputs": ("DEM", "LULC", "S1GRD", "coords"), "targets": ("DEM", "LULC", "coords"), **data})
    made = stored.copy_and_resolve_references()
    made.data.update(online_tokens=True, tokenizers=str(weights), tokens="/nowhere")
    return stored, made.lock()


@pytest.mark.parametrize(("train", "group"), [(True, 1), (True, 2), (False, 1)])
def test_the_batch_becomes_that_of_the_stored_tokens(root, weights, train, group):
    (stored, made), batches = configs(root, weights, patch_group=group), []
    tokenizers = online.load(made, sum(pretrain.streams(made), ()), [pretrain.open_tokenized(made, "train")], load)
    for config in (pretrain.with_codebooks(stored), made := pretrain.with_codebooks(made, tokenizers)):
        index = pretrain.open_tokenized(config, "train")
        batches.append(pipeline.batches(index, *pretrain.data_settings(config), batch_size=4, train=train, seed=3))
    encoder, decoder = pretrain.streams(made)
    assert set(tokenizers.modules) == {"DEM", "LULC"}  # there is no S1GRD
    seen, several, fill = 0, 0, jax.jit(partial(online.fill, tokenizers.modules, encoder, decoder))
    for _ in range(3):
        expected, raw = (next(b) for b in batches)
        assert {m: (x.shape, x.dtype) for m, x in raw["images"].items()} == {
            "DEM": ((4, SIZE, SIZE, 1), np.int16),
            "LULC": ((4, SIZE, SIZE, 1), np.uint8),
        }
        np.testing.assert_array_equal(raw["sample"], expected["sample"])
        found, expected = fill(tokenizers.variables, pretrain.on_device(raw)), pretrain.on_device(expected)
        assert found.keys() == expected.keys()
        jax.tree.map(np.testing.assert_array_equal, dict(found), expected)
        seen += np.isin(expected["target_id"], raw["target_id"], invert=True).sum()
        several += (expected["input_codes"] != raw["input_codes"]).sum() * (expected["target_codes"] != raw["target_codes"]).sum()
    assert seen > 5 and several > 10


def losses(workdir):
    lines = logging.read(workdir)
    return [[line[k] for k in ("loss", "val/loss") if k in line] for line in lines]


@pytest.mark.slow
def test_a_run_has_the_same_losses(root, weights, tmp_path):
    """Also where a step cuts its batch in two, and where it goes on from a checkpoint, in which no tokenizers are."""
    seen, (stored, made) = {}, configs(root, weights, steps=2, view_window=16, inputs=("DEM", "LULC"), targets=("DEM", "LULC"))
    for name, config in (("stored", stored), ("online", made)):
        config.train.update(accumulate=2, batch_size=16)
        config.run.update(eval_every=2, eval_batches=1)
        pretrain.train(config, tmp_path / name, tokenizer=load)
        seen[name] = losses(tmp_path / name)
    assert seen["online"][0] == pytest.approx(seen["stored"][0], rel=1e-6)  # at step 0 nothing has been trained
    assert len(seen["online"]) == len(seen["stored"]) == 3
    for a, b in zip(seen["online"], seen["stored"], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    names = [sorted(p.read_text() for p in (tmp_path / name / "checkpoints").rglob("_METADATA")) for name in seen]
    assert names[0] == names[1] and "encoder" in names[0][0]  # what a checkpoint holds: no tokenizers
    assert pretrain.train(made, tmp_path / "online", tokenizer=load)["step"] == 2


def test_a_sample_that_cannot_be_read_is_bad_and_told(root, weights, tmp_path):
    tiny_run.write_split(tmp_path / "data", "train", 12, tokens=False, broken=3)
    _, made = configs(tmp_path / "data", weights)
    index = pretrain.open_tokenized(made, "train")
    batches = pipeline.batches(index, *pretrain.data_settings(made), batch_size=4, train=False)
    bad = {int(i): bool(b) for batch in (next(batches) for _ in range(3)) for i, b in zip(batch["sample"], batch["bad"], strict=True)}
    assert [i for i, b in bad.items() if b] == [3]
    with pytest.raises(Exception, match="'s003' is no zip file"):
        pretrain.read_streams(index, [s for s in pretrain.streams_read(made) if s.modality == "DEM"], SIZE, 3)
    assert {s.kind for s in pretrain.streams_read(made)} == {"pixels", "sequence"}


def test_what_is_missing_is_said(root, weights, tmp_path):
    _, made = configs(root, weights)
    with pytest.raises(ValueError, match="give `train` the function that loads them"):
        pretrain.train(made, tmp_path / "run")
    with made.unlocked():
        made.model.codebooks.DEM = 99
    with pytest.raises(ValueError, match="model.codebooks.DEM=99, but the tokens in .*/DEM come from a codebook of 64"):
        pretrain.train(made, tmp_path / "run", tokenizer=load)
    made.data.tokenizers = ""
    with pytest.raises(ValueError, match="name their folder, or hub, with --config.data.tokenizers=DIR"):
        pretrain.train(made, tmp_path / "run", tokenizer=load)
    assert not (tmp_path / "run").exists()
    path = tiny_run.write_config(tmp_path / "config.py", configs(root, tmp_path / "nowhere")[1])
    assert cli.main(["pretrain", f"--config={path}", f"--workdir={tmp_path / 'run'}"]) == 2


def test_plan_says_what_it_does_not_count(monkeypatch, capsys):
    monkeypatch.setattr(plan, "run", lambda *_: {"memory": {"fits": True}})
    monkeypatch.setattr(plan.report, "render", lambda _: "")
    arguments = ["plan", "--config=configs/pretrain/tiny.py", "--topology=v5e:2x2"]
    monkeypatch.chdir(Path(__file__).parents[1])
    assert cli.main([*arguments, "--config.data.online_tokens=True"]) == 0
    assert "Not counted: the tokenizers of data.online_tokens" in capsys.readouterr().err
    assert cli.main(arguments) == 0
    assert capsys.readouterr().err == ""
