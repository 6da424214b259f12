"""The hub, imitated: what is downloaded is verified, converted once and read offline afterwards."""

import hashlib
import shutil
import types
import warnings

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors

from terramind_jax import hub, sources, zoo
from terramind_jax.convert import files

ENTRY = zoo.Entry("m", "backbone", "v1", "someone/model", "weights.safetensors", size="tiny")
COMMIT = "c" * 40


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub with one file, that counts downloads and whose answers can be changed."""
    source = tmp_path / "server" / "weights.safetensors"
    source.parent.mkdir()
    files.write(source, {"a": np.arange(4, dtype=np.float32)})
    state = types.SimpleNamespace(source=source, downloads=0, urls=[], sha256=hashlib.sha256(source.read_bytes()).hexdigest(), error=None)

    def metadata(url, **_):
        if state.error:
            raise state.error
        state.urls.append(url)
        return types.SimpleNamespace(commit_hash=COMMIT, etag=state.sha256, size=source.stat().st_size)

    def download(repository, file, revision):
        state.downloads += 1
        path = tmp_path / "hf" / f"{state.downloads}-{file}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(source.read_bytes())
        return str(path)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setenv("TERRAMIND_JAX_CACHE", str(tmp_path / "cache"))
    state.cache = tmp_path / "cache"
    return state


def test_downloaded_once_pinned_and_offline_afterwards(server):
    first = hub.weights(ENTRY)
    server.error = OSError("no network")
    second = hub.weights(ENTRY)
    np.testing.assert_array_equal(first["a"], second["a"])
    assert server.downloads == 1
    folder = server.cache / "someone--model"
    assert (folder / "revision").read_text() == COMMIT and COMMIT in (folder / COMMIT / "weights.json").read_text()
    with pytest.raises(ConnectionError, match="no network"):
        hub.weights(ENTRY, refresh=True)


def test_what_arrives_damaged_is_deleted(server, tmp_path):
    server.sha256 = "0" * 64
    with pytest.raises(ValueError, match="arrived damaged .* it was deleted, try again"):
        hub.weights(ENTRY)
    assert not list((tmp_path / "hf").iterdir()) and not server.cache.exists()


def test_another_revision_is_read_and_pins_nothing(server):
    sources.open_source("hub", ENTRY, revision="d" * 40)
    assert f"/resolve/{'d' * 40}/" in server.urls[0] and not (server.cache / "someone--model" / "revision").exists()
    with pytest.raises(ValueError, match="revision 'main' is one of the hub, but the weights come from 'random'"):
        sources.open_source("random", ENTRY, revision="main")


def test_an_interrupted_download_leaves_nothing_to_read(server, monkeypatch):
    def interrupted(*args, **kwargs):
        raise ConnectionResetError("connection lost")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "hf_hub_download", interrupted)
        with pytest.raises(
            ConnectionError,
            match=r"not be downloaded \(connection lost\); without a network, download https://.*/someone/model/resolve/main/"
            "weights.safetensors elsewhere and name the file, with --weights, a tokenizer's folder with --tokenizers; pretrain: .*; "
            r"finetune: --config.model.weights, --config.model.tokenizers\.",
        ):
            hub.weights(ENTRY)
    assert not server.cache.exists()
    assert hub.weights(ENTRY)["a"].shape == (4,)


def test_a_gated_repository(server):
    response = types.SimpleNamespace(headers={}, request=types.SimpleNamespace(url="", method="GET"), status_code=403)
    server.error = errors.GatedRepoError("gated", response=response)
    with pytest.raises(PermissionError, match="someone/model/weights.safetensors is gated; ask for access"):
        hub.weights(ENTRY)


def test_a_cache_that_cannot_be_written(server, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "write", refuse)
    with pytest.warns(UserWarning, match="cannot be written .Permission denied.; the weights are converted again next time"):
        assert hub.weights(ENTRY)["a"].shape == (4,)


def test_the_published_hash_is_checked_too(server, monkeypatch):
    monkeypatch.setitem(zoo.SHA256, ENTRY.file, "1" * 64)
    with pytest.raises(ValueError, match="arrived damaged"):
        hub.weights(ENTRY)


def test_no_warning_when_all_is_well(server):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hub.weights(ENTRY)


def test_a_vocabulary_is_read_offline_once_it_was_fetched(server, monkeypatch):
    monkeypatch.setitem(zoo.VOCABULARIES, "caption", ("someone/text", "config.json"))
    server.source.write_text('{"model": {}}')
    server.sha256 = None  # the hub states none of a small file
    assert hub.vocabulary("caption", fetch=False) is None and server.downloads == 0
    first = hub.vocabulary("caption")
    server.error = OSError("no network")
    assert hub.vocabulary("caption") == hub.vocabulary("caption", fetch=False) == first
    assert first.read_text() == '{"model": {}}' and first.is_relative_to(server.cache / "someone--text" / COMMIT)
    shutil.rmtree(server.cache)
    with pytest.raises(ConnectionError, match="someone/text/config.json could not be downloaded .no network."):
        hub.vocabulary("caption")


def test_whether_weights_are_cached(server):
    assert not hub.has_weights(ENTRY)
    hub.weights(ENTRY)
    assert hub.has_weights(ENTRY)
