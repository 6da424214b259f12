"""`first_hour.sh` and `first_hour.py`: the plan beside what a machine does, here of a small run."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
from launching import LAUNCH, call, dry, with_python


def test_first_hour_shows_its_commands():
    arguments = ["--config=c.py", "--workdir=w", "--config.data.root=my data", "--topology=v5e:4x4", "--steps=7"]
    commands = dry("first_hour.sh", *arguments)
    measure = ["python", str(LAUNCH / "first_hour.py"), "--out=first_hour"]
    assert commands[0] == [*measure, "devices", "--topology=v5e:4x4", "--num_slices=1"]
    assert commands[1] == [*measure, "storage", "--root=my data", "--seconds=20", "--threads=32"]
    pretrain = ["python", "-m", "terramind_jax", "pretrain", "--config=c.py", "--workdir=w", "--config.data.root=my data"]
    assert commands[2][:8] == [*pretrain, "--config.train.steps=7"]
    plan = ["python", "-m", "terramind_jax", "plan", "--config=c.py", "--topology=v5e:4x4", "--num_slices=1", "--json"]
    assert commands[3] == [*plan, "--config.data.root=my data"]
    assert commands[4] == [*measure, "compare", "--workdir=w"]


def test_first_hour_wants_a_run():
    assert "are needed" in call(LAUNCH / "first_hour.sh", "--config=c.py", "--dry-run", check=2).stderr


def first_hour(tmp_path: Path, *arguments, check: int | None = 0) -> subprocess.CompletedProcess:
    return call(LAUNCH / "first_hour.sh", *arguments, check=check, PATH=with_python(tmp_path))


def test_first_hour_misses_devices(tmp_path):
    done = first_hour(
        tmp_path, "--config=c.py", "--config.data.root=x", f"--workdir={tmp_path}", f"--out={tmp_path}/out", "--topology=v5e:4x4", check=1
    )
    assert "The machine has 8 devices; 1 x v5e:4x4 has 16." in done.stderr


@pytest.mark.slow
def test_first_hour_measures_a_real_run(tmp_path):
    root = tiny_run.write_shards(tmp_path / "shards")
    config = tiny_run.write_config(tmp_path / "tiny.py", tiny_run.pretraining(root))
    arguments = [f"--config={config}", f"--workdir={tmp_path}/run", f"--config.data.root={root}", f"--out={tmp_path}/out", "--steps=10"]
    out = first_hour(tmp_path, *arguments, "--seconds=1").stdout
    assert "process 0 of 1: 8 x cpu answer" in out
    shards = list(root.glob("*/*/*.tar"))
    assert f"MB from {len(shards)} shards" in out
    read = json.loads((tmp_path / "out" / "storage.json").read_text())["bytes_per_second"]
    assert 0 < read < 1e12
    rows = {line[:32].strip(): line[32:].split() for line in out.partition("measured")[2].splitlines()}
    assert rows["devices"] == ["-", "8", "-"]
    assert float(rows["seconds a step"][1]) > 0
    assert "holds a run already" in first_hour(tmp_path, *arguments, check=2).stderr


@pytest.fixture(scope="module")
def side_by_side():
    """What makes the table of `first_hour.py`, its rows as cells."""
    spec = importlib.util.spec_from_file_location("first_hour", LAUNCH / "first_hour.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *facts: [line[32:].split() for line in module.table(*facts).splitlines()[1:]]


def test_plan_and_measurement_side_by_side(side_by_side):
    plan = {"chips": 16, "seconds": {"predicted": 0.5}, "tokens_per_second": 2e6, "mfu": 0.4, "input": {"storage": 2e8}}
    machine, disk = {"devices": 16, "flops": 1.8e14, "peak": 2e14}, {"bytes_per_second": 3e8}
    metrics = {"step_seconds": 1.0, "tokens_per_second": 1e6, "mfu": 0.2, "data_wait": 0.125}
    assert side_by_side(plan, machine, disk, metrics) == [
        ["16", "16", "1.00"],
        ["200", "180", "0.90"],
        ["0.5", "1", "2.00"],
        ["2,000,000", "1,000,000", "0.50"],
        ["40", "20", "0.50"],
        ["0", "12.5", "-"],
        ["200", "300", "1.50"],
    ]
    assert {cell for row in side_by_side({}, {}, {}, {}) for cell in row} == {"-"}


@pytest.mark.slow
def test_the_plan_tells_all_that_is_compared(side_by_side):
    pytest.importorskip("libtpu", reason="libtpu is not installed; pip install 'jax[tpu]'")
    arguments = ["--config=configs/pretrain/tiny.py", "--topology=v5e:2x2", "--json", "--config.train.batch_size=64"]
    plan = json.loads(call(sys.executable, "-m", "terramind_jax", "plan", *arguments).stdout)
    assert all(row[0] != "-" for row in side_by_side(plan, {"peak": 1e14}, {}, {}))
