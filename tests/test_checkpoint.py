"""Checkpoints: what is saved comes back bit for bit, also when its arrays are donated while it is written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from jax.sharding import PartitionSpec

from terramind_jax import checkpoint, sharding
from terramind_jax.train import optimizer


def trees(scale: float, mesh) -> dict:
    split = jax.sharding.NamedSharding(mesh, PartitionSpec("fsdp"))
    params = {"a": jax.device_put(jnp.arange(64.0).reshape(16, 4) * scale, split), "mod_emb/x": jnp.full((3,), scale)}
    return {"params": params, "opt_state": optimizer.AdamWState(jnp.int32(5), params, params), "buffers": {"pos": params["a"] * 0}}


def abstract(tree, mesh):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh)), tree)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(checkpoint, "RETRY_SECONDS", 0)


def test_save_and_restore_on_another_mesh(tmp_path):
    one, other = sharding.make_mesh(data=1, fsdp=8), sharding.make_mesh(data=8)
    kept = checkpoint.Checkpoints(tmp_path, keep=2)
    assert kept.latest() is None
    for step in (1, 2, 3):
        kept.save(step, trees(step, one), {"step": step, "samples": 2**40 + step})
    kept.close()
    again = checkpoint.Checkpoints(tmp_path, keep=2)
    assert again.latest() == 3
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "3"]
    expected = trees(3.0, one)
    restored, counters = again.restore(abstract(expected, other))
    assert counters == {"step": 3, "samples": 2**40 + 3}
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert isinstance(restored["opt_state"], optimizer.AdamWState)
    again.close()


def test_donation_while_a_checkpoint_is_written(tmp_path):
    mesh = sharding.make_mesh()
    twice = jax.jit(lambda x: x * 2, donate_argnums=0)
    x = jax.jit(lambda: jnp.ones(1_000_000), out_shardings=sharding.replicated(mesh))()
    kept = checkpoint.Checkpoints(tmp_path, keep=1)
    kept.save(1, {"params": {"x": x}}, {"step": 1})
    for _ in range(3):
        x = twice(x)
    jax.block_until_ready(x)
    shapes = abstract({"params": {"x": x}}, mesh)
    kept.close()
    restored, _ = checkpoint.Checkpoints(tmp_path).restore(shapes)
    np.testing.assert_array_equal(restored["params"]["x"], np.ones(1_000_000))


KILLED_WHILE_WRITING = """
import glob, os, sys, threading, time
import jax.numpy as jnp
from terramind_jax.checkpoint import Checkpoints

def kill():
    while not glob.glob(sys.argv[1] + "/checkpoints/2.*tmp*"):
        time.sleep(0.0005)
    os.kill(os.getpid(), 9)

