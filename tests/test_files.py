"""Files of a work directory, on a disk and where nothing is renamed."""

import os

import pytest
import tiny_run
from etils import epath

from terramind_jax import config as configuration
from terramind_jax import files


def test_what_is_remote():
    assert files.is_remote("gs://bucket/run") and files.is_remote(epath.Path("gs://bucket/run"))
    assert not files.is_remote("/tmp/run") and not files.is_remote(epath.Path("run"))


def test_a_folder_stays_the_same_when_the_process_moves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = files.folder("run")
    monkeypatch.chdir("/")
    assert folder == epath.Path(tmp_path / "run")
    assert os.fspath(files.folder("gs://bucket/run")) == "gs://bucket/run"


def test_no_reader_sees_a_part(tmp_path, monkeypatch):
    path = files.folder(tmp_path) / "new" / "config.json"
    files.write_text(path, "old")

    def failing(self, content):
        with open(self, "wb") as f:
            f.write(content[:2])
        raise OSError("disk full")

    monkeypatch.setattr(type(path), "write_bytes", failing)
    with pytest.raises(OSError):
        files.write_text(path, "something new")
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["config.json"]


def test_in_an_object_store_nothing_is_renamed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "is_remote", lambda path: True)
    monkeypatch.setattr(files, "folder", lambda path: tiny_run.ObjectStore(path))
    config = configuration.pretraining()
    for _ in range(2):
        configuration.bind_workdir(config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
    assert configuration.of_workdir(tmp_path / "run") == config
