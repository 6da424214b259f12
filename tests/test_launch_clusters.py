"""`jobset.yaml`, the image that it runs, and `slurm.sbatch`."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launching import GROUPS, LAUNCH, REPOSITORY, call, executable, flags_of, with_python

from terramind_jax import cli

# ---- jobset.yaml ----


def test_jobset_is_one_pod_a_host_and_all_restart_together():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [replicated] = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["completions"] == job["parallelism"] == rows * columns // chips
    assert replicated["replicas"] > 1
    assert jobset["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"] == "cloud.google.com/gke-nodepool"

    # One dead pod ends the attempt, all start again, and a preemption does not count.
    assert (job["backoffLimit"], pod["restartPolicy"], job["completionMode"]) == (0, "Never", "Indexed")
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    [rule] = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    assert job["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget"}]},
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [cli.INTERRUPTED]}},
    ]
    assert pod["terminationGracePeriodSeconds"] >= 300

    # The coordinator is process 0, and every pod is told where it is.
    network = jobset["spec"]["network"]
    assert network["enableDNSHostnames"] and network["publishNotReadyAddresses"] and network["subdomain"]
    assert jobset["spec"]["coordinator"] == {"replicatedJob": replicated["name"], "jobIndex": 0, "podIndex": 0}
    [name] = [e["name"] for e in container["env"] if "jobset.sigs.k8s.io/coordinator" in str(e.get("valueFrom"))]
    address = {e["name"]: e.get("value") for e in container["env"]}["JAX_COORDINATOR_ADDRESS"]
    host, port = address.rsplit(":", 1)
    assert host == f"$({name})"
    assert int(port) in [p["containerPort"] for p in container["ports"]]


def test_jobset_runs_what_the_image_takes():
    from terramind_jax import config
    from terramind_jax.plan import feed

    text = (LAUNCH / "jobset.yaml").read_text()
    pod = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    command, *arguments = container["args"]
    options = dict(a.split("=", 1) for a in arguments)
    assert command == "pretrain"
    assert options["--workdir"].startswith("gs://")
    loaded = config.load(REPOSITORY / options["--config"], [a for a in arguments if a.startswith("--config.")])
    assert feed.times_read(loaded, hosts=128) == 1
    groups = {e["name"]: e.get("value") for e in container["env"]}["XLA_GROUPS"]
    assert set(groups.split()) <= set(GROUPS)
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    assert set(mounts) == {v["name"] for v in pod["volumes"]}
    assert options["--config.data.root"].startswith(mounts["data"])
    assert mounts["shared-memory"] == "/dev/shm"
    assert all("# EDIT" in line for line in text.splitlines() if re.search(r"PROJECT|BUCKET", line) and not line.startswith("#"))


# ---- slurm.sbatch ----


def directives() -> dict[str, str | None]:
    head, _, _ = (LAUNCH / "slurm.sbatch").read_text().partition("\nset -euo")
    pairs = (shlex.split(line)[1].partition("=") for line in head.splitlines() if line.startswith("#SBATCH"))
    return {name: value or None for name, _, value in pairs}


def test_slurm_directives():
    found = directives()
    text = (LAUNCH / "slurm.sbatch").read_text()
    assert len(found) == text.count("\n#SBATCH ")  # those behind the first command would be ignored
    assert found["--ntasks-per-node"] == found["--gpus-per-node"]  # one process a GPU
    name, _, seconds = found["--signal"].partition("@")
    assert name == "TERM"  # not B:TERM, which goes to the script alone
    assert int(seconds) >= 60
    assert {"--requeue", "--time", "--nodes"} <= set(found)
    assert found["--open-mode"] == "append"  # a requeued job keeps its log


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (143, True)])
def test_slurm_runs_pretrain_and_queues_again_after_saving(tmp_path, code, requeued):
    executable(tmp_path / "bin" / "srun", f'#!/bin/bash\nprintf "%s\\n" "$@" "$XLA_FLAGS"\nexit {code}\n')
    executable(tmp_path / "bin" / "scontrol", '#!/bin/bash\necho "scontrol $*"\n')
    copy = shutil.copy(LAUNCH / "slurm.sbatch", tmp_path / "job123")  # as SLURM does
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": REPOSITORY, "SLURM_JOB_ID": "123"}
    arguments = ["--config=c.py", "--workdir=/scratch/a b"]
    out = call("bash", copy, *arguments, check=code, PYTHON=sys.executable, XLA_FLAGS="", **environment).stdout.splitlines()
    assert out[:7] == ["--label", sys.executable, "-m", "terramind_jax", "pretrain", "--config.run.progress=false", *arguments[:1]]
    assert out[7] == arguments[1]
    assert out[8] == flags_of("gpu")["XLA_FLAGS"]
    assert ("scontrol requeue 123" in out) == requeued


def test_slurm_says_what_is_missing(tmp_path):
    assert "usage: sbatch" in call("bash", LAUNCH / "slurm.sbatch", "--config=c.py", check=2).stderr
    arguments = ["--config=c.py", "--workdir=w"]
    assert "is not there" in call("bash", LAUNCH / "slurm.sbatch", *arguments, check=2, PYTHON=tmp_path / "none").stderr


# ---- Dockerfile ----


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", (LAUNCH / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(None, 1)) for line in lines]


def test_the_image_is_made_from_what_is_there(tmp_path):
    """Its steps, with a folder for the image: files come from the checkout, extras exist, the entry point runs."""
    image, environment, installed = tmp_path / "image", {}, []
    image.mkdir()
    for name, rest in instructions():
        if name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                copy_into(image, source, target)
        elif name == "RUN" and "pip install" in rest:
            installed += re.findall(r'pip install .*"\.\[(.+?)\]"', rest)
            assert (image / "setup.py").exists()
        elif name == "ENV":
            environment |= dict(re.findall(r"(\w+)=(\S+)", rest))
    python, *_ = [rest for name, rest in instructions() if name == "FROM"]
    assert re.fullmatch(r"python:3\.1[12]-slim", python)
    assert installed == ["${EXTRAS}"]
    [extras] = [rest.partition("=")[2] for name, rest in instructions() if name == "ARG"]
    setup = (REPOSITORY / "setup.py").read_text()
    for extra in (*extras.split(","), "cuda"):
        assert f'"{extra}": [' in setup

    [entry] = [json.loads(rest) for name, rest in instructions() if name == "ENTRYPOINT"]
    [workdir] = [rest for name, rest in instructions() if name == "WORKDIR"]
    environment |= {"PATH": with_python(tmp_path), "PYTHONPATH": str(image)}
    [default] = [json.loads(rest) for name, rest in instructions() if name == "CMD"]
    done = subprocess.run(
        [str(image / Path(entry[0]).relative_to(workdir)), *default],
        capture_output=True,
        text=True,
        cwd=image,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    assert "pretrain" in done.stdout


def copy_into(image: Path, source: str, target: str) -> None:
    """COPY, of what Dockerfile.dockerignore leaves."""
    kept = [line[1:] for line in (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    assert source in kept, f"{source} is ignored"
    path = REPOSITORY / source
    if path.is_dir():
        shutil.copytree(path, image / target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(path, image / target)


def test_signals_reach_the_run_in_the_image(tmp_path):
    """The entry point becomes the run, so that the first process of a container is the one that saves."""
    executable(tmp_path / "bin" / "python", "#!/bin/bash\ntrap 'echo saves; exit 143' TERM\necho begins\nwhile true; do sleep 0.1; done\n")
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "XLA_GROUPS": "tpu host8"}
    process = subprocess.Popen([LAUNCH / "entrypoint.sh", "pretrain"], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "begins\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "saves\n"
    assert process.returncode == 143
