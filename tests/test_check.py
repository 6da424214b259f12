"""A copy is looked at as a whole: shards and keys that it lacks, tokens, statistics that cannot be, the offset of Sentinel-2."""

import io
import json
import shutil

import numpy as np
import pytest
import tiny_run

from terramind_jax import cli
from terramind_jax.data import check
from terramind_jax.data.index import open_index
from terramind_jax.data.shards import ShardWriter, write_sample
from terramind_jax.data.synthesize import synthesize


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world") / "shards"
    synthesize(str(root), scenes=16, val_scenes=0, size=48, shard_size=4, workers=1)
    return root


def write(root, modality, keys, shard=1, subset="x", bands=None):
    bands = np.float16([[[[-12, -20], [-13, -9]]] * 2]).reshape(1, 2, 2, 2) if bands is None else bands
    with ShardWriter(root, "train", modality, subset, shard) as writer:
        for key in keys:
            writer.add(key, write_sample({"bands": bands}))


def test_the_embedded_world_is_whole_and_its_offsets_are_told(world):
    samples = open_index(world, "train", ["S2L1C"])
    shifted = sum(samples.attributes(i, "S2L1C")["offset"] == 1000 for i in range(16))
    assert 0 < shifted < 16
    report = check.check(world, "train", workers=1)
    assert report.ok and report.modalities["S1GRD"].missing and not any("S1" in note for note in report.notes)
    (note,) = report.notes
    assert f"{shifted} of 16 samples are stored with an offset of 1000, {16 - shifted} without, and of 0 it cannot be told." in note
    assert "Both occur, as in TerraMesh: no fault of a copy" in note
    text = check.format_check(report)
    assert "DEM: means up to" in text and "LULC: means" not in text
    assert check.format_check(check.check(world, "train", workers=2)) == text


@pytest.mark.parametrize(("modality", "subset"), [("DEM", "majortom"), ("S1GRD", "ssl4eos12")])
def test_a_shard_that_one_modality_lacks_is_a_problem(world, tmp_path, modality, subset, capsys):
    copy = shutil.copytree(world, tmp_path / "copy")
    lost = sorted((copy / "train" / modality).glob(f"{subset}_shard_*.tar"))[-1]
    lost.unlink()
    report = check.check(copy, "train", workers=1)
    assert not report.ok and report.problems == [f"{modality} lacks 1 shards that other modalities have, {lost.name!r}; copy them."]
    assert any(note.startswith(f"{modality} is lacking in") for note in report.notes)
    assert cli.main(["data", "check", str(copy), "--workers=1"]) == 1
    assert "There are problems." in capsys.readouterr().out


def test_a_copy_tells_how_much_of_terramesh_it_is(tmp_path):
    for number in (1, 7):
        write(tmp_path, "S1RTC", [f"{number}a", f"{number}b"], number, "majortom")
    report = check.check(tmp_path, "train", workers=1)
    assert report.ok and report.notes == ["Of TerraMesh's 9089536 samples of train 4 are here, in 2 of 889 shards."]


def test_a_packed_copy_is_compared_with_what_was_packed(tmp_path):
    """Not shard by shard: a modality may be lacking where a user has none of it."""
    write(tmp_path, "S1RTC", "ab", 1)
    write(tmp_path, "DEM", "ab", 1, bands=np.ones((1, 1, 2, 2), np.int16))
    write(tmp_path, "DEM", "cd", 2, bands=np.ones((1, 1, 2, 2), np.int16))
    info = {"format": "terramesh-zarr2-tar", "splits": {"train": {"locations": 4, "S1RTC": 2, "DEM": 4}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    assert check.check(tmp_path, "train", workers=1).ok
    (tmp_path / "train/DEM/x_shard_000002.tar").unlink()
    assert check.check(tmp_path, "train", workers=1).problems == ["DEM has 2 samples of 4 that were packed; copy them again."]


def test_tokens_are_read(tmp_path):
    tiny_run.write_split(tmp_path, "train", 4)
    record = tmp_path / "train/DEM_tokens/tokenizer.json"
    record.write_text(json.dumps({"codebook_size": 30, "image_size": tiny_run.SIZE}))
    assert check.check(tmp_path, "train", ["DEM"], workers=1).ok
    with ShardWriter(tmp_path, "train", "DEM_tokens", "tiny", 1) as shard:
        for i, (shape, token) in enumerate([((10, 2, 2), 29), ((10, 2, 2), 30), ((10, 3, 2), 0)]):
            payload = io.BytesIO()
            np.save(payload, np.full(shape, token, np.uint16))
            shard.add(f"s{i:03d}", payload.getvalue(), ".npy")
        shard.add("s003", b"junk", ".npy")
    report = check.check(tmp_path, "train", ["DEM"], workers=1)
    assert (report.modalities["DEM"].tokens, report.modalities["DEM"].bad_tokens) == (4, 3)
    for problem, expected in zip(report.problems, ("go from 30 to 30", "(10, 3, 2), expected (10, 2, 2)", "no readable .npy"), strict=True):
        assert expected in problem


@pytest.mark.parametrize(
    ("modality", "values", "problem"),
    [
        ("S2L2A", (0.1, 0.4), "S2L2A has a mean of 0.2"),
        ("S2L2A", (15_000, 20_000), "where 1390 and 2107 are expected; is it in another unit"),
        ("S2L2A", (100, 500), ""),
        ("DEM", (0, 0), ""),
        ("DEM", (8000, 8001), "DEM has a mean of"),
    ],
)
def test_statistics_that_cannot_be(tmp_path, modality, values, problem):
    bands = np.random.default_rng(0).uniform(*values, (1, 12 if modality == "S2L2A" else 1, 16, 16))
    write(tmp_path, modality, "a", bands=bands.astype(np.float32 if values[1] < 1 else np.uint16))
    report = check.check(tmp_path, "train", workers=1)
    assert report.ok == (not problem) and problem in "".join(report.problems)


def test_tiles_of_several_sizes_are_told(tmp_path):
    """Each can be read, but those smaller than a crop are bad samples of a training."""
    write(tmp_path, "DEM", "abc", 1, bands=np.ones((1, 1, 4, 6), np.int16))
    assert check.check(tmp_path, "train", workers=1).notes == []
    write(tmp_path, "DEM", "d", 2, bands=np.ones((1, 1, 4, 4), np.int16))
    report = check.check(tmp_path, "train", workers=1)
    assert report.ok and report.notes == ["DEM has tiles of several sizes: 3 of 4 x 6 pixels, 1 of 4 x 4 pixels."]


def test_the_index_names_keys_that_are_lacking_or_there_twice(tmp_path):
    write(tmp_path, "S1RTC", "abcdefgh", 1)
    write(tmp_path, "S1GRD", "ij", 2)
    write(tmp_path, "S1RTC", "bk", 3)
    write(tmp_path, "DEM", "ai", 1, bands=np.ones((1, 1, 2, 2), np.int16))
    write(tmp_path, "DEM", "lz", 2, bands=np.ones((1, 1, 2, 2), np.int16))
    report = check.index(tmp_path)["train"]
    assert report.twice == {"S1RTC": ["b"]} and report.repeated["S1RTC"] == 1
    assert report.lacking["S1GRD"] == report.lacking["S1RTC"] == ["l", "z"]
    lines = check.format_index({"train": report}).splitlines()
    assert "- DEM lacks 'b', 'c', 'd', 'e', 'f', ..." in lines and "- S1RTC repeats 'b'" in lines
    assert "- S1RTC lacks 'l', 'z'" in lines
