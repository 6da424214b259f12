"""Prepared data: the TFDS data set holds what the shards hold, trains the same, and appears whole or not at all."""

import errno
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny_run

from terramind_jax import cli, tokenize
from terramind_jax.data import prepare, records, terramesh
from terramind_jax.data.errors import DataError
from terramind_jax.data.index import open_index
from terramind_jax.data.shards import ShardWriter, write_sample
from terramind_jax.train import pretrain
from terramind_jax.train import tokenizer as tokenizer_training

BAD = "s003", "DEM", "read"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """As `tiny_run`: sample s003 has no readable DEM. Besides, some samples have NDVI, from a larger tile and with a place on Earth,
    and all have S2RGB, of which one has no cloud mask."""
    folder = tiny_run.write_shards(tmp_path_factory.mktemp("shards"))
    where = {"crs_wkt": "EPSG:32632", "GeoTransform": "500000 10 0 4000000 0 -10"}
    with ShardWriter(folder, "train", "NDVI", "tiny", 1) as shard:
        for i in (1, 2, 5, 7, 9, 11):
            bands = np.random.default_rng(i).normal(size=(1, 1, 64, 52)).astype(np.float16)
            arrays = {"bands": bands, "time": np.array([1_600_000_000 * 10**9 + i]), "spatial_ref": np.int64(0)}
            shard.add(f"s{i:03d}", write_sample(arrays, attrs={"offset": i}, array_attrs={"spatial_ref": where}))
    with ShardWriter(folder, "train", "S2RGB", "tiny", 1) as shard:
        for i in range(12):
            bands, mask = np.random.default_rng(i).integers(0, 255, (1, 4, 64, 52)).astype(np.uint8)[:, :3], {}
            if i != 4:
                mask = {"cloud_mask": np.random.default_rng(i).integers(0, 7, (1, 64, 52)).astype(np.uint8)}
            shard.add(f"s{i:03d}", write_sample({"bands": bands, "center_lon": np.float64(i), "center_lat": np.float64(-i), **mask}))
    for split in ("train", "val"):
        for name in ("DEM", "LULC"):
            record = {"codebook_size": tiny_run.CODEBOOKS[name], "num_codebooks": 1}
            (folder / split / f"{name}_tokens" / tokenize.RECORD).write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def prepared(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "out"
    assert cli.main(["data", "prepare", str(root), f"--out={out}"]) == 0
    return out


def assert_same_samples(index, found, bad=()):
    assert (list(found.keys), found.modalities, found.subsets) == (list(index.keys), index.modalities, index.subsets)
    for name in ("available", "has_tokens", "subset"):
        np.testing.assert_array_equal(getattr(found, name), getattr(index, name))
    for i in range(len(index)):
        if index.keys[i] not in [key for key, *_ in bad]:  # whose coordinates may be those of a modality that was not opened
            assert found.coordinates(i) == index.coordinates(i)
        if "S2RGB" in index.modalities:
            np.testing.assert_array_equal(found.cloud_mask(i), index.cloud_mask(i), strict=True)
        for read, there in (("read", index.available), ("tokens", index.has_tokens)):
            for name in np.array(index.modalities)[there[i]]:
                if (index.keys[i], name, read) in bad:
                    with pytest.raises(DataError, match=f"terramesh, split train: sample '{index.keys[i]}' has no {name}"):
                        found.read(i, name)
                    continue
                np.testing.assert_array_equal(getattr(found, read)(i, name), getattr(index, read)(i, name), strict=True)


@pytest.mark.parametrize("wanted", [None, ["NDVI", "DEM"], ["NDVI"], ["S1GRD", "LULC"]])
def test_records_are_the_samples(root, prepared, wanted):
    index, found = (open_index(folder, "train", wanted) for folder in (root, prepared))
    assert isinstance(found, records.Records)
    assert_same_samples(index, pickle.loads(pickle.dumps(found)), bad=[BAD])


def test_any_program_reads_the_data_set_with_its_metadata(root, prepared):
    source = tfds.data_source("terramesh", split="train", data_dir=prepared)
    index = open_index(root, "train")
    assert [r["key"].decode() for r in source] == list(index.keys)
    assert "tensorflow" not in sys.modules
    shuffled = grain.MapDataset.source(source).shuffle(seed=0)
    assert sorted(shuffled[i]["key"].decode() for i in range(len(source))) == list(index.keys)
    found, place = source[2], index.place(2)
    assert found["subset"] == b"tiny" and found["coordinates"].tolist() == [2, -2]
    assert (found["crs"].decode(), *found["transform"]) == (place.crs, *place.transform) == ("EPSG:32632", 10, 0, 500000, 0, -10, 4000000)
    assert found["time"]["NDVI"] == 1_600_000_000 * 10**9 + 2 and json.loads(found["attributes"]["NDVI"]) == {"offset": 2}
    assert found["available"] == {"DEM": True, "LULC": True, "NDVI": True, "S2RGB": True} and not source[3]["available"]["DEM"]
    assert found["pixels"].keys() == found["available"].keys() and found["tokens"].keys() == {"DEM", "LULC"}  # as the README shows it
    assert open_index(prepared, "train").place(2) == place
    np.testing.assert_array_equal(source[1]["cloud_mask"], index.cloud_mask(1), strict=True)


@pytest.mark.parametrize(("train", "workers"), [(True, 1), (False, 0)])
def test_training_sees_the_same_batches(root, prepared, train, workers):
    def batches(folder):
        config = tiny_run.pretraining(folder)
        config.data.update(inputs=("DEM", "LULC", "NDVI", "coords"), targets=("DEM", "LULC", "coords"))
        index = pretrain.open_tokenized(config, "train")
        settings = dict(batch_size=4, train=train, workers=workers, seed=1)
        found = pretrain.batches(index, *pretrain.data_settings(config), **settings)
        return [next(found) for _ in range(3)]

    for a, b in zip(batches(root), batches(prepared), strict=True):
        for name in a.keys() - {"patches"}:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
        for name, patches in a["patches"].items():
            np.testing.assert_array_equal(patches, b["patches"][name], strict=True)


def test_training_finds_validation_and_vocabularies(root, prepared):
    config = tiny_run.pretraining(prepared)
    with config.unlocked():
        config.model.codebooks = type(config)()
    assert pretrain.with_codebooks(config).model.codebooks.to_dict() == {m: tiny_run.CODEBOOKS[m] for m in ("DEM", "LULC")}
    assert list(pretrain.open_validation(config).keys) == list(open_index(root, "val").keys)
    assert tokenizer_training.has_split(prepared, "val", "DEM") and not tokenizer_training.has_split(prepared, "test", "DEM")
    config.data.tokens = str(root)
    with pytest.raises(ValueError, match="is prepared data, which holds its tokens; leave data.tokens empty"):
        pretrain.open_tokenized(config, "train")


def test_tokens_elsewhere_are_joined_by_key(root, tmp_path):
    """And alone they are token records with the pixels' keys."""
    for name in ("DEM", "LULC"):
        folder = tmp_path / "tokens" / "train" / f"{name}_tokens"
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(root / "train" / folder.name, folder)
    tiny_run.write_split(tmp_path / "pixels", "train", 12, tokens=False)
    prepare.prepare(tmp_path / "pixels", tmp_path / "both", tokens=tmp_path / "tokens")
    index = open_index(tmp_path / "pixels", "train", tokens_root=tmp_path / "tokens")
    assert index.has_tokens.all()
    assert_same_samples(index, open_index(tmp_path / "both", "train"))
    prepare.prepare(tmp_path / "tokens", tmp_path / "alone")
    assert_same_samples(open_index(tmp_path / "tokens", "train"), open_index(tmp_path / "alone", "train"))


def test_tokens_of_other_samples_are_refused(root, tmp_path):
    tiny_run.write_split(tmp_path / "pixels", "train", 3, tokens=False)
    with ShardWriter(tmp_path / "tokens", "train", "DEM_tokens", "tiny", 1) as shard:
        shard.add("other", tokenize._npy(np.zeros((10, 2, 2), np.uint16)), ".npy")
    message = r"None of the 1 tokens in .*DEM_tokens has the key of a sample with pixels, such as 's000'; tokenize these shards"
    with pytest.raises(ValueError, match=message):
        prepare.prepare(tmp_path / "pixels", tmp_path / "out", tokens=tmp_path / "tokens")
    config = tiny_run.pretraining(tmp_path / "pixels")
    config.data.tokens = str(tmp_path / "tokens")
    with pytest.raises(ValueError, match=message):
        pretrain.open_tokenized(config, "train")


def test_tokens_beyond_the_codebook_are_refused(prepared, tmp_path):
    config = tiny_run.pretraining(prepared)
    with config.unlocked():
        config.model.codebooks.DEM = 2
    index = pretrain.open_tokenized(config, "train")
    with pytest.raises(ValueError, match="tokens of DEM go from .* but its vocabulary has 2; tokenize again"):
        pretrain.batches(index, *pretrain.data_settings(config), batch_size=4)


def test_it_appears_whole_or_not_at_all(root, prepared, tmp_path, monkeypatch, capsys):
    before = sorted((p, p.stat().st_mtime_ns) for p in prepared.rglob("*"))
    prepare.prepare(root, prepared)
    assert "nothing to do" in capsys.readouterr().out
    assert before == sorted((p, p.stat().st_mtime_ns) for p in prepared.rglob("*"))
    tiny_run.write_split(tmp_path / "other", "train", 2)
    with pytest.raises(FileExistsError, match="made of other shards or tokenizers, or the shards have changed"):
        prepare.prepare(tmp_path / "other", prepared)
    with pytest.raises(FileExistsError, match="holds no prepared data"):
        prepare.prepare(root, tmp_path)
    with pytest.raises(ValueError, match="in an object store, where ArrayRecord cannot be written"):
        prepare.prepare(root, "gs://bucket/out")
    with pytest.raises(FileNotFoundError, match="No shards in .*nowhere"):
        prepare.prepare(tmp_path / "nowhere", tmp_path / "out")
    link = terramesh._link

    def filled(source, target):
        assert (Path(target).parents[2] / terramesh.INFO).exists(), "what can fail is written before"
        link(source, target)
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "of another process").touch()

    monkeypatch.setattr(terramesh, "_link", filled)
    with pytest.raises(FileExistsError, match="was filled by another process meanwhile"):
        prepare.prepare(root, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    names = [terramesh.CLAIM, *(f"terramesh-{split}.array_record-00000-of-00001" for split in ("train", "val"))]
    assert sorted(p.name for p in (tmp_path / "out.parts").iterdir()) == names
    monkeypatch.setattr(terramesh, "_link", link)
    monkeypatch.setattr(terramesh, "record", None)  # none is made again
    prepare.prepare(root, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(prepared)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out"]


def test_a_file_that_can_have_no_second_name_is_copied(tmp_path, monkeypatch):
    (tmp_path / "part").write_bytes(b"records")

    def impossible(*_):
        raise OSError(errno.EPERM, "of no file system")

    monkeypatch.setattr(os, "link", impossible)
    terramesh._link(str(tmp_path / "part"), str(tmp_path / "out"))
    assert contents(tmp_path) == {"out": b"records", "part": b"records"}


def test_a_damaged_record_is_a_bad_sample(root, tmp_path):
    tiny_run.write_split(tmp_path / "data", "train", 2)
    prepare.prepare(tmp_path / "data", tmp_path / "out")
    (path,) = (tmp_path / "out" / "terramesh" / "1.0.0").glob("*.array_record-*")
    content = bytearray(path.read_bytes())
    content[200:4000] = bytes(3800)
    path.write_bytes(content)
    with pytest.raises(DataError, match="sample 's000' cannot be read .*; make the data set again"):
        open_index(tmp_path / "out", "train").read(0, "DEM")


def test_without_beam_it_says_what_to_install(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "apache_beam.options.pipeline_options", None)
    assert cli.main(["data", "prepare", str(root), f"--out={tmp_path / 'out'}", "--beam"]) == 2
    assert "pip install 'terramind-jax[beam]'" in capsys.readouterr().err


def in_files(monkeypatch, number):
    """As many files a split, which is what more bytes would make of it."""
    monkeypatch.setattr(prepare, "_ends", lambda index, form: np.linspace(0, len(index), number + 1).astype(int).tolist())


@pytest.mark.parametrize("beam", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_records_keep_their_order_over_many_files_and_with_beam(root, prepared, tmp_path, monkeypatch, beam):
    if beam:
        pytest.importorskip("apache_beam", reason="the extra beam is not installed")
    in_files(monkeypatch, 3)
    options = ["--beam=runner=DirectRunner"] if beam else []
    assert cli.main(["data", "prepare", str(root), f"--out={tmp_path / 'out'}", *options]) == 0
    assert len(list((tmp_path / "out" / "terramesh" / "1.0.0").glob("terramesh-train.array_record-*-of-00003"))) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    for split in ("train", "val"):
        assert_same_samples(open_index(root, split), open_index(tmp_path / "out", split), bad=[BAD] if split == "train" else [])
        one, other = (tfds.data_source("terramesh", split=split, data_dir=folder) for folder in (prepared, tmp_path / "out"))
        for a, b in zip(one, other, strict=True):
            np.testing.assert_equal(a, b)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_preparation_that_was_killed_makes_what_is_missing_and_ends_with_the_same_bytes(root, tmp_path, monkeypatch):
    in_files(monkeypatch, 3)
    prepare.prepare(root, tmp_path / "whole")
    made, record, kills = [], terramesh.record, [10]

    def killed(index, form, i):
        if len(made) in kills:
            raise KeyboardInterrupt
        made.append((len(index), i))
        return record(index, form, i)

    monkeypatch.setattr(terramesh, "record", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(root, tmp_path / "out")
    there = contents(tmp_path / "out.parts")
    assert len([name for name in there if ".tmp" not in name]) == 3 and not (tmp_path / "out").exists()
    kills.clear()
    in_files(monkeypatch, 2)  # as a record that cannot be read while it is probed would make of it
    prepare.prepare(root, tmp_path / "out")
    assert sorted(made[10:]) == [(5, i) for i in range(5)] + [(12, i) for i in range(8, 12)]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_the_fields_of_a_record_are_in_order_in_every_process(root):
    _, indexes = prepare._find(str(root), str(root))
    form = prepare._form(indexes)
    written = terramesh.serializer(form)(terramesh.record(indexes["train"], form, 2))
    names = ["coordinates", "crs", "key", *(f"{group}/{m}" for group in ("available", "attributes", "time") for m in form["pixels"])]
    places = [written.index(b"\n" + bytes([len(name)]) + name.encode()) for name in sorted(names)]
    assert places == sorted(places)


def test_files_of_other_shards_are_not_taken_up(root, prepared, tmp_path, monkeypatch):
    """Nor are they told by their number alone. One that cannot be deleted stops it; a folder may lie elsewhere."""
    parts, elsewhere = tmp_path / "out.parts", tmp_path / "elsewhere"
    elsewhere.mkdir()
    parts.symlink_to(elsewhere)
    claim = json.dumps({"made_from": {}, "ends": {}})
    (parts / terramesh.CLAIM).write_text(claim)
    for name in ("train", "val"):
        (parts / f"terramesh-{name}.array_record-00000-of-00001").write_bytes(b"of other shards")

    def refused(path):
        raise PermissionError(path)

    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr(os, "unlink", refused)
        prepare.prepare(root, tmp_path / "out")
    assert (parts / terramesh.CLAIM).read_text() == claim
    prepare.prepare(root, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(prepared)
    assert not list(elsewhere.iterdir())


def test_a_folder_of_anything_else_is_left_alone(root, tmp_path):
    parts = tmp_path / "out.parts"
    parts.mkdir()
    (parts / terramesh.INFO).write_text("{}")  # a data set that somebody named so
    with pytest.raises(FileExistsError, match=f"^{parts} holds something else than files of a preparation, which would wait there; move"):
        prepare.prepare(root, tmp_path / "out")
    assert contents(tmp_path) == {f"out.parts/{terramesh.INFO}": b"{}"}


def test_files_have_room_for_the_largest_records(root, monkeypatch):
    _, indexes = prepare._find(str(root), str(root))
    form = prepare._form(indexes)
    monkeypatch.setattr(prepare, "_PROBED", 12)
    one = max(len(terramesh.serializer(form)(terramesh.record(indexes["train"], form, i))) for i in range(12))
    for size, expected in ((one - 1, [*range(13)]), (6 * one, [0, 6, 12]), (6 * one - 1, [0, 4, 8, 12]), (99 * one, [0, 12])):
        monkeypatch.setattr(terramesh, "_PART", size)
        assert prepare._ends(indexes["train"], form) == expected
