"""`xla_flags.sh`: every flag has its reason, and the compilers that are installed know it."""

import re
import subprocess
import sys

import pytest
from launching import GROUPS, LAUNCH, call, flags_of


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
