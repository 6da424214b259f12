"""The join over modalities, its cache, and what damaged shards do."""

import dataclasses
import gc
import io
import os
import pickle
import re
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from terramind_jax import cli
from terramind_jax.data import clouds, scan
from terramind_jax.data.errors import DataError
from terramind_jax.data.index import open_index
from terramind_jax.data.shards import ShardWriter, write_sample
from terramind_jax.data.tars import scan_tar

BANDS = {"S2L2A": 12, "LULC": 1, "S1GRD": 2, "S2RGB": 3}


def _sample(modality, value, **extra):
    return write_sample({"bands": np.full((1, BANDS[modality], 4, 6), value, np.uint8), **extra})


def _npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def _zip_of_text():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("readme.txt", "hello")
    return out.getvalue()


@pytest.fixture
def root(tmp_path):
    """S2L2A: b, c in one shard and a in another; LULC: c, d; tokens of LULC: c, z."""
    for number, keys in enumerate(("cb", "a")):
        with ShardWriter(tmp_path, "train", "S2L2A", "x", number) as shard:
            for k in keys:
                shard.add(k, _sample("S2L2A", ord(k)))
    with ShardWriter(tmp_path, "train", "LULC", "x", 0) as shard:
        shard.add("d", _sample("LULC", ord("d"), center_lon=np.float64(7), center_lat=np.array([-3.0])))
        shard.add("c", _sample("LULC", ord("c"), center_lon=np.float64(np.nan), center_lat=np.float64(0)))
    with ShardWriter(tmp_path, "train", "LULC_tokens", "x", 0) as shard:
        shard.add("c", _npy(np.full((10, 14, 14), 5, np.uint16)), ".npy")
        shard.add("z", _npy(np.zeros((10, 14, 14), np.uint16)), ".npy")
    os.makedirs(tmp_path / "train" / "notes")
    return tmp_path


def test_join_keeps_every_location(root):
    index = open_index(root, "train")
    assert index.modalities == ("S2L2A", "LULC") and list(index.keys) == ["a", "b", "c", "d"] and len(index) == 4
    np.testing.assert_array_equal(index.available, [[1, 0], [1, 0], [1, 1], [0, 1]])
    np.testing.assert_array_equal(index.has_tokens, [[0, 0], [0, 0], [0, 1], [0, 0]])
    for i, key in enumerate(index.keys):
        for m, modality in enumerate(index.modalities):
            if index.available[i, m]:
                pixels = index.read(i, modality)
                assert pixels.shape == (4, 6, BANDS[modality]) and (pixels == ord(key)).all() and pixels.dtype == np.uint8
    assert index.tokens(2, "LULC").shape == (10, 14, 14) and (index.tokens(2, "LULC") == 5).all()


def test_requested_modalities_are_columns_even_without_a_folder(root):
    index = open_index(root, "train", ["S1GRD", "LULC", "coords"])
    assert index.modalities == ("S1GRD", "LULC") and list(index.keys) == ["c", "d"]
    np.testing.assert_array_equal(index.available, [[0, 1], [0, 1]])
    with pytest.raises(ValueError, match="Unknown modality 'S2L3'"):
        open_index(root, "train", ["S2L3"])


def test_coordinates(root):
    index = open_index(root, "train")
    assert index.coordinates(3) == (7.0, -3.0)
    assert index.coordinates(2) is None and index.coordinates(0) is None and index.place(0) is None


def test_cloud_masks(tmp_path):
    """Of whichever Sentinel-2 modality carries one; other shapes are damage."""
    mask = np.arange(24, dtype=np.uint8).reshape(1, 4, 6) % 7
    masks = {"S2L2A": {"a": None, "c": mask[0], "d": mask[0, 0]}, "S2RGB": {"a": mask}}
    for name, by_key in masks.items():
        with ShardWriter(tmp_path, "train", name, "x", 0) as shard:
            for key, array in by_key.items():
                shard.add(key, _sample(name, 1, **({} if array is None else {"cloud_mask": array})))
    with ShardWriter(tmp_path, "train", "LULC", "x", 0) as shard:
        shard.add("b", _sample("LULC", 1))
    index = open_index(tmp_path, "train")
    for i in (0, 2):
        np.testing.assert_array_equal(index.cloud_mask(i), mask[0], strict=True)
    assert index.cloud_mask(1) is None
    with pytest.raises(DataError, match=r"sample 'd' has a cloud_mask of uint8 \(6,\), expected integers \[y, x\]"):
        index.cloud_mask(3)
    assert clouds.clear(np.arange(7)).tolist() == [True, True, True, False, False, False, False]