kept = Checkpoints(sys.argv[1], keep=2)
tree = {"params": {"w": jnp.ones(8_000_000)}}
kept.save(1, tree, {"step": 1})
threading.Thread(target=kill, daemon=True).start()
kept.save(2, tree, {"step": 2})
time.sleep(60)
"""


def test_an_interrupted_write_is_ignored_and_removed(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path)], env=environment, stderr=subprocess.DEVNULL)
    assert any("tmp" in name for name in os.listdir(tmp_path / "checkpoints"))
    again = checkpoint.Checkpoints(tmp_path, keep=2)
    assert again.latest() == 1
    again.save(3, {"params": {"w": jnp.ones(3)}}, {"step": 3})
    again.close()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "3"]


def test_load_variables_prefers_the_average(tmp_path):
    mesh = sharding.make_mesh()
    shapes = {"params": {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}, "buffers": {"b": jax.ShapeDtypeStruct((1,), jnp.float32)}}
    with pytest.raises(FileNotFoundError, match="has no complete checkpoint"):
        checkpoint.load_variables(tmp_path, shapes)
    kept = checkpoint.Checkpoints(tmp_path, keep=3)
    place = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))
    saved = {"params": {"w": place(jnp.ones(2))}, "buffers": {"b": place(jnp.zeros(1))}}
    kept.save(1, saved, {"step": 1})
    kept.close()
    np.testing.assert_array_equal(checkpoint.load_variables(tmp_path, shapes)["params"]["w"], [1, 1])
    kept = checkpoint.Checkpoints(tmp_path, keep=3)
    kept.save(2, {**saved, "ema": {"w": place(jnp.full(2, 7.0))}}, {"step": 2})
    kept.close()
    variables = checkpoint.load_variables(tmp_path, shapes)
    np.testing.assert_array_equal(variables["params"]["w"], [7, 7])
    np.testing.assert_array_equal(variables["buffers"]["b"], [0])


# ---- damage ----

ITEMS = ("params", "buffers", "opt_state", checkpoint.COUNTERS)


def noise(step: int, mesh) -> dict:
    """Trees whose arrays cannot be compressed, so that they are the largest files."""
    make = jax.jit(lambda key: jax.random.normal(key, (4096,)), out_shardings=sharding.replicated(mesh))
    return {name: {"w": make(jax.random.key(10 * step + i))} for i, name in enumerate(ITEMS[:-1])}


def two_checkpoints(workdir, mesh) -> dict:
    """Shapes of what steps 1 and 2 hold."""
    kept = checkpoint.Checkpoints(workdir, keep=3)
    for step in (1, 2):
        kept.save(step, noise(step, mesh), {"step": step, "samples": 8 * step})
    kept.close()
    return abstract(noise(1, mesh), mesh)


@pytest.mark.parametrize("how", ["missing", "truncated", "empty"])
@pytest.mark.parametrize("item", ITEMS)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, item, how):
    mesh = sharding.make_mesh()
    shapes = two_checkpoints(tmp_path, mesh)
    tiny_run.damage(tmp_path / "checkpoints" / "2" / item, how)
    kept = checkpoint.Checkpoints(tmp_path, keep=3)
    warning = rf"^The checkpoint {tmp_path}/checkpoints/2 cannot be read \(\w+: .*\); step 1 is used instead\.$"
    with pytest.warns(UserWarning, match=warning):
        restored, counters = kept.restore(shapes)
    assert counters == {"step": 1, "samples": 8}
    jax.tree.map(np.testing.assert_array_equal, restored, noise(1, mesh))
    # The run comes to its step again.
    assert kept.latest() == 1
    kept.save(2, noise(2, mesh), {"step": 2, "samples": 16})
    kept.close()
    assert checkpoint.Checkpoints(tmp_path).restore(shapes)[1] == {"step": 2, "samples": 16}


def test_a_whole_item_that_is_gone_is_damage(tmp_path):
    shapes = two_checkpoints(tmp_path, sharding.make_mesh())
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "opt_state")
    with pytest.warns(UserWarning, match="step 1 is used instead"):
        assert checkpoint.Checkpoints(tmp_path, keep=3).restore(shapes)[1] == {"step": 1, "samples": 8}


def test_one_who_only_reads_deletes_nothing(tmp_path):
    shapes = two_checkpoints(tmp_path, sharding.make_mesh())
    tiny_run.damage(tmp_path / "checkpoints" / "2" / "params", "truncated")
    with pytest.warns(UserWarning, match="step 1 is used instead"):
        checkpoint.Checkpoints(tmp_path).restore(shapes)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]


def test_if_all_are_damaged_the_newest_tells_why_and_all_stay(tmp_path):
    shapes = two_checkpoints(tmp_path, sharding.make_mesh())
    for step in "12":
        shutil.rmtree(tmp_path / "checkpoints" / step / "params")
    with pytest.raises(Exception, match="checkpoints/2/params"):
        checkpoint.Checkpoints(tmp_path, keep=3).restore(shapes)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]


def test_one_that_another_process_cannot_read_is_passed_over_here_too(tmp_path, monkeypatch):
    shapes = two_checkpoints(tmp_path, sharding.make_mesh())
    answers = [False, True]
    monkeypatch.setattr(checkpoint, "_everywhere", lambda ok: ok and answers.pop(0))
    with pytest.warns(UserWarning, match=r"checkpoints/2 cannot be read \(ValueError: another process cannot read it\); step 1 is used"):
        assert checkpoint.Checkpoints(tmp_path, keep=3).restore(shapes)[1] == {"step": 1, "samples": 8}


# ---- object stores ----


@pytest.fixture
def bucket(monkeypatch):
    """Orbax takes local folders for those of a bucket, where a file written last says that a checkpoint is complete."""
    from orbax.checkpoint._src.path import gcs_utils

    monkeypatch.setattr(gcs_utils, "is_gcs_path", lambda path: True)


def test_in_a_bucket_an_interrupted_write_is_ignored_and_made_again(tmp_path, bucket):
    mesh = sharding.make_mesh()
    shapes = two_checkpoints(tmp_path, mesh)
    (tmp_path / "checkpoints" / "2" / "commit_success.txt").unlink()
    again = checkpoint.Checkpoints(tmp_path, keep=3)
    assert again.latest() == 1
    assert again.restore(shapes)[1] == {"step": 1, "samples": 8}
    again.save(2, noise(3, mesh), {"step": 2})
    again.close()
    restored, _ = checkpoint.Checkpoints(tmp_path).restore(shapes)
    jax.tree.map(np.testing.assert_array_equal, restored, noise(3, mesh))


def test_a_checkpoint_that_is_not_complete_is_none(tmp_path):
    assert checkpoint.saved(tmp_path) is None
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir(parents=True)
    assert checkpoint.saved(tmp_path) is None
    kept = checkpoint.Checkpoints(tmp_path, keep=2)
    kept.save(8, {"params": {"w": jnp.zeros(2)}}, {"samples": 8})
    kept.close()
    found = checkpoint.saved(tmp_path)
    assert found.latest() == 8
    found.close()
