"""The reader on a local object store: the same samples as from the disk, whatever latency, errors and stalls do."""

import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import object_store
import pytest

from terramind_jax import cli, modalities
from terramind_jax.data import masks, metadata, pipeline, scan, storage
from terramind_jax.data.errors import DataError
from terramind_jax.data.index import open_index
from terramind_jax.data.shards import ShardWriter, write_sample

pytest.importorskip("aiohttp")
N = 24


@pytest.fixture
def local(tmp_path, monkeypatch):
    monkeypatch.setenv("TERRAMIND_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.01)
    root, rng = tmp_path / "served", np.random.default_rng(0)
    for modality, bands in (("S2L2A", 12), ("LULC", 1)):
        for number in range(3):
            with ShardWriter(root, "train", modality, "x", number) as shard:
                for i in range(number, N, 3):
                    pixels = rng.integers(0, 10, (1, bands, 32, 32)).astype(np.uint8)
                    shard.add(f"k{i:02d}", write_sample({"bands": pixels, "center_lon": np.float64(i), "center_lat": np.float64(-i)}))
    return root


@pytest.fixture
def served(local):
    with object_store.serve(local) as (address, faults):
        yield address, faults


def same_as_local(index, local, threads=8):
    expected = open_index(local, "train")
    assert index.keys == expected.keys and index.modalities == expected.modalities
    jobs = [(i, m) for i in range(N) for m in index.modalities]
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda job: index.read(*job), jobs))
    for job, pixels in zip(jobs, found, strict=True):
        np.testing.assert_array_equal(pixels, expected.read(*job))
    assert [index.coordinates(i) for i in range(N)] == [(float(i), float(-i)) for i in range(N)]


def test_a_remote_store_is_indexed_once_and_read_by_ranges(served, local, capsys):
    address, faults = served
    with pytest.raises(FileNotFoundError, match=f"There is no index of {address}/train; make it once with: terramind-jax data index"):
        open_index(address, "train")
    assert cli.main(["data", "index", address]) == 0
    assert f"train: {N} locations" in capsys.readouterr().out
    before = next(faults.requests)
    index = open_index(address, "train")
    assert next(faults.requests) - before <= 4, "opening lists no shards"
    same_as_local(index, local)
    same_as_local(pickle.loads(pickle.dumps(index)), local)
    index.read_nearby(64)
    before = next(faults.requests)
    same_as_local(index, local, threads=1)
    assert next(faults.requests) - before <= 8, "neighbours share a request"


