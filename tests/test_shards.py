"""The sample format: what we write others read, what others write we read, and damaged samples are one sentence."""

import io
import json
import os
import tarfile
import zipfile

import numcodecs
import numpy as np
import pytest

from terramind_jax.data.errors import DataError
from terramind_jax.data.shards import ShardWriter, new_folder, read_attributes, read_sample, write_sample

ARRAYS = {
    "bands": np.arange(2 * 9 * 7, dtype=np.uint16).reshape(1, 2, 9, 7),
    "center_lon": np.float64(-7.5),
    "time": np.array([1_600_000_000 * 10**9], np.int64),
    "cloud_mask": np.eye(9, 7, dtype=np.uint8)[None],
    "power": np.linspace(-30, 0, 63, dtype=np.float16).reshape(9, 7),
}


def _zip(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, value in files.items():
            z.writestr(name, value if isinstance(value, bytes) else json.dumps(value))
    return out.getvalue()


def _group(meta, chunks):
    """A hand-made sample with one array `a` and no consolidated metadata."""
    base = {
        "chunks": [2],
        "compressor": None,
        "dtype": "<i2",
        "fill_value": 0,
        "filters": None,
        "order": "C",
        "shape": [2],
        "zarr_format": 2,
    }
    return _zip({".zgroup": {"zarr_format": 2}, "a/.zarray": base | meta, **{f"a/{k}": v for k, v in chunks.items()}})


def _check_same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, strict=False)
        assert found[name].dtype == np.asarray(value).dtype and found[name].shape == np.shape(value), name


def test_round_trip_keeps_values_dtypes_and_shapes():
    payload = write_sample(ARRAYS, attrs={"source": "x"}, array_attrs={"bands": {"unit": "dn"}})
    _check_same(read_sample(payload), ARRAYS)
    assert set(read_sample(payload, ("bands", "absent"))) == {"bands"}
    assert read_attributes(payload) == {"source": "x"}
    assert read_attributes(payload, "bands") == {"_ARRAY_DIMENSIONS": ["time", "band", "y", "x"], "unit": "dn"}


def test_equal_arrays_give_equal_bytes_in_an_uncompressed_zip():
    payload = write_sample(ARRAYS)
    assert payload == write_sample(ARRAYS)
    with zipfile.ZipFile(io.BytesIO(payload)) as z:
        assert {i.compress_type for i in z.infolist()} == {zipfile.ZIP_STORED}
        assert {".zgroup", ".zattrs", ".zmetadata", "bands/.zarray", "bands/.zattrs", "bands/0.0.0.0"} <= set(z.namelist())


def test_equal_arrays_of_many_blocks_give_equal_bytes(monkeypatch):
    """Blosc's threads would lay the blocks down as they finish them."""
    monkeypatch.setattr(numcodecs.blosc, "use_threads", None)  # as it comes: zarr turns them off
    bands = (np.arange(264) * 9 + np.random.default_rng(0).integers(0, 99, (1, 12, 264, 264))).astype(np.uint16)
    assert len({write_sample({"bands": bands}) for _ in range(30)}) == 1


def test_zarr_reads_what_we_write(tmp_path):
    zarr = pytest.importorskip("zarr")
    (tmp_path / "a.zip").write_bytes(write_sample(ARRAYS, attrs={"source": "x"}))
    store = zarr.storage.ZipStore(tmp_path / "a.zip", mode="r")
    group = zarr.open_group(store, mode="r", zarr_format=2, use_consolidated=True)
    _check_same({k: np.asarray(v[...]) for k, v in group.arrays()}, ARRAYS)
    assert group["bands"].attrs["_ARRAY_DIMENSIONS"] == ["time", "band", "y", "x"] and group.attrs["source"] == "x"


@pytest.mark.parametrize("chunks", [(1, 2, 9, 7), (1, 1, 4, 3)])
@pytest.mark.parametrize("dtype", ["<u2", ">i4", "<f2", "<f8"])
@pytest.mark.parametrize(
    "compressor", [None, numcodecs.Blosc("lz4"), numcodecs.Zstd(), numcodecs.GZip()], ids=lambda c: getattr(c, "codec_id", "none")
)
def test_we_read_what_zarr_writes(tmp_path, chunks, dtype, compressor):
    zarr = pytest.importorskip("zarr")
    expected = ARRAYS["bands"].astype(dtype)
    with zarr.storage.ZipStore(tmp_path / "a.zip", mode="w") as store:
        group = zarr.create_group(store, zarr_format=2)
        array = group.create_array(
            "bands", shape=expected.shape, chunks=chunks, dtype=dtype, compressors=compressor, filters=None, fill_value=0
        )
        array[...] = expected
    found = read_sample((tmp_path / "a.zip").read_bytes())["bands"]
    np.testing.assert_array_equal(found, expected)
    assert found.dtype.isnative and found.dtype.newbyteorder("<") == np.dtype(dtype).newbyteorder("<")


def test_missing_chunks_hold_the_fill_value():
    found = read_sample(_group({"shape": [5], "fill_value": 7}, {"1": np.array([3, 4], "<i2").tobytes()}))["a"]
    np.testing.assert_array_equal(found, [7, 7, 3, 4, 7])
    nan = read_sample(_group({"dtype": "<f4", "fill_value": "NaN", "shape": [2]}, {}))["a"]
    assert np.isnan(nan).all()


