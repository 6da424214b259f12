"""The loop on a model of four numbers: what it does with steps, data and checkpoints that go wrong, and what it leaves behind."""

import contextlib
import random
import shutil
import signal
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from terramind_jax import checkpoint, files, processes, sharding
from terramind_jax.data.faults import Faults
from terramind_jax.train import logging, loop, optimizer, pretrain, state

BATCH, STEPS = 8, 20


def losses(workdir) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in logging.read(workdir) if "loss" in line}


def settings(**run):
    config = tiny_run.pretraining("", steps=STEPS)
    config.train.batch_size = BATCH
    config.optimizer.learning_rate = 0.1
    config.run.update({"checkpoint_every": 4, "patience": 3, "rewinds": 2, "max_bad_fraction": 1.0, "stall_seconds": 0.0, **run})
    return config


def train(workdir, value: Callable[[int], float] = lambda step: 1.0, *, config=None, shape=lambda step: (BATCH,), bad=0, on_step=None):
    """Fits four numbers to `value` of the step, counted by the samples consumed; `bad` samples of each batch cannot be read."""
    config, mesh = config or settings(), sharding.make_mesh()
    tx = optimizer.adamw(config.optimizer)

    def init(key):
        start = nn.LogicallyPartitioned(jax.random.normal(key, (4,)), ("norm",))
        return {"params": {"w": start}, "buffers": {"b": start}}

    def step(before, buffers, batch):
        loss, grads = jax.value_and_grad(lambda p: jnp.square(p["w"] - batch["x"].mean()).sum())(before.params)
        after, metrics = state.apply(before, tx, config.optimizer, loss, grads, batch_size=BATCH, total=STEPS * BATCH, warmup=0.1)
        return after, {**metrics, "bad": batch["bad"].sum()}

    def batches(consumed):
        for n in range(consumed // BATCH + 1, 1000):
            if on_step is not None:
                on_step(n)
            yield sharding.to_global({"x": np.full(shape(n), value(n), np.float32), "bad": np.arange(BATCH) < bad}, mesh)

    faults = Faults(None, lambda i: None)
    faults.reasons = lambda: "s003 is no zip file."
    checkpoints = checkpoint.Checkpoints(workdir, config.run.keep)
    train_state, buffers, layout, kept = state.start(init, tx, mesh, 0, checkpoints)
    training = loop.Training(
        title="four numbers",
        total=STEPS * BATCH,
        work={"numbers": 4, "samples": BATCH, "flops": 1.0, "peak": 1.0},
        summed=("bad",),
        step=jax.jit(step, donate_argnums=0, out_shardings=(layout, sharding.replicated(mesh))),
        batches=batches,
        validate=None,
        faults=faults,
    )
    return loop.run(training, config, workdir, mesh, checkpoints, train_state, buffers, kept)


def saved(workdir):
    """Parameters and counters of the newest checkpoint."""
    shape = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding.replicated(sharding.make_mesh()))
    kept = checkpoint.Checkpoints(workdir)
    trees, counters = kept.restore({"params": {"w": shape}})
    kept.close()
    return np.asarray(trees["params"]["w"]), counters


# ---- steps that would spoil the parameters ----


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e4])
def test_a_step_that_is_not_finite_or_a_spike_is_skipped_and_counted(tmp_path, wrong):
    config = settings(checkpoint_every=1)
    config.optimizer.spike_factor = 10.0
    last = train(tmp_path, lambda step: wrong if step in (STEPS - 4, STEPS) else 1.0, config=config)
    assert (last["skipped"], last["rewinds"]) == (2, 0)
    written = {line["step"]: line for line in logging.read(tmp_path)}
    assert [n for n in range(2, STEPS + 1) if written[n]["skipped"] > written[n - 1]["skipped"]] == [STEPS - 4, STEPS]
    assert written[STEPS]["grad_norm"] == (pytest.approx(4e4, rel=0.01) if wrong == 1e4 else None)  # what was wrong is in the log
    assert tiny_run.checkpoints(tmp_path) == [STEPS - 2, STEPS - 1, STEPS]
    after, counters = saved(tmp_path)
    assert counters["skipped"] == 2
    shutil.rmtree(tmp_path / "checkpoints" / str(STEPS))
    np.testing.assert_array_equal(saved(tmp_path)[0], after)  # those of the step before


