"""Where metrics go: lines that are never written twice, in pieces where nothing is appended, TensorBoard, Weights & Biases."""

import json
import struct
import sys
import time
import types

import numpy as np
import pytest
import tiny_run
from tensorboardX import event_file_writer

from terramind_jax import files
from terramind_jax.train import logging


def write(workdir, first: int, last: int, **settings) -> None:
    """Lines of the steps from `first` to `last`, after a checkpoint of the one before."""
    writer = logging.Writer(workdir, step=first - 1, total=100, progress=False, **{"tensorboard": False, **settings})
    for step in range(first, last + 1):
        writer.write(step, {"loss": np.float32(step), "bad": np.int32(step)})
    writer.close()


def steps(workdir) -> list[int]:
    return [line["step"] for line in logging.read(workdir)]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "is_remote", lambda path: True)
    monkeypatch.setattr(files, "folder", lambda path: tiny_run.ObjectStore(path))
    return tmp_path / "bucket"


def test_a_value_that_is_not_finite_is_null_and_integers_stay(tmp_path):
    writer = logging.Writer(tmp_path, step=0, total=1, tensorboard=False, progress=False)
    writer.write(1, {"a": np.float32(np.nan), "b": np.inf, "c": np.int32(3), "d": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "a": None, "b": None, "c": 3, "d": 0.5}


def test_a_continued_log_goes_on_after_the_checkpoint(tmp_path):
    write(tmp_path, 1, 9)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 10, "lo')  # killed while writing
    write(tmp_path, 6, 12)
    assert steps(tmp_path) == list(range(1, 13))


def test_in_a_bucket_full_pieces_are_left_alone_and_the_last_is_written_anew(bucket, monkeypatch):
    monkeypatch.setattr(logging, "PIECE", 300)
    monkeypatch.setattr(logging, "FLUSH_SECONDS", 0.0)
    written = []
    monkeypatch.setattr(files, "write_text", lambda path, text: (written.append((path.name, len(text))), path.write_text(text)))
    bucket.mkdir()
    write(bucket, 1, 30)
    assert steps(bucket) == list(range(1, 31))
    names = sorted(path.name for path in bucket.iterdir())
    assert len(names) == 4 and names[0] == "metrics-000000001.jsonl"
    assert max(size for _, size in written) < 400  # never the whole log
    write(bucket, 17, 20)  # from the checkpoint of step 16
    assert steps(bucket) == list(range(1, 21))


def test_in_a_bucket_lines_wait_for_a_checkpoint_or_half_a_minute(bucket):
    bucket.mkdir()
    writer = logging.Writer(bucket, step=0, total=9, tensorboard=False, progress=False)
    writer.write(1, {"loss": 1.0})
    assert steps(bucket) == []
    writer.flush()
    assert steps(bucket) == [1]
    writer.write(2, {"loss": 1.0})
    writer.close()
    assert steps(bucket) == [1, 2]


# ---- TensorBoard ----


def events(folder) -> list[tuple[int, str, float]]:
    """The scalars of event files: TFRecords of Event messages."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_gets_finite_scalars(tmp_path):
    writer = logging.Writer(tmp_path, step=0, total=1, progress=False)
    writer.write(1, {"loss": 2.5, "loss/DEM": np.nan})
    writer.write(2, {"loss": 1.5})
    writer.close()
    assert events(tmp_path / "tensorboard") == [(1, "loss", 2.5), (2, "loss", 1.5)]


def test_in_a_bucket_event_files_are_copied_whole(bucket, monkeypatch):
    """Also what the thread of the writer has not put down when the run ends."""
    put_down = event_file_writer.EventsWriter.write_event
    monkeypatch.setattr(event_file_writer.EventsWriter, "write_event", lambda *a: (time.sleep(0.02), put_down(*a)))
    monkeypatch.setattr(logging, "FLUSH_SECONDS", 0.0)
    write(bucket, 1, 5, tensorboard=True)
    assert [step for step, tag, _ in events(bucket / "tensorboard") if tag == "loss"] == [1, 2, 3, 4, 5]


# ---- Weights & Biases ----


class Run:
    def __init__(self, **settings):
        self.settings, self.lines, self.finished = settings, [], False

    def log(self, scalars, step):
        self.lines.append((step, scalars))

    def finish(self):
        self.finished = True


def test_weights_and_biases_goes_on_where_it_was(tmp_path, monkeypatch):
    runs = []
    module = types.SimpleNamespace(init=lambda **settings: runs.append(Run(**settings)) or runs[-1])
    monkeypatch.setitem(sys.modules, "wandb", module)
    for workdir, first in ((tmp_path, 1), (tmp_path, 3), (tmp_path / "other", 1)):
        workdir.mkdir(exist_ok=True)
        write(workdir, first, first + 1, wandb={"train": {"seed": 0}})
    assert runs[0].lines == [(1, {"loss": 1.0, "bad": 1}), (2, {"loss": 2.0, "bad": 2})] and runs[0].finished
    assert runs[0].settings["config"] == {"train": {"seed": 0}} and runs[0].settings["resume"] == "allow"
    assert runs[0].settings["id"] == runs[1].settings["id"] != runs[2].settings["id"]


def test_weights_and_biases_that_is_not_installed_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"^run\.wandb needs Weights & Biases; pip install wandb, or set it to False\.$"):
        logging.Writer(tmp_path, step=0, total=1, tensorboard=False, progress=False, wandb={})


# ---- all of them ----


def test_a_sink_that_fails_does_not_end_the_run(tmp_path, monkeypatch):
    def failing(self, scalars, step):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Run))
    monkeypatch.setattr(Run, "log", failing)
    with pytest.warns(UserWarning, match="WandB of the metrics failed: no route"):
        write(tmp_path, 1, 2, wandb={})
    assert steps(tmp_path) == [1, 2]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(logging.jax, "process_index", lambda: 1)
    write(tmp_path, 1, 3, tensorboard=True)
    assert not list(tmp_path.iterdir())


def test_counts():
    assert [logging.count(n) for n in (7, 15300, 2.5e6, 1e12)] == ["7", "15.3k", "2.5M", "1T"]
