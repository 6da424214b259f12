"""The reader on S3, Google Cloud Storage and the Hugging Face Hub: their own clients, at servers on this machine that speak as they do."""

import json
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import object_store
import pyarrow
import pytest
import store_servers
import tiny_run
from pyarrow import parquet

from terramind_jax import cli, files
from terramind_jax.data import pipeline, storage
from terramind_jax.data.errors import DataError
from terramind_jax.data.index import open_index
from terramind_jax.data.shards import ShardWriter, write_sample
from terramind_jax.train import pretrain

# By scheme: the server, what names the folder that it serves and the shards in it, how to sign in, and where the client looks for it.
STORES = {
    "s3": (store_servers.S3, "s3://bucket", "/shards", "aws configure, or set FSSPEC_S3_ANON=true for a public bucket", "AWS_ENDPOINT_URL"),
    "gs": (store_servers.Gcs, "gs://bucket", "", "gcloud auth application-default login", "STORAGE_EMULATOR_HOST"),
    "hf": (store_servers.Hub, "hf://datasets/org/name", "", "hf auth login", "HF_ENDPOINT"),
}
SETTINGS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/nowhere",
    "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
    "FSSPEC_GS_TOKEN": "anon",
    "NO_PROXY": "127.0.0.1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


@pytest.fixture
def local(tmp_path, monkeypatch):
    monkeypatch.setenv("TERRAMIND_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.01)
    root = tiny_run.write_shards(tmp_path / "served" / "shards")
    for name in ("DEM", "LULC"):
        made = {"codebook_size": tiny_run.CODEBOOKS[name], "image_size": tiny_run.SIZE}
        files.write_text(files.folder(root / "train" / f"{name}_tokens" / "tokenizer.json"), json.dumps(made))
    parquet.write_table(pyarrow.table({"key": [f"s{i:03d}" for i in range(5)]}), root / "val_metadata.parquet")
    return root


def settle(monkeypatch, scheme: str, address: str) -> None:
    """Has this process and those that it starts look for a store at `address`, whatever the user's own settings are."""
    for name, value in {**SETTINGS, STORES[scheme][-1]: address}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})  # what clients and fsspec read when they are imported
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": address})
    fsspec.get_filesystem_class(scheme).clear_instance_cache()


@pytest.fixture(params=STORES)
def store(request, local, monkeypatch):
    """The URL of the shards in a store, and its faults."""
    server, top, below, *_ = STORES[request.param]
    with object_store.serve(local.parent if below else local, server) as (address, faults):
        settle(monkeypatch, request.param, address)
        yield top + below, faults


def test_shards_are_indexed_and_checked_as_on_the_disk(store, local, tmp_path, capsys, caplog):
    url, faults = store
    assert cli.main(["data", "check", url]) == 2
    assert f"There is no index of {url}/train; make it once with: terramind-jax data index {url}" in capsys.readouterr().err
    assert cli.main(["data", "index", url]) == 0
    assert f"train: 12 locations, indexed in {tmp_path / 'cache'}" in capsys.readouterr().out
    said = [(cli.main(["data", "check", root, f"--workers={n}"]), *capsys.readouterr()) for root, n in ((url, 2), (str(local), 1))]
    assert (
        said[0][0] == 1 and "sample 's003' is no zip file" in said[0][1] and "All 5 samples that val_metadata.parquet lists" in said[0][1]
    )
    train = said[0][1].partition("\n\nval")[0]
    assert "tokens of" not in train, "what is said of the tokenizer is read"
    assert (said[0][0], *(text.replace(url, str(local)) for text in said[0][1:])) == said[1]
    assert not caplog.text, "clients complain of nothing"


def test_samples_and_batches_are_those_of_the_disk(store, local):
    url, faults = store
    assert cli.main(["data", "index", url]) == 0
    index, expected, sent = open_index(url, "train"), open_index(local, "train"), faults.sent
    jobs = [(i, m) for i in range(12) for m in index.modalities if (i, m) != (3, "DEM")]
    faults.latency = 0.1
    for opened in (index, pickle.loads(pickle.dumps(index))):
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda job, of=opened: (of.read(*job), of.tokens(*job)), jobs))
        for job, (pixels, tokens) in zip(jobs, found, strict=True):
            np.testing.assert_array_equal(pixels, expected.read(*job))
            np.testing.assert_array_equal(tokens, expected.tokens(*job))
    assert faults.most_at_once >= 8 and faults.sent - sent < 2 * 1.2 * index.stored_bytes(), "in threads, and nothing is read ahead"
    faults.latency, config = 0.0, tiny_run.pretraining(local)
    settings = dict(batch_size=8, train=False)
    batches = [pipeline.batches(i, *pretrain.data_settings(config), **settings, workers=n) for i, n in ((index, 1), (expected, 0))]
    for a, b in zip(*map(list, batches), strict=True):
        np.testing.assert_array_equal(a["bad"], b["bad"])
        np.testing.assert_array_equal(a["target_id"], b["target_id"])
        np.testing.assert_array_equal(a["patches"]["untok_dem@224"], b["patches"]["untok_dem@224"])