@pytest.mark.parametrize(("window", "kept", "grouped"), [(8, 1 << 20, True), (24, 1 << 20, True), (24, 1 << 16, False)])
def test_a_shuffle_window_reads_neighbours_together(served, local, monkeypatch, window, kept, grouped):
    """Of a store and with threads, in few requests and hardly more bytes; what does not fit into memory is read sample by sample."""
    address, faults = served
    scan.open_table(local, "train")
    monkeypatch.setattr(storage, "_REQUEST", 1 << 15)  # samples are smaller than those of TerraMesh
    monkeypatch.setattr(storage, "KEPT", kept)
    index, config = open_index(address, "train", ["S2L2A"]), pipeline.DataConfig(image_size=32, shuffle_window=window)
    streams = [modalities.input_stream("S2L2A")], [modalities.STREAMS["coords"]]
    batches = pipeline.make_dataset(index, *streams, config, masks.MaskConfig(4, 4), batch_size=4)
    sent, requests = faults.sent, next(faults.requests)
    with ThreadPoolExecutor(3) as pool:
        seen = np.concatenate(list(pool.map(lambda k: batches[k]["sample"], range(N // 4))))
    assert sorted(seen) == list(range(N))
    assert faults.sent - sent < 2 * index.stored_bytes()
    assert (next(faults.requests) - requests < N) == grouped


def test_blocks_pay_only_where_a_process_reads_enough_of_them():
    assert storage.block_size(450_000, 256, 1) == 28_800_000
    assert storage.block_size(450_000, 256, 64) == 0  # of 256 samples a process reads four
    assert storage.block_size(4_000, 256, 8) > 0 == storage.block_size(4_000, 256, 64)
    assert storage.block_size(450_000, 4, 1) == 0


def test_a_store_that_is_no_web_server_and_can_be_written_to(local, monkeypatch):
    """Its index lies there, for whoever has it not in a cache of his own."""
    kept = fsspec.filesystem("memory")
    kept.put(str(local), "/terramesh", recursive=True)
    assert cli.main(["data", "index", "memory://terramesh"]) == 0
    same_as_local(open_index("memory://terramesh", "train"), local)
    monkeypatch.setenv("TERRAMIND_JAX_CACHE", str(local.parent / "another"))
    same_as_local(pickle.loads(pickle.dumps(open_index("memory://terramesh", "train"))), local)
    kept.rm("/terramesh/train/LULC", recursive=True)
    with pytest.raises(
        DataError, match="x_shard_000000.tar: sample 'k00' cannot be read .There is no memory://terramesh/train/LULC/x_shard"
    ):
        open_index("memory://terramesh", "train").read(0, "LULC")
    kept.rm("/terramesh", recursive=True)


def test_an_index_beside_the_shards_is_taken(served, local):
    address, _ = served
    scan.open_table(local, "train")
    same_as_local(open_index(address, "train"), local)


def test_errors_and_stalls_lose_nothing(served, local, monkeypatch):
    address, faults = served
    monkeypatch.setattr(storage, "TIMEOUT", 0.5)
    faults.errors, faults.stalls = 0.1, 0.02
    scan.open_table(address, "train", rebuild=True)
    same_as_local(open_index(address, "train"), local)
    assert next(faults.failed) > 3


def test_threads_read_at_the_same_time(served, local):
    address, faults = served
    scan.open_table(address, "train", rebuild=True)
    index, faults.latency = open_index(address, "train"), 0.1
    same_as_local(index, local, threads=16)
    assert faults.most_at_once >= 8


def test_what_a_store_refuses_for_good_is_not_tried_again(served, local):
    address, faults = served
    scan.open_table(address, "train", rebuild=True)
    index, faults.forbidden = open_index(address, "train"), True
    before = next(faults.requests)
    with pytest.raises(DataError, match="may not be read with the credentials at hand"):
        index.read(0, "LULC")
    assert next(faults.requests) - before == 2
    refused = pytest.raises(PermissionError, match="may not be read")
    with refused:
        open_index(address, "train")
    for rebuild in (True, False):  # nor is it taken for a store without an index
        with refused:
            scan.open_table(address, "val", rebuild=rebuild)


def test_a_store_that_may_be_read_but_not_listed(served, local):
    """It says that what is not there may not be read, be it a thing that need not be there."""
    address, faults = served
    scan.open_table(address, "train", rebuild=True)  # which cannot be put there
    faults.unlisted = True
    same_as_local(open_index(address, "train"), local)
    assert scan.declare(address) == {} and metadata.compare(address, "train", np.array(["k00"], "S")) == ([], [])
    assert scan.is_there(address, "train", "LULC") and not scan.is_there(address, "val")
    assert storage.store(address).read_text(f"{address}/train/LULC_tokens/tokenizer.json") is None
    with pytest.raises(PermissionError, match=f"{address}/val/samples.index may not be read"):
        open_index(address, "val")


def test_a_shard_of_the_store_that_changed_after_indexing(served, local):
    """Samples of the same sizes in another order: none is taken for another."""
    address, _ = served
    path, tokens = local / "train" / "LULC" / "x_shard_000000.tar", np.zeros((10, 2, 2), np.uint16)
    for order in (1, -1):
        for suffix, folder in ((".zarr.zip", "LULC"), (".npy", "LULC_tokens")):
            with ShardWriter(local, "train", folder, "x", 0) as shard:
                for i in range(0, N, 3)[::order]:
                    buffer = io.BytesIO()
                    np.save(buffer, tokens + i)
                    pixels = write_sample({"bands": np.full((1, 1, 32, 32), i, np.uint8)})
                    shard.add(f"k{i:02d}", pixels if suffix == ".zarr.zip" else buffer.getvalue(), suffix)
        if order == 1:
            scan.open_table(address, "train", rebuild=True)
            index = open_index(address, "train")
            assert (index.read(3, "LULC") == 3).all() and (index.tokens(3, "LULC") == 3).all()
    assert path.exists()
    for read in (index.read, index.read_all, index.tokens):
        with pytest.raises(DataError, match="sample 'k03' is not where it was when the shard was indexed; index it again"):
            read(3, "LULC")


def test_an_index_of_other_shards_is_refused(served, local):
    """One shard that it describes is enough, of any modality: the samples of the others are then bad ones."""
    address, _ = served
    scan.open_table(address, "train", rebuild=True)
    changed = [(modality, bands, number) for modality, bands in (("S2L2A", 12), ("LULC", 1)) for number in range(3)]
    for modality, bands, number in changed:
        assert len(open_index(address, "train")) == N
        with ShardWriter(local, "train", modality, "x", number) as shard:
            shard.add(f"other{number}", write_sample({"bands": np.ones((1, bands, 32, 32), np.uint8)}))
    sentence = f"The index of {address}/train is that of other shards, or these have changed since: none of the samples that were looked at"
    with pytest.raises(ValueError, match=sentence):
        open_index(address, "train")


def test_a_store_that_is_down_is_a_data_error_in_the_end(served, local, monkeypatch, capsys):
    address, faults = served
    scan.open_table(address, "train", rebuild=True)
    index, faults.errors = open_index(address, "train"), 1.0
    monkeypatch.setattr(storage, "ATTEMPTS", 3)
    with pytest.raises(DataError, match="cannot be read .*3 attempts failed"):
        index.read(0, "LULC")
    capsys.readouterr()
    for command in ("index", "check"):  # not "there is no index"
        assert cli.main(["data", command, address]) == 2
        assert "cannot be read: 3 attempts failed, the last with ClientResponseError: 503" in capsys.readouterr().err


def test_an_interrupted_scan_goes_on(local, monkeypatch):
    scan_shard, scanned = scan.scan_shard, []

    def failing(path, *arguments, **options):
        if path.endswith("LULC/x_shard_000001.tar") and not scanned.count("stopped"):
            scanned.append("stopped")
            raise KeyboardInterrupt
        scanned.append(path)
        return scan_shard(path, *arguments, **options)

    monkeypatch.setattr(scan, "scan_shard", failing)
    monkeypatch.setattr(scan, "_THREADS", {True: 1, False: 1})
    with pytest.raises(KeyboardInterrupt):
        open_index(local, "train")
    first = [p for p in scanned if p != "stopped"]
    scanned[:] = ["stopped"]
    assert len(open_index(local, "train")) == N
    assert len(first) >= 3 and not set(first) & set(scanned) and len(first) + len(scanned) - 1 == 6