def test_keys_can_be_searched(root):
    keys = open_index(root, "train").keys
    assert [keys.find(k) for k in keys] == [0, 1, 2, 3] and keys[-1] == "d" and keys[1:3] == ["b", "c"]
    with pytest.raises(KeyError, match="no sample 'bb'"):
        keys.find("bb")


def test_a_pickled_index_reads_the_same(root):
    index = open_index(root, "train")
    index.read(0, "S2L2A")
    copy = pickle.loads(pickle.dumps(index))
    np.testing.assert_array_equal(copy.read(2, "LULC"), index.read(2, "LULC"))
    assert list(copy.keys) == list(index.keys)


def test_cache_is_used_until_a_shard_changes(root, monkeypatch):
    open_index(root, "train")
    assert sorted(p.name for p in (root / "train").iterdir()) == ["LULC", "LULC_tokens", "S2L2A", "notes", "samples.index"]
    scanned = []
    scan_shard = scan.scan_shard
    monkeypatch.setattr(scan, "scan_shard", lambda path, *args, **options: scanned.append(path) or scan_shard(path, *args, **options))
    assert len(open_index(root, "train")) == 4 and not scanned
    with ShardWriter(root, "train", "LULC", "x", 0) as shard:
        shard.add("e", _sample("LULC", 1))
    assert list(open_index(root, "train", ["LULC"]).keys) == ["e"]
    assert scanned == [str(root / "train" / "LULC" / "x_shard_000000.tar")]  # the others are taken from the old index
    index = open_index(root, "train")
    assert index.keys == ["a", "b", "c", "e"] and [int(index.read(i, "S2L2A").max()) for i in range(3)] == [97, 98, 99]


def test_a_damaged_cache_is_rebuilt(root):
    open_index(root, "train")
    path = root / "train" / "samples.index"
    whole = path.read_bytes()
    for damaged in (b"PK\3\4 nonsense", b"", whole[:100], whole[:-200], whole.replace(b'"fields"', b'"fjelds"')):
        path.write_bytes(damaged)
        assert len(open_index(root, "train")) == 4


def test_more_files_than_may_be_open(root, monkeypatch):
    monkeypatch.setattr("terramind_jax.data.storage._OPEN_FILES", 1)
    index = open_index(root, "train")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for i in (0, 1, 2, 0, 1):
        index.read(i, "S2L2A")
    assert not before or len(os.listdir("/proc/self/fd")) <= before + 1


def test_empty_folder_says_what_was_expected(tmp_path):
    expected = f"No samples in {tmp_path}/test; expected tars like {tmp_path}/test/MODALITY/NAME_shard_000001.tar of KEY.zarr.zip, where"
    with pytest.raises(FileNotFoundError, match=re.escape(expected)):
        open_index(tmp_path, "test", ["DEM"])
    os.makedirs(tmp_path / "train" / "S2L2A")
    with pytest.raises(FileNotFoundError, match="No samples"):
        open_index(tmp_path, "train")


@pytest.mark.parametrize("where", ["in the first header", "in a member", "before the end mark"])
def test_truncated_tar_names_the_file_and_what_to_do(root, where):
    path = root / "train" / "LULC" / "x_shard_000000.tar"
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    os.truncate(path, {"in the first header": 100, "in a member": last.offset_data + 50, "before the end mark": end}[where])
    with pytest.raises(DataError, match=r"x_shard_000000.tar is truncated: .*; delete it or copy it again\.$"):
        open_index(root, "train")


def test_damaged_tar_header(root):
    path = root / "train" / "LULC" / "x_shard_000000.tar"
    path.write_bytes(b"garbage!" * 200)
    with pytest.raises(DataError, match="damaged: there is no tar header at byte 0"):
        open_index(root, "train")


def _with_size(path, field):
    """Writes `field` as the size of a tar's first member, with a right checksum."""
    raw = bytearray(path.read_bytes())
    raw[124:136], raw[148:156] = field.ljust(12, b"\0"), b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    path.write_bytes(raw)


@pytest.mark.parametrize("field", [b"-1000", b"\xff" * 11 + b"\0"])
def test_a_negative_size_in_a_tar_is_damage(root, field):
    path = root / "train" / "LULC" / "x_shard_000000.tar"
    _with_size(path, field)
    with pytest.raises(DataError, match="x_shard_000000.tar is damaged: there is no tar header at byte 0"):
        next(scan_tar(path))


@pytest.mark.parametrize("size", ["abc", "-512", "1_0", "9" * 5000])
def test_a_pax_size_that_is_no_size_is_damage(tmp_path, size):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("a.npy")
        member.pax_headers = {"size": size}
        tar.addfile(member)
    with pytest.raises(DataError, match="x.tar is damaged: it gives a member the size '[^']{1,20}'; delete it or copy it again"):
        list(scan_tar(tmp_path / "x.tar"))