def test_a_lasting_spike_leads_back_and_is_never_applied(tmp_path):
    config = settings(checkpoint_every=4)
    config.optimizer.spike_factor = 10.0
    config.run.patience = 3
    last = train(tmp_path, lambda step: 30.0 if 6 <= step <= 8 else 1.0, config=config)
    assert (last["skipped"], last["rewinds"]) == (3, 1)


def test_no_checkpoint_is_written_of_a_state_that_was_not_just_improved(tmp_path):
    train(tmp_path, lambda step: np.nan if step in (8, 15) else 1.0)
    assert tiny_run.checkpoints(tmp_path) == [12, 16, 20]
    train(tmp_path / "next", lambda step: np.nan if step == 12 else 1.0)
    assert tiny_run.checkpoints(tmp_path / "next") == [8, 16, 20]


def test_skipped_steps_in_a_row_go_back_to_the_last_good_checkpoint_with_other_data(tmp_path):
    visited = []
    last = train(tmp_path, lambda step: np.nan if 6 <= step <= 9 else 1.0, on_step=visited.append)
    assert visited[:STEPS] == list(range(1, STEPS + 1))  # nothing is seen twice
    assert (last["rewinds"], last["step"], last["samples"]) == (1, STEPS, STEPS * BATCH)
    assert saved(tmp_path)[1]["rewinds"] == 1
    # The parameters of step 5 are gone: step 10 begins with those of step 4, whose loss step 5 told.
    told = losses(tmp_path)
    assert told[10] == pytest.approx(told[5]) and told[11] < told[10]


def test_what_going_back_does_not_help_stops_the_run(tmp_path):
    message = (
        r"^The loss or its gradient was not finite, or far above its mean, in the last 3 steps, to step \d+, also after going back 2 "
        r"times, and nothing was learned; lower optimizer.learning_rate[^\n]*\.$"
    )
    with pytest.raises(ValueError, match=message):
        train(tmp_path, lambda step: np.nan if step > 5 else 1.0)
    assert tiny_run.checkpoints(tmp_path) == [4]  # the same command, with other settings, goes on from there
    assert np.isfinite(saved(tmp_path)[0]).all()


def test_with_nothing_to_go_back_to_the_run_stops(tmp_path):
    with pytest.raises(ValueError, match=r"in the last 3 steps, to step 4, and nothing was learned"):
        train(tmp_path, lambda step: np.nan)


# ---- data, shapes, devices ----


def test_too_many_unreadable_samples_stop_the_run_with_the_reasons(tmp_path):
    with pytest.raises(ValueError, match=r"^\d+ % of the samples .* more than run\.max_bad_fraction=0\.1: s003 is no zip file\.$"):
        train(tmp_path, config=settings(max_bad_fraction=0.1), bad=6)
    assert 13 < max(losses(tmp_path)) < 17  # of 100 steps with 3 of 4 unreadable
    assert train(tmp_path / "few", config=settings(max_bad_fraction=0.15), bad=1)["bad"] == STEPS


def test_a_step_that_is_compiled_again_stops_the_run(tmp_path):
    with pytest.raises(RuntimeError, match="The training step was compiled again at step 6: a shape or a sharding has changed"):
        train(tmp_path, shape=lambda step: (BATCH, 2) if step == 6 else (BATCH,))


# ---- stopping and going on ----