def test_the_index_is_put_where_it_can_be_and_taken_from_there(store, local, tmp_path, monkeypatch):
    url, faults = store
    faults.writable = True
    assert cli.main(["data", "index", url]) == 0
    put = local / "train" / "samples.index"
    if url.startswith("hf"):
        assert not put.exists(), "on the Hub it would be a commit"
        return
    assert put.read_bytes() in [path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    monkeypatch.setenv("TERRAMIND_JAX_CACHE", str(tmp_path / "another"))
    np.testing.assert_array_equal(open_index(url, "train").read(5, "LULC"), open_index(local, "train").read(5, "LULC"))


def test_who_may_not_read_is_told_so_at_once(store, capsys):
    url, faults = store
    assert cli.main(["data", "index", url]) == 0
    index, faults.forbidden, before = open_index(url, "train"), True, next(faults.requests)
    for command in ("index", "check"):
        assert cli.main(["data", command, url]) == 2
        said = capsys.readouterr().err.strip()
        reason = r"may not be read with the credentials at hand \(.*([Ff]orbidden|gated).*\); sign in with: "
        assert re.fullmatch(f"error: {url}/train/S2L2A {reason}{STORES[url[:2]][3]}", said)
    with pytest.raises(DataError, match="sample 's000' cannot be read .*may not be read with the credentials at hand"):
        index.read(0, "LULC")
    assert next(faults.requests) - before < 16


@pytest.mark.parametrize("store", ["s3", "gs"], indirect=True)
def test_who_may_read_but_not_list_reads(store, local):
    """What is not there may not be read, either."""
    url, faults = store
    assert cli.main(["data", "index", url]) == 0
    faults.unlisted = True
    np.testing.assert_array_equal(open_index(url, "train").read(5, "LULC"), open_index(local, "train").read(5, "LULC"))


def test_a_place_without_shards(store, capsys):
    url, _ = store
    for command in ("index", "check"):
        assert cli.main(["data", command, f"{url}/nothing"]) == 2
        assert f"error: No splits in {url}/nothing; expected folders like train/S2L2A" in capsys.readouterr().err


def test_what_others_write_is_seen(store, local):
    """Clients keep what they once listed."""
    url, _ = store
    seen = storage.store(url)
    assert [o.name for o in seen.list(f"{url}/val/DEM")] == ["tiny_shard_000001.tar"] and seen.find(f"{url}/val/samples.index") is None
    with ShardWriter(local, "val", "DEM", "tiny", 2) as shard:
        shard.add("s100", write_sample({"bands": np.ones((1, 1, tiny_run.TILE, tiny_run.TILE), np.int16)}))
    (local / "val" / "samples.index").write_bytes(b"new")
    listed, found = storage.store(url).list(f"{url}/val/DEM"), storage.store(url).find(f"{url}/val/samples.index")
    assert [(o.name, o.size) for o in listed] == [(p.name, p.stat().st_size) for p in sorted((local / "val" / "DEM").iterdir())]
    assert found.size == 3 and len({o.version for o in listed}) == 2
    (local / "val" / "samples.index").write_bytes(b"old")
    assert storage.store(url).find(f"{url}/val/samples.index").version != found.version


def test_a_shard_that_is_cut_short_is_not_asked_for_again_and_again(store, local):
    url, faults = store
    assert cli.main(["data", "index", url]) == 0
    index, before = open_index(url, "train"), next(faults.requests)
    os.truncate(local / "train" / "LULC" / "tiny_shard_000001.tar", 1024)
    with pytest.raises(DataError, match="sample 's009' ends early: 0 of [0-9]* bytes; index it again"):
        index.read(9, "LULC")
    assert next(faults.requests) - before <= 4


def test_s3_without_credentials_is_told_of(local, monkeypatch, capsys):
    settle(monkeypatch, "s3", "http://127.0.0.1:9")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert cli.main(["data", "index", "s3://bucket/shards"]) == 2
    assert "may not be read with the credentials at hand (NoCredentialsError: Unable to locate credentials" in capsys.readouterr().err


@pytest.mark.parametrize("status", [401, 404])
def test_a_private_data_set_of_the_hub_is_not_taken_for_an_empty_one(local, monkeypatch, capsys, status):
    """Without a token it says the same of one that is not there."""

    class Hub(store_servers.Hub):
        def answer(self) -> None:
            self.send(status, headers={"X-Error-Code": "RepoNotFound"})

    with object_store.serve(local, Hub) as (address, _):
        settle(monkeypatch, "hf", address)
        assert cli.main(["data", "index", "hf://datasets/org/name"]) == 2
        assert {401: "may not be read with the credentials at hand", 404: "No splits in"}[status] in capsys.readouterr().err
        assert cli.main(["data", "index", "hf://datasets"]) == 2
        assert "hf://datasets/modalities.json cannot be read: " in capsys.readouterr().err


def test_what_may_pass_is_tried_again_and_what_will_not_is_said(monkeypatch):
    from gcsfs.retry import HttpError

    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.001)

    def tries(*errors: Exception) -> int:
        left = [*errors]

        def call() -> int:
            if left:
                raise left.pop(0)
            return len(errors)

        return storage.with_retries(call, "gs://bucket/key")

    assert tries(HttpError({"code": 503}), OSError("Connection reset"), fsspec.FSTimeoutError()) == 3
    with pytest.raises(PermissionError, match="Anonymous caller"):
        tries(HttpError({"code": 401, "message": "Anonymous caller does not have access."}))
    with pytest.raises(ConnectionError, match="^gs://bucket/key cannot be read: ValueError: Bad Request: no bucket.$"):
        tries(ValueError("Bad Request:\n no bucket"))


@pytest.mark.parametrize(("url", "extra"), [("gs://bucket", "gcs"), ("s3://bucket", "s3")])
def test_a_client_that_is_not_installed_is_named(monkeypatch, url, extra):
    def missing(*arguments):
        raise ImportError("Please install it.")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ImportError, match=rf"{url} cannot be read: Please install it; pip install 'terramind-jax\[{extra}\]'.$"):
        storage.store(url)
