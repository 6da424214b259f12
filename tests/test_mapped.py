"""Prepared data mapped into memory: a view's patches and tokens without the rest of the sample, and the same as through its record."""

import numpy as np
import pytest
import tiny_run

from terramind_jax import cli
from terramind_jax.data import crops, mapped, records
from terramind_jax.data.index import open_index
from terramind_jax.data.shards import ShardWriter, write_sample
from terramind_jax.train import pretrain

SIDES = {"S2L2A": (264, 264), "NDVI": (64, 48), "S1RTC": (50, 50)}  # in the crops of which only the first two are at multiples of 4


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """`tiny_run`'s samples, s003 without a readable DEM, and some with random images; S2L2A of s002 has one value everywhere."""
    root, out = tiny_run.write_shards(tmp_path_factory.mktemp("shards")), tmp_path_factory.mktemp("prepared") / "out"
    for name, side in SIDES.items():
        channels, dtype = (12, np.uint16) if name == "S2L2A" else (2 if name == "S1RTC" else 1, np.float16)
        with ShardWriter(root, "train", name, "tiny", 1) as shard:
            for i in (1, 2, 5):
                bands = np.random.default_rng(i).uniform(0, 99, (1, channels, *side)).astype(dtype)
                bands[:] = 7 if (name, i) == ("S2L2A", 2) else bands
                shard.add(f"s{i:03d}", write_sample({"bands": bands}))
    assert cli.main(["data", "prepare", str(root), f"--out={out}", "--mapped"]) == 0
    return root, out


def names(out):
    return sorted(path.name.split(".")[0] for path in (out / "train").glob("*.mapped.npy"))


def test_patches_of_every_crop_are_those_of_the_image(prepared):
    _, out = prepared
    assert names(out) == ["DEM", "DEM_tokens", "LULC", "LULC_tokens", "NDVI", "S2L2A", "coordinates"]  # 50 is no multiple of 4
    for name, size, wanted in (("S2L2A", 224, None), ("NDVI", 32, ["NDVI"])):
        found = open_index(out, "train", wanted)
        i = list(found.keys).index("s005")
        positions = np.random.default_rng(0).permutation((size // 16) ** 2)[:20]
        for variant in range(crops.VARIANTS):
            expected = crops.select_patches(crops.crop(found.read(i, name), variant, size), positions, 16)
            np.testing.assert_array_equal(found.patches(i, name, variant, size, positions), expected, strict=True)


def test_what_arrays_cannot_tell_is_asked_of_the_records(prepared):
    _, out = prepared
    found = open_index(out, "train")
    keys, positions = list(found.keys), np.arange(4)
    assert found.patches(keys.index("s003"), "DEM", 0, 32, positions) is None  # not readable
    assert found.patches(keys.index("s002"), "S2L2A", 0, 224, positions) is None  # one value everywhere
    assert found.patches(keys.index("s001"), "S1RTC", 0, 32, positions) is None  # no blocks
    assert found.patches(keys.index("s001"), "S2L2A", 0, 272, positions) is None  # too small


def test_training_sees_the_same_batches_and_opens_records_of_bad_samples_alone(prepared, monkeypatch):
    def batches(folder):
        config = tiny_run.pretraining(folder)
        config.data.update(inputs=("DEM", "LULC", "S2L2A"), targets=("DEM", "coords"))
        index = pretrain.open_tokenized(config, "train")
        found = pretrain.batches(index, *pretrain.data_settings(config), batch_size=4, seed=1)
        return [next(found) for _ in range(4)]

    record, opened = records.Records._record, []
    monkeypatch.setattr(records.Records, "_record", lambda self, i: opened.append(self.keys[i]) or record(self, i))
    for a, b in zip(*map(batches, prepared), strict=True):
        assert a["bad"].tolist() == b["bad"].tolist() and a["patches"].keys() == b["patches"].keys()
        for name, patches in a["patches"].items():
            np.testing.assert_array_equal(patches, b["patches"][name], strict=True)
    assert {"s002"} <= {*opened} <= {"s000", "s001", "s002", "s003"}  # the first two: their sizes are looked at before training


def test_what_is_there_is_kept_and_what_was_cut_off_is_written(prepared):
    _, out = prepared
    data, readable = mapped.paths(out, "train", "DEM")
    before = data.stat().st_mtime_ns, mapped.paths(out, "train", "LULC")[0].stat().st_mtime_ns
    readable.unlink()  # as if it was killed before
    assert sorted(mapped.write(open_index(out, "train"))) == names(out)
    assert data.stat().st_mtime_ns > before[0] and mapped.paths(out, "train", "LULC")[0].stat().st_mtime_ns == before[1]
    assert not list((out / "train").glob("*.tmp*"))


def test_tiles_of_several_sizes_are_refused(tmp_path):
    for i, side in enumerate((48, 64)):
        with ShardWriter(tmp_path / "shards", "train", "DEM", "tiny", i) as shard:
            shard.add(f"s{i}", write_sample({"bands": np.zeros((1, 1, side, side), np.int16)}))
    assert cli.main(["data", "prepare", str(tmp_path / "shards"), f"--out={tmp_path / 'out'}"]) == 0
    with pytest.raises(ValueError, match=r"DEM has arrays of \(12, 12, 16\) and of \(16, 16, 16\)"):
        mapped.write(open_index(tmp_path / "out", "train"))
    assert not list((tmp_path / "out" / "train").glob("*.mapped*"))
