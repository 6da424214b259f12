"""Several processes: they join, train as one does, end with one that dies, stop together, and tell which of them is waited for."""

import multiprocessing
import os
import signal
import time

import jax
import nano_models
import numpy as np
import pytest
import tiny_run
from ml_collections import ConfigDict

from terramind_jax import cli, processes
from terramind_jax.data import pipeline
from terramind_jax.tasks import finetune
from terramind_jax.tasks.config import finetuning
from terramind_jax.tasks.samples import sample
from terramind_jax.train import logging, pretrain

# ---- joining ----


@pytest.fixture
def joining(monkeypatch):
    """What `jax.distributed.initialize` is called with, in a process that has no devices yet and is in no cluster."""
    calls = []
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes.xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: calls.append(settings))
    return calls


def test_a_description_comes_from_the_command_line_and_the_environment(joining, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    processes.join("10.0.0.2:1234", heartbeat_seconds=7)
    described = {"coordinator_address": "10.0.0.2:1234", "num_processes": 2, "process_id": 1, "heartbeat_timeout_seconds": 7}
    assert joining == [described]


def test_what_jax_knows_of_a_cluster_need_not_be_said(joining, monkeypatch):
    """GKE's JobSet gives the coordinator's address; how many processes there are and which one this is, JAX finds out."""
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "job-0.svc:8482")
    processes.join()
    assert joining[0] == {
        "coordinator_address": "job-0.svc:8482",
        "num_processes": None,
        "process_id": None,
        "heartbeat_timeout_seconds": 100,
    }


def test_a_coordinator_alone_is_completed_by_jax(monkeypatch):
    """With the variables that GKE sets on TPUs, JAX itself completes it."""
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(jax._src.clusters.cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(processes.xla_bridge, "backends_are_initialized", lambda: False)
    variables = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    for name, value in {**variables, "TPU_SKIP_MDS_QUERY": "1", "JAX_COORDINATOR_ADDRESS": "a:8482"}.items():
        monkeypatch.setenv(name, value)
    found = {}

    class Client:
        def __init__(self, address, process, **_):
            found.update(address=address, process=process, processes=jax._src.distributed.global_state.num_processes)
            raise KeyboardInterrupt  # it would connect

    monkeypatch.setattr(jax._src.distributed._jax, "get_distributed_runtime_client", Client)
    monkeypatch.setattr(jax._src.distributed, "global_state", jax._src.distributed.State())
    with pytest.raises(KeyboardInterrupt):
        processes.join()
    assert found == {"address": "a:8482", "process": 3, "processes": 4}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, r"Number of processes must be defined\. .* all of --coordinator=HOST:PORT, JAX_NUM_PROC"),
        ({"JAX_NUM_PROCESSES": "2"}, "coordinator_address should be defined"),
        ({"JAX_COORDINATOR_ADDRESS": "host", "JAX_NUM_PROCESSES": "2"}, r"The coordinator is 'host'; expected HOST:PORT"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'; expected a number"),
    ],
)
def test_an_incomplete_description_is_refused(joining, monkeypatch, variables, message):
    monkeypatch.undo()
    monkeypatch.setattr(processes.xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(jax.distributed, "initialize", jax._src.distributed.State().initialize)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*[.]$"):
        processes.join()


def test_alone_there_is_nothing_to_join(joining, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", jax._src.distributed.State().initialize)
    processes.join()
    assert not jax.distributed.is_initialized()


def test_joining_after_devices_are_used_is_refused(joining, monkeypatch):
    monkeypatch.setattr(processes.xla_bridge, "backends_are_initialized", lambda: True)
    processes.join()
    with pytest.raises(ValueError, match=r"cannot join others at host:1, as it uses its devices already; join before it does\."):
        processes.join("host:1")
    assert not joining


# ---- who is waited for ----


def at(step: int, doing: str, told: float = 0.0) -> dict:
    """What a process said `told` seconds ago, after a minute of it."""
    return {"step": step, "doing": doing, "since": -60, "told": -told}


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ([at(6, "saves")], "Step 6 has taken 60 s: this process saves."),
        ([at(6, "computes"), at(5, "reads its data")], "Step 6 has taken 60 s; waiting for process 1, at step 5: reads its data."),
        ([at(6, "computes"), at(6, "computes")], "Step 6 has taken 60 s; waiting for all 2 processes, at step 6: computes."),
        ([at(6, "computes"), at(6, "reads its data"), at(6, "reads its data")], "waiting for processes 1, 2, at step 6: reads its data."),
        ([at(6, "computes"), at(6, "computes", told=50)], "waiting for process 1, silent for more than 30 s."),
        ([at(6, "computes"), None, at(5, "reads its data")], "waiting for process 1, silent for more than 30 s."),
        ([at(6, "computes"), *[at(5, "saves")] * 9], "waiting for processes 1, 2, 3, 4, 5, 6, 7, 8 and more, at step 5: saves."),
    ],
)
def test_a_stalled_step_names_the_processes_that_are_behind(told, sentence, monkeypatch):
    monkeypatch.setattr(processes.time, "time", lambda: 0.0)
    said = processes.report(told[0], {i: one for i, one in enumerate(told) if one}, len(told), seconds=30)
    assert said.endswith(sentence)