def test_any_damaged_byte_of_tokens_is_a_data_error_or_harmless(tmp_path):
    payload = _npy(np.zeros((10, 2, 2), np.uint16))
    cases = [payload[:at] + bytes([payload[at] ^ flip]) + payload[at + 1 :] for at in range(len(payload)) for flip in (1, 5, 32, 255)]
    with ShardWriter(tmp_path, "train", "LULC_tokens", "x", 0) as shard:
        for n, case in enumerate([*cases, _npy(np.zeros(3)), _zip_of_text()]):
            shard.add(f"{n:06d}", case, ".npy")
    index = open_index(tmp_path, "train")
    failed = []
    for i in range(len(index)):
        try:
            assert isinstance(index.tokens(i, "LULC"), np.ndarray)
        except DataError as error:
            failed.append(str(error))
    assert "holds float64 instead of integer token ids" in failed[-2] and "is no readable .npy file" in failed[-1] and len(failed) > 100


def test_tokens_are_sound_whatever_other_threads_do(root):
    """Where the garbage collector calls Python, as JAX has it do, CPython 3.11 mixes up the syntax trees that several threads build."""
    index, before = open_index(root, "train"), gc.get_threshold()

    def collected(*_) -> None:
        time.sleep(0)  # lets another thread in

    gc.callbacks.append(collected)
    try:
        gc.set_threshold(7)
        with ThreadPoolExecutor(16) as pool:
            assert all((ids == 5).all() for ids in pool.map(lambda _: index.tokens(2, "LULC"), range(3000)))
    finally:
        gc.callbacks.remove(collected)
        gc.set_threshold(*before)


def test_pixels_that_are_no_real_numbers(tmp_path):
    with ShardWriter(tmp_path, "train", "LULC", "x", 0) as shard:
        moments = {"bands": np.zeros((1, 1, 4, 4), "M8[ns]"), "center_lon": np.zeros(1, "M8[ns]"), "center_lat": np.zeros(1)}
        shard.add("a", write_sample(moments))
    index = open_index(tmp_path, "train")
    with pytest.raises(DataError, match="sample 'a' has 'bands' of type datetime64.*, expected real numbers"):
        index.read(0, "LULC")
    assert index.coordinates(0) is None


def test_shards_list_their_samples_and_a_fingerprint_follows_the_pixels(root):
    def prints():
        index = open_index(root, "train")
        return {name: index.fingerprint("S2L2A", samples) for name, samples in index.shards("S2L2A").items()}

    index, before = open_index(root, "train"), prints()
    assert {n: [index.keys[i] for i in s] for n, s in index.shards("S2L2A").items()} == {
        "x_shard_000000.tar": ["c", "b"],
        "x_shard_000001.tar": ["a"],
    }
    for samples in index.shards("S2L2A").values():
        for i in samples:
            np.testing.assert_array_equal(index._pixels["S2L2A"].beside(int(i)), samples)
    os.utime(root / "train" / "S2L2A" / "x_shard_000000.tar", (1, 1))
    assert prints() == before
    with ShardWriter(root, "train", "S2L2A", "x", 0) as shard:
        for k in "cb":
            shard.add(k, _sample("S2L2A", ord(k) + (k == "b")))  # the same keys and sizes
    assert [prints()[n] == before[n] for n in sorted(before)] == [False, True]


def test_bad_samples_name_shard_and_key(tmp_path):
    with ShardWriter(tmp_path, "train", "LULC", "x", 0) as shard:
        shard.add("a", b"no zip at all")
        shard.add("b", write_sample({"other": np.zeros(3)}))
        shard.add("c", write_sample({"bands": np.zeros((1, 2, 4, 4), np.uint8)}))
        shard.add("d", _zip_of_text())
    with ShardWriter(tmp_path, "train", "LULC_tokens", "x", 0) as shard:
        shard.add("a", b"no npy", ".npy")
    index = open_index(tmp_path, "train")
    for i, message in enumerate(
        ("is no zip file", "has no array 'bands'", r"shape \(2, 4, 4\), expected \[1, y, x\]", "is a zip but no Zarr group")
    ):
        with pytest.raises(DataError, match=rf"x_shard_000000.tar: sample '{index.keys[i]}' .*{message}"):
            index.read(i, "LULC")
    with pytest.raises(DataError, match="sample 'a' is no readable .npy file"):
        index.tokens(0, "LULC")
    with pytest.raises(DataError, match="Sample 'b' has no tokens of LULC"):
        index.tokens(1, "LULC")
    with pytest.raises(DataError, match="Sample 'b' has no S2L2A"):
        index.read(1, "S2L2A")


