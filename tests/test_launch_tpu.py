"""`tpu_vm.sh`, `worker.sh` and `babysit.sh`: exact commands, and what a worker does, which this machine can be."""

import os
import shlex
import sys
from pathlib import Path

import pytest
from launching import LAUNCH, call, dry, executable, wait_for

QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
ALL = ["--node=all", "--worker=all"]
ZONE = "--zone=us-west4-a"


def on_worker(command: list[str]) -> list[str]:
    """The words of what `--command` runs on a worker."""
    return shlex.split(command[-2].removeprefix("--command="))


# ---- tpu_vm.sh: exact commands ----


@pytest.mark.parametrize(
    ("options", "name", "kind", "image", "rest"),
    [
        ((), "terramind", "v5litepod-16", "v2-alpha-tpuv5-lite", ["--node-id=terramind", ZONE]),
        (
            ("--name=pod", "--project=p", "--zone=z", "--type=v6e-256", "--slices=2", "--spot", "--valid_until=6h"),
            "pod",
            "v6e-256",
            "v2-alpha-tpuv6e",
            ["--node-count=2", "--node-prefix=pod", "--spot", "--valid-until-duration=6h", "--zone=z", "--project=p"],
        ),
    ],
)
def test_create_asks_for_slices(options, name, kind, image, rest):
    [command] = dry("tpu_vm.sh", "create", *options)
    scopes = "--scopes=https://www.googleapis.com/auth/cloud-platform"
    assert command == [*QUEUED, "create", name, f"--accelerator-type={kind}", f"--runtime-version={image}", scopes, *rest]


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
    [command] = dry("tpu_vm.sh", "run", "--flags=none", "--", "echo", "a b", "it's $HOME")
    assert on_worker(command)[-5:] == ["--flags=none", "--", "echo", "a b", "it's $HOME"]


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
RESTART = ["stop", "scp", "setup", "start"]
GIVE_BACK = ["stop", "delete"]


@pytest.mark.parametrize(
    ("events", "options", "code", "calls", "said"),
    [
        # preempted
        (("running running", "taken", "running running", "exited-0 exited-0"), (), 0, ["delete", *BEGIN, *GIVE_BACK], "has ended"),
        # two looks in a row without an answer
        (("silent", "running", "silent", "silent", "exited-0"), ("--patience=2",), 0, [*GIVE_BACK, *BEGIN, *GIVE_BACK], "did not answer 2"),
        (("running", "exited-1 running", "running", "died", "exited-9"), (), 1, [*RESTART, *RESTART, "log", *GIVE_BACK], "failed 3 times"),
        # some workers end before the others
        (("running exited-0", "exited-0 exited-0"), (), 0, GIVE_BACK, "has ended"),
        # an error of use
        (("exited-2 died",), (), 2, ["log", *GIVE_BACK], "refuses its arguments"),
    ],
)
def test_babysit(tmp_path, events, options, code, calls, said):
    asked, text = babysit(tmp_path, *events, check=code, options=options)
    assert asked == [*BEGIN, *calls]
    assert said in text


def test_babysit_counts_no_failures_of_runs_that_lasted_nor_of_sigterm(tmp_path):
    events = ["exited-143 exited-143", "exited-1", "exited-143", "exited-1", "exited-0"]
    assert babysit(tmp_path, *events, check=0, options=("--healthy=0", "--max_failures=2"))[0].count("start") == 5