def test_a_sigterm_saves_and_the_numbers_go_on_as_if_there_was_none(tmp_path):
    whole, broken, config = tmp_path / "whole", tmp_path / "broken", settings()
    config.optimizer.spike_factor = 10.0

    def value(step):
        return 1e4 if step == 7 else step  # what a spike is has to be remembered

    assert train(whole, value, config=config)["skipped"] == 1
    with pytest.raises(checkpoint.Terminated, match=r"^Stopped by SIGTERM at step 6 of 20; the checkpoint is saved and the same command"):
        train(broken, value, config=config, on_step=lambda n: signal.raise_signal(signal.SIGTERM) if n == 6 else None)
    assert tiny_run.checkpoints(broken) == [4, 6]
    train(broken, value, config=config)
    assert losses(broken) == losses(whole)
    np.testing.assert_array_equal(saved(broken)[0], saved(whole)[0])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the handler is gone


def test_goodput_counts_the_interruption(tmp_path):
    stop = lambda n: signal.raise_signal(signal.SIGTERM) if n == 12 else time.sleep(0.02)  # noqa: E731
    with pytest.raises(checkpoint.Terminated):
        train(tmp_path, on_step=stop)
    before = saved(tmp_path)[1]
    time.sleep(1)
    last = train(tmp_path)
    after = saved(tmp_path)[1]
    assert after["began"] == before["began"] and after["productive_seconds"] > before["productive_seconds"] > 0
    assert last["goodput"] < after["productive_seconds"] / 1.0


# ---- what it leaves behind ----


def test_a_profile_of_some_steps(tmp_path):
    train(tmp_path, config=settings(profile="5:7"))
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


def test_a_profile_longer_than_the_run_is_written_at_its_end(tmp_path):
    train(tmp_path, config=settings(profile="15:1000"))
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