def test_filters_and_slash_separated_chunks():
    encoded = numcodecs.Delta("<i2").encode(np.array([5, 6], "<i2")).tobytes()
    found = read_sample(_group({"filters": [{"id": "delta", "dtype": "<i2"}]}, {"0": encoded}))["a"]
    np.testing.assert_array_equal(found, [5, 6])
    meta = {"shape": [1, 2], "chunks": [1, 1], "dimension_separator": "/"}
    found = read_sample(_group(meta, {"0/0": b"\1\0", "0/1": b"\2\0"}))["a"]
    np.testing.assert_array_equal(found, [[1, 2]])


def test_text_and_objects_are_skipped_and_never_unpickled():
    payload = _group({"dtype": "|O", "filters": [{"id": "pickle"}]}, {"0": b"cos\nsystem\n."})
    assert read_sample(payload) == {}
    with pytest.raises(DataError, match="never unpickled"):
        read_sample(payload, ("a",))
    with pytest.raises(ValueError, match="cannot be stored"):
        write_sample({"a": np.array([None])})


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"not a zip", "is no zip file"),
        (_zip({"readme.txt": b"hello"}), "no Zarr group"),
        (_zip({"zarr.json": {}, "a/zarr.json": b"{"}), "damaged 'a/zarr.json'"),
        (_zip({"zarr.json": {}, "a/zarr.json": {"node_type": "array", "data_type": "int8", "zarr_format": 3}}), "damaged 'a'"),
        (_zip({".zmetadata": b"{"}), "damaged '.zmetadata'"),
        (_zip({".zmetadata": {"zarr_consolidated_format": 1}}), "without metadata"),
        (_group({"order": "F"}, {}), "order 'F', expected C"),
        (_group({"compressor": {"id": "pickle"}}, {"0": b""}), "codec 'pickle', expected one of blosc"),
        (_group({"filters": [{"id": "json2"}]}, {"0": b""}), "codec 'json2'"),
        (_group({"shape": [1 << 40]}, {}), "larger than any sample"),
        (_group({"chunks": [0]}, {}), "do not fit its shape"),
        (_group({}, {"0": b"abc"}), "damaged|bytes, expected 4"),
        (_group({}, {"0": b"abcdef"}), "bytes, expected 4"),
        (_group({}, {"0": b"a" * 10_000}), "larger than its array"),
        (_group({"compressor": {"id": "zstd"}}, {"0": b"abc"}), "damaged 'a'"),
    ],
)
def test_bad_samples_say_what_is_wrong(payload, message):
    with pytest.raises(DataError, match=message):
        read_sample(payload)


def test_a_flipped_bit_is_noticed():
    payload = bytearray(write_sample({"bands": np.random.default_rng(0).integers(0, 9000, (1, 2, 32, 32)).astype(np.uint16)}))
    payload[len(payload) // 2] ^= 16
    with pytest.raises(DataError):
        read_sample(bytes(payload))


def test_any_damaged_byte_is_a_data_error_or_harmless():
    payload = write_sample({"bands": np.arange(8, dtype=np.uint16).reshape(1, 2, 2, 2), "center_lon": np.float64(7)})
    for at in range(len(payload)):
        for flip in (1, 32, 255):
            damaged = bytearray(payload)
            damaged[at] ^= flip
            for read in (read_sample, read_attributes, lambda x: read_attributes(x, "bands"), lambda x: read_sample(x, ("bands",))):
                try:
                    read(bytes(damaged))
                except DataError:
                    pass


def test_attributes_that_are_no_object_and_arrays_of_text():
    with pytest.raises(DataError, match="has a damaged"):
        read_attributes(_zip({".zmetadata": {"metadata": {".zattrs": 5}}}))
    with pytest.raises(DataError, match="stores 'a' as [|]S4, expected numbers or dates"):
        read_sample(_group({"dtype": "|S4"}, {"0": b"abcdefgh"}), ("a",))


@pytest.mark.parametrize("there", [None, "empty"])
def test_a_new_folder_is_whole_or_absent_and_touches_no_other(tmp_path, there):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("mine")
    if there:
        (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as partial:
        raise RuntimeError
    assert os.listdir(tmp_path / "out.partial") == ["mine.txt"] and not os.path.exists(partial)
    with new_folder(tmp_path / "out") as first, new_folder(tmp_path / "out2") as second:
        assert first != second
        open(os.path.join(first, "a"), "w").close()
    with pytest.raises(FileExistsError, match="filled by another process"), new_folder(tmp_path / "out"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["out", "out.partial", "out2"] and os.listdir(tmp_path / "out") == ["a"]


def test_shard_writer_is_atomic_and_checks_keys(tmp_path):
    with ShardWriter(tmp_path, "train", "DEM", "x", 3) as shard:
        shard.add("b", b"1")
        shard.add("a", b"22", ".npy")
        assert not os.path.exists(shard.path)
        for key in ("b", "", "../c"):
            with pytest.raises(ValueError, match="unique in a shard"):
                shard.add(key, b"")
    assert os.listdir(tmp_path / "train" / "DEM") == ["x_shard_000003.tar"]
    with tarfile.open(shard.path) as tar:
        assert tar.getnames() == ["b.zarr.zip", "a.npy"]
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "train", "LULC", "x", 0):
        raise RuntimeError
    assert os.listdir(tmp_path / "train" / "LULC") == []


def test_unnamed_axes_are_refused():
    with pytest.raises(ValueError, match="5 axes but 0 dimension names"):
        write_sample({"a": np.zeros((1, 1, 1, 1, 2))})
