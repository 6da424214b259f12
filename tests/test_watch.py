"""`watch`: what a work directory tells, while it grows, when it is half written, and before there is anything."""

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import tiny_run
from etils import epath
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from terramind_jax import checkpoint, cli, watch
from terramind_jax import config as configuration
from terramind_jax.train import logging, pretrain


def line(step: int, **metrics) -> str:
    return json.dumps({"step": step, **{name.replace("__", "/"): value for name, value in metrics.items()}}) + "\n"


def write(workdir: Path, text: str, name: str = logging.METRICS) -> Path:
    workdir.mkdir(exist_ok=True)
    (workdir / name).write_text(text)
    return workdir


def show(workdir: Path, now: float | None = None) -> str:
    snapshot = watch.read(workdir, now)
    return watch.table(snapshot, snapshot.earlier)


def row(text: str, name: str) -> list[str]:
    """Cells of the row that begins with `name`."""
    [found] = [one for one in text.splitlines() if one.startswith(f"{name:<12s}")]
    return re.split(r"\s{2,}", found[12:].strip())


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of 1,000 steps at step 30, validated at step 20."""
    config = tiny_run.pretraining(tmp_path, steps=1000)
    configuration.bind_workdir(config, tmp_path / "run")
    rates = {"step_seconds": 0.5, "tokens_per_second": 2048.0, "data_wait": 0.25, "checkpoint_block": 0.05, "mfu": 0.4, "goodput": 0.9}
    norms = {"grad_norm": 0.5, "grad_norm__embeddings": 0.25, "grad_norm__encoder": None}
    state = {"learning_rate": 2e-4, "rewinds": 1, "memory_bytes": 3 << 30, **norms}
    lines = [
        line(10, loss=9.0, loss__DEM=3.0, loss__LULC=None, bad=1, overflow=0, skipped=0, **rates),
        line(20, loss=8.0, loss__DEM=2.5, loss__LULC=1.0, bad=1, overflow=0, skipped=0, **rates),
        line(20, val__loss=8.5, val__loss__DEM=2.75),
        line(20, val__generated__LULC=0.5, val__generated__DEM=0.25, val__knn=0.75, val__knn_majority=0.4),
        line(30, loss=7.5, loss__DEM=2.75, loss__LULC=1.5, bad=1234, overflow=5, skipped=2, samples=240, **rates, **state),
    ]
    for host, bad in (("00000", [("a", "corrupt"), ("b", "corrupt")]), ("00001", [("b", "corrupt"), ("c", "constant")])):
        found = "".join(json.dumps({"key": key, "modality": "S1GRD", "reason": reason}) + "\n" for key, reason in bad)
        (tmp_path / "run" / "bad_samples").mkdir(exist_ok=True)
        (tmp_path / "run" / "bad_samples" / f"{host}.jsonl").write_text(found)
    return write(tmp_path / "run", "".join(lines))


def test_the_table_tells_everything(run):
    text = show(run)
    assert row(text, "step") == ["30 of 1,000", "3 %"]
    assert row(text, "time left") == ["8 min"]  # 970 steps of half a second
    assert row(text, "speed") == ["2.05k tokens/s", "MFU 40 %", "goodput 90 %"]
    assert row(text, "step time") == ["0.5 s", "compute 70 %", "data wait 25 %", "checkpoint 5 %"]
    assert row(text, "skipped") == ["1,234 samples", "5 patches", "2 steps", "back to a checkpoint: 1"]
    assert row(text, "bad samples") == ["2 corrupt", "1 constant"]
    assert row(text, "gradient") == ["norm 0.5", "embeddings 0.25", "encoder -", "learning rate 0.0002"]
    assert row(text, "memory") == ["3.00 GiB a device"]
    assert row(text, "held out") == ["generated right: DEM 25 %, LULC 50 %", "k-NN 75 %, the most common class 40 %"]
    assert row(text, "checkpoint") == ["none yet"]
    assert row(text, "all") == ["7.5000", "-0.5000", "8.5000"]
    assert row(text, "DEM") == ["2.7500", "+0.2500", "2.7500"]
    assert row(text, "LULC") == ["1.5000", "+0.5000", "-"]


def test_what_a_run_does_not_tell_is_left_open(tmp_path):
    text = show(write(tmp_path / "run", line(1, loss=None, loss__DEM=2.0)))
    assert row(text, "step") == ["1"]
    assert row(text, "time left") == ["-"]
    assert row(text, "speed") == ["MFU -", "goodput -"]
    assert row(text, "gradient") == ["norm -", "learning rate -"]
    assert row(text, "memory") == row(text, "held out") == ["-"]
    assert row(text, "all") == ["-", "-", "-"]
    assert row(text, "DEM") == ["2.0000", "-", "-"]


@pytest.mark.parametrize("end", ['{"step": 40, "lo', '{"step": 40', "[", "40\n", "\x00"])
def test_a_half_written_line_is_left_for_later(run, end):
    before = show(run).splitlines()[1:]  # the first line tells how old the log is
    with (run / logging.METRICS).open("a") as f:
        f.write(end)
    assert show(run).splitlines()[1:] == before


def test_only_the_end_of_a_long_log_is_read(run, monkeypatch):
    monkeypatch.setattr(watch, "TAIL", 400)  # begins within a line
    snapshot = watch.read(run)
    assert snapshot.step == 30
    assert snapshot.metrics["loss"] == 7.5
    assert "val/loss" in snapshot.metrics or snapshot.earlier == {}


def test_objects_of_a_bucket_are_one_log(run):
    whole = show(run)
    lines = (run / logging.METRICS).read_text().splitlines(keepends=True)
    (run / logging.METRICS).unlink()
    write(run, "".join(lines[:1]) + line(20, loss=99.0) + line(15, loss=98.0), "metrics-000001.jsonl")
    write(run, "".join(lines[1:]), "metrics-000020.jsonl")  # continued from a checkpoint before step 20
    assert show(run).splitlines()[1:] == whole.splitlines()[1:]


class Bucket(MemoryFileSystem):
    """A bucket as gcsfs shows it: folders are prefixes of names, objects have an `mtime`, listings are kept unless told otherwise."""

    protocol = ("gcs", "gs")
    store: dict = {}
    pseudo_dirs = [""]
    find = AbstractFileSystem.find  # by listings

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("gs://").removeprefix("gcs://"))

    def info(self, path: str, **kwargs) -> dict:
        found = super().info(path, **kwargs)
        return {**found, "mtime": found["created"]} if found["type"] == "file" else found

    def ls(self, path: str, detail: bool = True, **kwargs) -> list:
        if path not in self.dircache:
            self.dircache[path] = super().ls(path, detail=True, **kwargs)
        found = self.dircache.get(path) or super().ls(path, detail=True, **kwargs)
        return found if detail else [one["name"] for one in found]


def test_a_bucket(run, monkeypatch):
    monkeypatch.setattr(type(epath.backend.fsspec_backend), "_get_filesystem", lambda self, name: Bucket())
    monkeypatch.setattr(Bucket, "store", {})
    remote = epath.Path("gs://bucket/run")
    assert watch.read("gs://bucket/run") is None
    (remote / "config.json").write_text((run / "config.json").read_text())
    (remote / "metrics-000001.jsonl").write_text((run / logging.METRICS).read_text())
    (remote / "checkpoints" / "20" / "_CHECKPOINT_METADATA").write_text('{"commit_timestamp_nsecs": 1000000000}')
    (remote / "checkpoints" / "30" / "_CHECKPOINT_METADATA").write_text('{"commit_timestamp_nsecs": null}')
    text = show("gs://bucket/run")
    assert row(text, "step") == ["30 of 1,000", "3 %"]
    assert row(text, "checkpoint")[0] == "step 20"
    assert re.search(r"   \d s ago$", text.splitlines()[0])
    (remote / "metrics-000030.jsonl").write_text(line(40, loss=7.0))
    assert watch.read("gs://bucket/run").step == 40


def test_a_log_that_is_long_ago_is_called_so(run):
    written = int((run / logging.METRICS).stat().st_mtime)  # epath tells whole seconds
    assert "30 s ago" in show(run, written + 30)
    assert "nothing new for 30 min" in show(run, written + 1800)


def test_the_newest_complete_checkpoint(run):
    with jax.default_device(jax.devices()[0]):
        checkpoints = checkpoint.Checkpoints(run, keep=3)
        for step in (10, 20):
            checkpoints.save(step, {"params": {"w": jax.numpy.zeros(2)}}, {"samples": step})
        checkpoints.close()
    (run / "checkpoints" / "30").mkdir()  # being written, as a bucket shows it
    (run / "checkpoints" / "40.orbax-checkpoint-tmp").mkdir()
    step, ago = watch.read(run).checkpoint
    assert step == 20
    assert 0 <= ago < 600
    assert row(show(run, time.time() + 7200), "checkpoint") == ["step 20", "2 h 0 min ago"]


@pytest.mark.parametrize("steps", [0, 7])
def test_the_length_is_that_of_the_run(tmp_path, steps):
    config = tiny_run.pretraining(tmp_path, steps=steps)
    config.train.total_tokens = 12345.0
    configuration.bind_workdir(config, tmp_path / "run")
    assert watch.read(write(tmp_path / "run", line(1, loss=1.0))).steps == pretrain.length(config)
    config = tiny_run.tokenizer_training(tmp_path, steps=steps)
    config.train.total_samples = 123.0
    configuration.bind_workdir(config, tmp_path / "tokenizer")
    assert watch.read(write(tmp_path / "tokenizer", line(1, loss=1.0))).steps == (steps or math.ceil(123 / config.train.batch_size))


def test_a_run_whose_batch_has_changed_ends_later(run):
    """Of 8,000 samples 240 are consumed; with batches of 16 instead of 8 half the steps remain."""
    config = configuration.of_workdir(run)
    config.train.update(steps=0, batch_size=16, total_tokens=8000.0 * 11)
    (run / "config.json").write_text(configuration.to_json(config))
    assert watch.read(run).steps == 30 + (8000 - 240) // 16


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0 s"), (59.4, "59 s"), (60, "1 min"), (3599, "59 min"), (3600, "1 h 0 min"), (93784, "1 d 2 h")]
)
def test_duration(seconds, text):
    assert watch.duration(seconds) == text


def test_a_real_run_is_followed_to_its_end(tmp_path, capsys):
    """The table names every metric that the loop writes under the names that it writes."""
    root = tiny_run.write_shards(tmp_path / "shards")
    config = tiny_run.pretraining(root)
    config.run.update(eval_every=16)
    pretrain.train(config, tmp_path / "run")
    capsys.readouterr()
    assert cli.main(["watch", str(tmp_path / "run")]) == 0  # ends by itself, as the run has ended
    text = capsys.readouterr().out
    assert re.search(r"   ended \d+ s ago$", text.splitlines()[0])
    assert row(text, "step") == ["32 of 32", "100 %"]
    assert row(text, "time left") == ["0 s"]
    assert [cell.split()[0] for cell in row(text, "gradient")] == ["norm", "decoder", "embeddings", "encoder", "learning"]
    assert row(text, "speed")[0].endswith("tokens/s")
    assert row(text, "speed")[1] != "MFU -"
    assert re.fullmatch(r"compute [\d.]+ %", row(text, "step time")[1])
    assert row(text, "checkpoint")[0] == "step 32"
    assert "-" not in (row(text, "all")[0], row(text, "all")[2])


def test_growth_is_followed_and_changes_are_since_the_last_look(run, monkeypatch, capsys):
    """Three looks: the second finds nothing new, the third a new line."""
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            with (run / logging.METRICS).open("a") as f:
                f.write(line(50, loss=7.0, loss__DEM=2.0))
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert watch.watch(run, every=3) == 0
    tables = capsys.readouterr().out.split(f"{run}   ")[1:]
    assert [row(text, "DEM")[:2] for text in tables] == [["2.7500", "+0.2500"], ["2.7500", "+0.2500"], ["2.0000", "-0.7500"]]
    assert looks == [3, 3, 3]


def test_no_device_is_touched(run):
    """On a worker of a TPU the run itself holds them."""
    code = f"from jax._src import xla_bridge as x; from terramind_jax import watch; watch.watch({str(run)!r}, once=True); "
    subprocess.run([sys.executable, "-c", f"{code}assert not x.backends_are_initialized()"], check=True)


def test_before_there_is_a_log(tmp_path, capsys):
    for workdir in (tmp_path / "none", write(tmp_path / "empty", ""), write(tmp_path / "half", '{"step": 1, ')):
        assert cli.main(["watch", str(workdir), "--once"]) == 1
        assert capsys.readouterr().out.strip() == f"waiting for {workdir}/{logging.METRICS}"


def test_a_run_that_starts_later_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: write(tmp_path / "run", line(1, loss=1.0)) if len(calls) else calls.append(1))
    calls: list[int] = []
    monkeypatch.setattr(watch, "_steps", lambda *_: 1)
    assert watch.watch(tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert out.count("waiting for") == 2
    assert row(out, "all")[0] == "1.0000"