def test_the_watchdog_reports_a_step_once_and_again_when_twice_as_long():
    said = []
    with processes.Watchdog(0.08, lambda text: said.append(text)) as watchdog:
        watchdog.at(1, "computes")
        time.sleep(0.02)
        watchdog.at(2, "reads its data")
        time.sleep(0.28)
    assert said == ["Step 2 has taken 0 s: this process reads its data."] * 2
    time.sleep(0.3)
    assert len(said) == 2


# ---- stopping ----


def test_data_workers_outlive_a_sigterm_to_the_whole_job(tmp_path):
    """SLURM and a host that shuts down send it to every process; the run reads on until it has saved."""
    config = tiny_run.pretraining(tiny_run.write_shards(tmp_path))
    index = pretrain.open_tokenized(config, "train")
    batches = pipeline.batches(index, *pretrain.data_settings(config), batch_size=8, workers=1)
    next(batches)
    workers = multiprocessing.active_children()
    assert workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    for _ in range(30):
        next(batches)
    batches.close()
    assert not any(worker.is_alive() for worker in workers)


# ---- two processes ----

STEPS, EVERY, SIGTERM = 32, 5, 143  # 32 steps are the program of other tests, which need not be compiled anew


def test_two_processes_are_killed_and_terminated_and_end_as_one_that_was_not(tmp_path):
    """Losses, parameters and samples; a process that is left alone ends by itself; SIGTERM at either stops both at one step."""
    config = tiny_run.pretraining(tiny_run.write_shards(tmp_path / "shards"), steps=STEPS)
    config.data.val_split = "none"  # a validation would have to be compiled
    config.run.update(checkpoint_every=EVERY, heartbeat_seconds=5, stall_seconds=1.0)
    path = tiny_run.write_config(tmp_path / "config.py", config)
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def lines() -> int:
        metrics = broken / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.is_file() else 0

    # ---- SIGKILL at one: the other ends ----
    two = tiny_run.start(path, broken, "--profile=2:4", processes=2)
    tiny_run.wait_for(lambda: lines() >= 2 * EVERY + 2 and len(tiny_run.checkpoints(broken)) > 1, two)
    two[1].kill()
    assert tiny_run.ended(two, 30)[0] not in (0, SIGTERM)

    # ---- Two go on, from the checkpoint before a damaged one ----
    before, newest = tiny_run.checkpoints(broken)[-2:]
    tiny_run.damage(broken / "checkpoints" / str(newest) / "params", "truncated")
    two = tiny_run.start(path, broken, processes=2)
    tiny_run.wait_for(lambda: f"step {before} is used instead" in tiny_run.said(broken, 0) and lines() > before + EVERY + 2, two)

    # ---- One stops for longer than `stall_seconds`; SIGTERM at it: both save ----
    two[1].send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    two[1].send_signal(signal.SIGCONT)
    two[1].terminate()
    assert tiny_run.ended(two) == [SIGTERM, SIGTERM]
    stopped = {line for i in (0, 1) for line in tiny_run.said(broken, i).splitlines() if line.startswith("Stopped by SIGTERM")}
    step = tiny_run.checkpoints(broken)[-1]
    assert stopped == {f"Stopped by SIGTERM at step {step} of {STEPS}; the checkpoint is saved and the same command goes on from it."}
    assert "waiting for process 1" in tiny_run.said(broken, 0)

    # ---- One goes on ----
    assert tiny_run.ended(tiny_run.start(path, broken)) == [0]
    assert tiny_run.ended(tiny_run.start(path, whole)) == [0]
    expected = {line["step"]: line["loss"] for line in logging.read(whole) if "loss" in line}
    got = [(line["step"], line["loss"]) for line in logging.read(broken) if "loss" in line]
    assert [step for step, _ in got] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([loss for _, loss in got], list(expected.values()), rtol=1e-5)
    assert tiny_run.samples(broken) == tiny_run.samples(whole)
    assert max(tiny_run.differences(*(pretrain.load(workdir)[1]["params"] for workdir in (broken, whole)))) < 1e-5
    assert list((broken / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["terramind_v1_tiny", "terramind_v1_tiny_tim"])
def test_two_processes_fine_tune_as_one_does(tmp_path, name):
    """With the features of a frozen backbone kept, and with what a generator makes of turned samples kept: each makes its share."""
    is_tim = name.endswith("tim")
    sample("sen1floods11", tmp_path / "data", count=8, size=48)
    config = finetuning()
    config.model.update(name=name, weights="random", modalities=("S1GRD",), decoder="linear", layers=(1,), tim_temperature=0.0)
    config.model.sizes = ConfigDict(nano_models.NANO)
    config.data.update(dataset="sen1floods11", root=str(tmp_path / "data"), crop=48, d4=is_tim)
    config.optimizer.update(learning_rate=1e-2, schedule="constant")
    config.train.update(batch_size=8, steps=12, tune="frozen")
    config.run.update(log_every=1, progress=False, tensorboard=False, eval_every=6, checkpoint_every=6)
    path, both, alone = tiny_run.write_config(tmp_path / "config.py", config), tmp_path / "both", tmp_path / "alone"
    assert tiny_run.ended(tiny_run.start(path, both, processes=2, command="finetune"), 300) == [0, 0], tiny_run.said(both, 0)
    assert tiny_run.ended(tiny_run.start(path, alone, devices=4, command="finetune"), 300) == [0]
    for metric in ("loss", "val/loss", "val/mIoU"):
        ours, theirs = ([line[metric] for line in logging.read(run) if metric in line] for run in (both, alone))
        assert len(ours) == (12 if metric == "loss" else 2)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert max(tiny_run.differences(*(finetune.load(run).variables["params"] for run in (both, alone)))) < 1e-4


@pytest.mark.parametrize(
    ("error", "code", "told"), [(ValueError("too large"), 2, "error: too large\n"), (OSError("gone"), 1, "OSError: gone\n")]
)
def test_one_of_several_processes_that_fails_ends_at_once(tmp_path, monkeypatch, capsys, error, code, told):
    """Else it would wait five minutes for the others, and these for it."""

    class Ended(BaseException):
        pass

    def end(code):
        raise Ended(code)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(cli, "end", end)
    monkeypatch.setattr(pretrain, "train", fail)
    config = tiny_run.write_config(tmp_path / "config.py", tiny_run.pretraining(tmp_path))
    with pytest.raises(Ended, match=str(code)):
        cli.main(["pretrain", f"--config={config}", f"--workdir={tmp_path}"])
    assert capsys.readouterr().err.endswith(told)


def test_processes_that_differ_are_told_before_they_wait_for_each_other(monkeypatch):
    same = {"configuration": b"a", "training index": b"b"}
    processes.check_agreement(same)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", lambda x: np.stack([x, x, x]))
    processes.check_agreement(same)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", lambda x: np.stack([x, x, x + np.array([0, 1], x.dtype)]))
    with pytest.raises(ValueError, match=r"^Process 2 has another training index than process 0; all need the same\.$"):
        processes.check_agreement(same)
