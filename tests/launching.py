"""What the tests of `launch/` share: its scripts, run as one types them."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
LAUNCH = REPOSITORY / "launch"
GROUPS = subprocess.run([LAUNCH / "xla_flags.sh"], capture_output=True, text=True).stdout.split()


def call(*arguments, check: int | None = 0, **environment) -> subprocess.CompletedProcess:
    """Runs a command from the checkout and expects this exit code."""
    env = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, cwd=REPOSITORY, env=env, timeout=600)
    assert check is None or done.returncode == check, done.stdout + done.stderr
    return done


def dry(script: str, *arguments) -> list[list[str]]:
    """The commands that a dry run prints, as words."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    out = call(LAUNCH / script, *arguments[:at], "--dry-run", *arguments[at:]).stdout
    return [shlex.split(line) for line in out.splitlines()]


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def with_python(folder: Path) -> str:
    """A PATH on which `python` is this one."""
    executable(folder / "bin" / "python", f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    return f"{folder / 'bin'}:{os.environ['PATH']}"


def wait_for(condition, seconds: float = 20):
    end = time.time() + seconds
    while not (value := condition()):
        assert time.time() < end, "it did not happen in time"
        time.sleep(0.05)
    return value


def flags_of(*groups: str) -> dict[str, str]:
    """The variables that groups of xla_flags.sh set."""
    clean = {name: "" for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION")}
    lines = call(LAUNCH / "xla_flags.sh", *groups, **clean).stdout.splitlines()
    return {name: value.strip('"') for name, _, value in (line.removeprefix("export ").partition("=") for line in lines)}
