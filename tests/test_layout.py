"""Decoding from a zip's own bytes: what Zarr writes in either format, in one chunk or several, and damage to any byte."""

import io
import zipfile

import numcodecs
import numpy as np
import pytest

from terramind_jax.data import layout, zips
from terramind_jax.data.errors import DataError
from terramind_jax.data.shards import read_attributes, read_sample, write_sample

EXPECTED = np.random.default_rng(0).integers(0, 9000, (1, 3, 20, 24)).astype(np.uint16)


def fast(payload, name="bands"):
    """As the index reads it: the directory and the metadata first, and then nothing but one piece."""
    members = zips.directory(lambda at, count: payload[at : at + count], len(payload))
    file = next(f for f in (f"{name}/.zarray", f"{name}/zarr.json") if f in members)
    found = layout.parse_bytes(name, bytes(zips.content(lambda at, count: payload[at : at + count], members[file])))
    start, length = zips.span(members, [member for member, _ in found.members()])
    assert length
    return found.assemble(zips.split(payload[start : start + length]))


def written(tmp_path, zarr_format, chunks, compressors, dtype="<u2"):
    zarr = pytest.importorskip("zarr")
    with zarr.storage.ZipStore(tmp_path / "a.zip", mode="w") as store:
        group = zarr.create_group(store, zarr_format=zarr_format, attributes={"source": "x"})
        array = group.create_array("bands", shape=EXPECTED.shape, chunks=chunks, dtype=dtype, compressors=compressors)
        array[...] = EXPECTED
        group.create_array("center_lon", shape=(), dtype="f8")[...] = 7.5
    return (tmp_path / "a.zip").read_bytes()


@pytest.mark.parametrize("chunks", [(1, 3, 20, 24), (1, 2, 10, 24)], ids=["one", "several"])
@pytest.mark.parametrize("kind", ["blosc", "zstd", "gzip", "raw"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_what_zarr_writes(tmp_path, zarr_format, chunks, kind):
    codecs = pytest.importorskip("zarr.codecs", reason="Zarr 3")
    two = {"blosc": numcodecs.Blosc("zstd"), "zstd": numcodecs.Zstd(), "gzip": numcodecs.GZip(), "raw": None}
    three = {"blosc": codecs.BloscCodec(), "zstd": codecs.ZstdCodec(), "gzip": codecs.GzipCodec(), "raw": None}
    payload = written(tmp_path, zarr_format, chunks, (two if zarr_format == 2 else three)[kind])
    np.testing.assert_array_equal(fast(payload), EXPECTED)
    assert fast(payload).dtype == np.uint16 and float(fast(payload, "center_lon")) == 7.5
    found = read_sample(payload)
    np.testing.assert_array_equal(found["bands"], EXPECTED)
    assert float(found["center_lon"]) == 7.5 and read_attributes(payload)["source"] == "x"


def test_big_endian_and_zlib(tmp_path):
    payload = written(tmp_path, 2, (1, 3, 20, 24), numcodecs.Zlib(), ">u2")
    np.testing.assert_array_equal(fast(payload), EXPECTED)
    assert fast(payload).dtype.isnative


def test_any_damaged_byte_of_the_piece_is_noticed():
    payload = write_sample({"bands": EXPECTED[:, :, :4, :4]})
    members = zips.directory(lambda at, count: payload[at : at + count], len(payload))
    chunk = members["bands/0.0.0.0"]
    piece = payload[chunk.offset : chunk.end]
    header = 30 + len("bands/0.0.0.0")
    for at in range(header, len(piece)):
        damaged = bytearray(piece)
        damaged[at] ^= 4
        with pytest.raises(ValueError, match="checksum of 'bands/0.0.0.0' does not agree"):
            zips.split(bytes(damaged))


def test_what_is_no_zip_has_no_members():
    payload = write_sample({"bands": EXPECTED})
    for damaged in (b"", b"no zip", payload[:-30], payload[:-22] + b"PK\5\6" + b"\xff" * 18):
        assert zips.directory(lambda at, count, d=damaged: d[at : at + count], len(damaged)) == {}
    deflated = io.BytesIO()
    with zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("bands/0", b"0" * 100)
    packed = deflated.getvalue()
    assert zips.span(zips.directory(lambda at, count: packed[at : at + count], len(packed)), ["bands/0"]) == (0, 0)


def test_only_known_codecs_are_built():
    meta = {"zarr_format": 3, "shape": [2], "data_type": "int8", "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2]}}}
    with pytest.raises(DataError, match="codec 'sharding_indexed', expected one of blosc"):
        layout.parse("a", meta | {"codecs": [{"name": "sharding_indexed"}]})
    assert layout.parse_bytes("a", b"{}") is None and layout.parse_bytes("a", b"[") is None


def test_decoding_into_memory_that_is_there():
    """What fits is decoded into it, of whatever codec; what does not is left as it was."""
    from terramind_jax.data.shards import write_sample

    array = np.arange(2 * 5 * 7, dtype=np.uint16).reshape(1, 2, 5, 7)
    payload = write_sample({"bands": array})
    with zipfile.ZipFile(io.BytesIO(payload)) as z:
        found = layout.parse_bytes("bands", z.read("bands/.zarray"))
        chunks = {name: z.read(name) for name, _ in found.members()}
    out = np.zeros((2, 5, 7), np.uint16)
    made = found.assemble(chunks, out)
    assert np.may_share_memory(made, out) and (out == array[0]).all() and (made == array).all()
    for other in (np.zeros((2, 5, 7), np.int16), np.zeros((2, 5, 8), np.uint16), np.zeros((4, 5, 7), np.uint16)[::2]):
        made = found.assemble(chunks, other)
        assert (made == array).all() and not other.any()