def test_a_shard_cut_after_indexing(root):
    index = open_index(root, "train")
    path = root / "train" / "LULC" / "x_shard_000000.tar"
    os.truncate(path, 600)
    with pytest.raises(DataError, match=r"sample 'd' ends early: 0 of \d+ bytes; index it again"):
        index.read(3, "LULC")
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        pickle.loads(pickle.dumps(index)).read(3, "LULC")
    assert open_index(root, "train").keys == ["a", "b", "c"]
    with pytest.raises(DataError, match="The index of .*train was built anew while it was in use; open it again"):
        pickle.loads(pickle.dumps(index))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_scan_agrees_with_tarfile(tmp_path, form):
    names = ["short.npy", "folder/" + "n" * 90 + ".npy", "d" * 80 + "/" + "n" * 60 + ".npy"]
    names += [] if form == tarfile.USTAR_FORMAT else ["n" * 300 + ".npy", "é" * 60 + ".npy"]
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for i, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = 700 * i
            if form == tarfile.PAX_FORMAT:
                member.pax_headers = {"comment": "x", "mtime": "1.5"}
            tar.addfile(member, io.BytesIO(bytes([i]) * member.size))
        folder = tarfile.TarInfo("empty")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    found = list(scan_tar(tmp_path / "a.tar"))
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert found == [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]


def test_a_report_names_what_is_missing_repeated_and_truncated(root, capsys):
    with ShardWriter(root, "train", "LULC", "y", 7) as shard:
        shard.add("c", _sample("LULC", 9))
        shard.add("q", _sample("LULC", 9))
    with ShardWriter(root, "train", "S1GRD", "x", 0) as shard:
        shard.add("a", _sample("S1GRD", 1))
    os.truncate(root / "train" / "S1GRD" / "x_shard_000000.tar", 700)
    assert cli.main(["data", "index", str(root)]) == 1
    text = capsys.readouterr().out
    assert "train: 6 locations" in text and "x_shard_000000.tar is truncated" in text
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith("  ")}
    assert lines["S2L2A"] == ["3", "3", "0"] and lines["LULC"] == ["3", "3", "1"] and lines["S1GRD"] == ["0", "6", "0"]
    index = open_index(root, "train", ["S2L2A", "LULC"])  # the damaged tar is none of these
    assert [index.subsets[s] for s in index.subset] == ["x", "x", "x", "x", "y"]
    assert int(index.read(index.keys.find("c"), "LULC").max()) == ord("c"), "the first of two counts"
    with pytest.raises(DataError, match="x_shard_000000.tar is truncated"):
        open_index(root, "train")


def test_tokens_elsewhere_are_joined_by_key(root, tmp_path):
    elsewhere = tmp_path / "tokens"
    with ShardWriter(elsewhere, "train", "S2L2A_tokens", "x", 0) as shard:
        for number, key in enumerate("bzd"):
            shard.add(key, _npy(np.full((10, 2, 2), number, np.uint16)), ".npy")
    index = pickle.loads(pickle.dumps(open_index(root, "train", ["S2L2A", "LULC"], tokens_root=elsewhere)))
    assert index.keys == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(index.has_tokens, [[0, 0], [1, 0], [0, 0], [1, 0]])
    assert [int(index.tokens(i, "S2L2A").max()) for i in (1, 3)] == [0, 2]
    with pytest.raises(DataError, match="Sample 'c' has no tokens of S2L2A"):
        index.tokens(2, "S2L2A")


def test_millions_of_keys_open_at_once_and_travel_as_names(tmp_path, monkeypatch):
    n, folders = 2_000_000, ("S2L2A", "LULC")
    where = np.stack([np.arange(n) * 1024, *(np.full(n, v) for v in (1000, 40, 900, 0))], 1)
    keys = np.char.encode(np.char.add("k", np.char.zfill(np.arange(n).astype("U7"), 7)))
    for folder in folders:
        os.makedirs(tmp_path / "train" / folder)
        (tmp_path / "train" / folder / "x_shard_000000.tar").touch()
    part = scan.Part(keys, where, np.zeros((n, 2)), ["{}"])
    monkeypatch.setattr(scan, "_scan", lambda *arguments: dataclasses.replace(part))
    open_index(tmp_path, "train")
    start = time.perf_counter()
    index = open_index(tmp_path, "train")
    again = pickle.loads(pickle.dumps(index))
    assert time.perf_counter() - start < 1.0
    assert len(again) == n and again.keys[n - 1] == f"k{n - 1:07d}" and again.keys.find("k0001234") == 1234
    assert again.available.all() and not again.available.flags.owndata and len(pickle.dumps(index)) < 1000