def test_the_watchdog_knows_what_each_step_does(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(processes.Watchdog, "at", lambda self, step, doing: told.append((step, doing)))
    train(tmp_path)
    assert told[:2] == [(1, "reads its data"), (1, "computes")]
    assert told[8:11] == [(4, "saves"), (5, "reads its data"), (5, "computes")]


@pytest.mark.filterwarnings("error::UserWarning")  # a sink of the metrics that fails only warns
def test_an_object_store_is_neither_appended_to_nor_renamed_in(tmp_path, monkeypatch):
    """Orbax apart, which has its own protocol there; see `test_checkpoint`."""
    kept = checkpoint.Checkpoints(tmp_path / "local", 3)  # its folders lie on this disk
    monkeypatch.setattr(checkpoint, "Checkpoints", lambda *_: kept)
    monkeypatch.setattr(files, "is_remote", lambda path: True)
    monkeypatch.setattr(files, "folder", lambda path: tiny_run.ObjectStore(path))
    monkeypatch.setattr(logging, "FLUSH_SECONDS", 0.0)
    workdir = tmp_path / "bucket"
    train(workdir, config=settings(profile="5:7", tensorboard=True))
    assert sorted(path.name for path in workdir.iterdir()) == ["metrics-000000001.jsonl", "profile", "tensorboard"]
    assert list(losses(workdir)) == list(range(1, STEPS + 1))
    assert list((workdir / "profile").rglob("*.xplane.pb"))


# ---- the real training ----


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_run.write_shards(tmp_path_factory.mktemp("shards"))


def pretrained(root, workdir, changes=(), stop: int = 0) -> list[int]:
    """The samples, in their order, on which a run of so many tokens trains; it is terminated at step `stop`."""
    config = tiny_run.pretraining(root)
    config.train.update(steps=0, total_tokens=24 * 8 * 11.0)
    config.data.update(view_window=16, val_split="none")
    for group, values in dict(changes).items():
        config[group].update(values)
    seen = []

    def listing(self, batches):
        for n, batch in enumerate(batches, 1):
            if n == stop:
                signal.raise_signal(signal.SIGTERM)
            seen.extend(batch["sample"].tolist())
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Faults, "following", listing)
        with pytest.raises(checkpoint.Terminated) if stop else contextlib.nullcontext():
            pretrain.train(config, workdir)
    return seen


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """The work directory of a run that was not interrupted, and its samples."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, pretrained(root, workdir)


@pytest.fixture(scope="module")
def stopped(root, tmp_path_factory):
    """The same of one that was terminated."""
    workdir = tmp_path_factory.mktemp("stopped")
    return workdir, pretrained(root, workdir, stop=10)


@pytest.mark.filterwarnings("ignore:mesh.fsdp=2 leaves 32 rows")
@pytest.mark.parametrize(
    ("changes", "steps", "tolerance"),
    [
        ({"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}, 24, 1e-5),
        ({"model": {"dtype": "bfloat16"}, "train": {"batch_size": 16}}, 17, None),
        ({"mesh": {"data": -1, "tensor": 4}, "train": {"batch_size": 2}}, 66, None),
    ],
    ids=["mesh", "precision and batch", "mesh and batch"],
)
def test_a_run_goes_on_elsewhere_with_the_same_data(root, whole, stopped, tmp_path, changes, steps, tolerance):
    shutil.copytree(stopped[0], tmp_path, dirs_exist_ok=True)
    seen = stopped[1] + pretrained(root, tmp_path, changes)
    assert seen == whole[1] and len(seen) == 24 * 8
    got, expected = losses(tmp_path), losses(whole[0])
    assert list(got) == list(range(1, steps + 1)) and np.isfinite(list(got.values())).all()
    if tolerance:
        np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=tolerance)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(pretrain.load(tmp_path)[1]["params"]))


@pytest.mark.slow
def test_ten_kills_at_random_moments(tmp_path):
    """Half of them while a checkpoint is written. Every start goes on from the newest complete one, and the numbers are the same."""
    config = tiny_run.pretraining(tiny_run.write_shards(tmp_path / "shards"), steps=160)
    config.data.val_split = "none"
    config.run.checkpoint_every = 6
    path = tiny_run.write_config(tmp_path / "config.py", config)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert tiny_run.ended(tiny_run.start(path, whole)) == [0]
    draw, writing = random.Random(0), 0
    for kill in range(10):
        committed = max(tiny_run.checkpoints(broken), default=0)
        start, more = len(tiny_run.visits(broken)), draw.randrange(1, 16)
        process = tiny_run.start(path, broken)
        tiny_run.wait_for(lambda: len(tiny_run.visits(broken)) >= start + more, process)  # noqa: B023
        if kill % 2:
            tiny_run.wait_for(lambda: any("tmp" in p.name for p in (broken / "checkpoints").iterdir()), process)
            time.sleep(draw.random() * 0.1)
        else:
            time.sleep(draw.random() * 0.5)
        process[0].kill()
        process[0].wait()
        writing += any("tmp" in p.name for p in (broken / "checkpoints").iterdir())
        assert tiny_run.visits(broken)[start] == committed + 1  # nothing is lost but what came after the newest checkpoint
        assert max(tiny_run.visits(broken)[start:]) - max(tiny_run.checkpoints(broken), default=0) <= config.run.checkpoint_every + 1
    assert writing >= 2
    assert tiny_run.ended(tiny_run.start(path, broken)) == [0]
    assert [line["step"] for line in logging.read(broken) if "loss" in line] == list(range(1, 161))
    assert losses(broken) == losses(whole)
    assert tiny_run.samples(broken) == tiny_run.samples(whole)
    assert max(tiny_run.differences(*(pretrain.load(workdir)[1]["params"] for workdir in (broken, whole)))) == 0


def test_the_last_step_is_logged_whatever_its_number(tmp_path):
    train(tmp_path, config=settings(log_every=8))
    assert list(losses(tmp_path)) == [8, 16, STEPS]
    lines = logging.read(tmp_path)
    train(tmp_path, config=settings(log_every=8))
    assert logging.read(tmp_path) == lines
