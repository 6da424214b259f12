"""Planning: facts of the machines, arithmetic of the roofline, what is printed, and what is refused."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_run

from terramind_jax import cli, flops, model, plan, zoo
from terramind_jax import config as configuration
from terramind_jax.plan import feed, roofline, search, step, topology
from terramind_jax.plan.collectives import Collective
from terramind_jax.plan.topology import GIB
from terramind_jax.train import pretrain

REPOSITORY = Path(__file__).parents[1]


# ---- machines ----


@pytest.mark.parametrize(
    ("text", "slices", "chips", "hosts"),
    [("v5e:16x16", 1, 256, 64), ("v5e:16x16", 2, 512, 128), ("v5p:4x4x4", 1, 64, 16), ("v6e:1x1", 1, 1, 1), ("v4:8x8x16", 1, 1024, 256)],
)
def test_topologies(text, slices, chips, hosts):
    where = topology.parse(text, slices)
    assert (where.chips, where.hosts, str(where)) == (chips, hosts, text)


@pytest.mark.parametrize(
    ("text", "slices", "message"),
    [
        ("v5e-256", 1, r"'v5e-256' is not CHIP:SHAPE, such as v5e:16x16"),
        ("v9:4x4", 1, r"names the chip 'v9'; known: v4, v5e, v5p, v6e\."),
        ("v5e:3x3", 1, r"'v5e:3x3' does not exist; slices of v5e are 1x1, 2x2, .*16x16\."),
        ("v5p:4x4", 1, r"does not exist; slices of v5p are 2x2x1, .*multiples of 4 in ascending order"),
        ("v5p:8x4x4", 1, "does not exist"),
        ("v5e:4x4", 0, r"--num_slices is 0; expected at least 1"),
    ],
)
def test_a_topology_that_does_not_exist_is_refused(text, slices, message):
    with pytest.raises(ValueError, match=message):
        topology.parse(text, slices)


def test_a_missing_compiler_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"not installed: pip install 'terramind-jax\[tpu\]'\."):
        topology.devices(topology.parse("v5e:4x4"))


# ---- the roofline ----


def mesh_of(shape: tuple[int, ...], axes: tuple[int, ...]) -> SimpleNamespace:
    """Chips of a slice in row-major order as a mesh (data, fsdp, tensor)."""
    chips = np.array([SimpleNamespace(coords=(*place, 0)) for place in np.ndindex(shape)])
    return SimpleNamespace(devices=chips.reshape(axes), axis_names=("data", "fsdp", "tensor"))


GIGABYTE = 10**9


@pytest.mark.parametrize(
    ("text", "kind", "group", "expected"),
    [
        # A ring on both axes sends on four links, a mesh of chips that does not wrap around on two.
        ("v5e:16x16", "all-reduce", range(256), 2 * 255 / 256 * GIGABYTE / (4 * 4.5e10)),
        ("v5e:4x4", "all-reduce", range(16), 2 * 15 / 16 * GIGABYTE / (2 * 4.5e10)),
        ("v5e:16x16", "all-gather", range(16), 15 / 16 * GIGABYTE / (2 * 4.5e10)),
        ("v5e:16x16", "all-gather", range(4), 3 / 4 * GIGABYTE / 4.5e10),  # a part of an axis is no ring
        ("v5p:4x4x4", "reduce-scatter", range(64), 63 / 64 * GIGABYTE / (6 * 9e10)),
        ("v5p:2x2x4", "all-gather", (0, 1, 2, 3), 3 / 4 * GIGABYTE / 9e10),  # less than a cube is joined nowhere
        ("v5p:2x2x2", "all-reduce", range(8), 2 * 7 / 8 * GIGABYTE / (3 * 9e10)),
        ("v5e:16x16", "all-to-all", range(16), 15 / 16 * GIGABYTE * 16 / 4 / (2 * 4.5e10)),
        ("v5e:16x16", "collective-permute", (0, 1), GIGABYTE / 4.5e10),
        ("v5e:16x16", "collective-permute", (0, 15), GIGABYTE / 4.5e10),  # around the ring
        ("v5e:16x16", "collective-permute", (0, 4), 4 * GIGABYTE / 4.5e10),
        ("v5e:16x16", "all-reduce", (0, 17, 34), 2 * 2 / 3 * GIGABYTE / 4.5e10),  # no box
        ("v5e:16x16", "all-reduce", (), 0.0),
    ],
)
def test_a_transfer_takes_as_long_as_its_ring(text, kind, group, expected):
    where = topology.parse(text)
    mesh = mesh_of(where.shape, (where.chips, 1, 1))
    assert roofline.seconds(Collective(kind, GIGABYTE, tuple(group), 1.0), mesh, where) == pytest.approx(expected)


def test_mesh_axes_of_a_transfer():
    mesh = mesh_of((4, 4), (4, 2, 2))

    def axes(*group: int) -> str:
        return roofline.mesh_axes(Collective("all-reduce", 1, group, 1.0), mesh)

    assert (axes(0, 1), axes(0, 2), axes(0, 4, 8, 12), axes(0, 2, 4, 6), axes()) == ("tensor", "fsdp", "data", "data+fsdp", "?")


def test_the_devices_of_a_program_are_those_of_one_slice():
    """FSDP over four devices of which two lie in each slice."""
    mesh = mesh_of((2, 2), (1, 4, 1))
    for device, slice_index in zip(mesh.devices.flat, (0, 1, 0, 1), strict=True):
        device.slice_index = slice_index
    assert roofline.members(Collective("all-gather", 1, (0, 1), 1.0), mesh) == [0, 2]


def test_what_runs_beside_computation_costs_only_what_is_longer():
    times = roofline.Times(compute=3, memory=2, ici=5, dcn=1, device=6, exposed=1, hidden=4)
    assert (times.bound, times.roofline, times.predicted, times.in_line) == ("ici", 5, 7, 12)
    assert roofline.Times(3, 2, 5, 9, device=6, exposed=1, hidden=4).predicted == 10


# ---- input ----


def test_a_host_of_four_v5e_chips_eats_two_thousand_views_a_second():
    """Base with 128 + 128 tokens at 40 % of the peak rate; and what 64 such hosts would read at one view a sample."""
    views = 4 * 0.4 * topology.CHIPS["v5e"].peak / flops.transformer_step(model.TransformerConfig(**zoo.SIZES["base"]), 1, 128, 128)
    assert views == pytest.approx(2000, rel=0.1)
    assert 64 * feed.rate(2000, views_per_sample=1).storage == pytest.approx(237e9, rel=0.005)
    assert feed.rate(2000, views_per_sample=4).storage == feed.rate(2000, views_per_sample=1).storage / 4


@pytest.mark.parametrize(
    ("window", "workers", "times"),
    [(32, 0, 1), (32, 4, 1), (32, 8, 2), (8, 8, 4), (12, 0, 2), (12, 4, 4), (40, 2, 2)],
)
def test_a_sample_is_read_by_every_worker_that_meets_it(window, workers, times):
    """Batches of 8, four views a sample."""
    config = configuration.pretraining()
    config.train.batch_size, config.data.view_window, config.run.workers = 8, window, workers
    config.data.views_per_sample = 4
    assert feed.times_read(config, hosts=2) == times


# ---- plans of a small step, compiled for eight devices of this machine ----


@pytest.fixture
def eight(monkeypatch) -> topology.Topology:
    """A slice whose devices are this machine's; they are all at one place, so transfers take no time."""
    monkeypatch.setattr(topology, "devices", lambda where: jax.devices()[: where.chips])
    monkeypatch.setattr(roofline, "place", lambda device, where: (0, 0))
    return topology.parse("v5e:2x4")


def test_a_plan_adds_up(eight):
    config = tiny_run.pretraining("")
    facts = plan.run(config, eight, price=1.2)
    memory, run, seconds = facts["memory"], facts["run"], facts["seconds"]
    assert facts["parameters"] == memory["parts"]["parameters"] / 4
    assert facts["tokens_per_step"] == 8 * 11
    work, network = facts["flops"], pretrain.transformer_config(config)
    slots = config.mask.input_tokens, config.mask.target_tokens
    assert sum(facts["filled"].values()) < 11
    assert work["model"] + work["empty_slots"] == pytest.approx(flops.transformer_step(network, 8, *slots))
    assert work["empty_slots"] > 0
    assert facts["mfu"] * seconds["predicted"] == pytest.approx(work["model"] / (8 * eight.chip.peak))
    assert memory["total"] == sum(memory["parts"].values()) < memory["available"]
    assert facts["tokens_per_second"] == pytest.approx(88 / seconds["predicted"])
    assert run["steps"] == 32
    assert run["money"] == pytest.approx(run["chip_hours"] * 1.2) == pytest.approx(32 * seconds["predicted"] * 8 / 3600 * 1.2)
    assert facts["input"]["views"] == pytest.approx(8 / seconds["predicted"])  # these devices are one host
    assert "advice" not in facts
    assert json.loads(json.dumps(facts))["chips"] == 8


def test_a_plan_says_that_samples_are_read_again(eight):
    config = tiny_run.pretraining("")
    text = plan.report.render(plan.run(config, eight))
    assert "2 views a sample)" in text
    config.run.workers = 2
    facts = plan.run(config, eight)
    assert facts["input"]["samples"] == facts["input"]["views"]
    assert "2 views a sample, read 2 times: make data.view_window a multiple of batch times run.workers)" in plan.report.render(facts)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train.batch_size", "12", "train.batch_size=12 must be a multiple of 8"),
        ("train.batch_size", "16", "view_window 8 is smaller than batch_size 16"),
        ("mesh.fsdp", "3", "does not cover 8 devices"),
        ("model.attention", "cudnn", "needs an NVIDIA GPU"),
    ],
)
def test_what_pretrain_would_refuse_is_refused(eight, field, value, message):
    config = tiny_run.pretraining("")
    configuration.override(config, field, value)
    with pytest.raises(ValueError, match=message):
        plan.run(config, eight)


def test_a_tokenizer_is_refused(eight):
    with pytest.raises(ValueError, match="one of train-tokenizer; pretrain takes those in configs/pretrain"):
        plan.run(tiny_run.tokenizer_training(""), eight)


def test_a_plan_says_what_is_replicated(eight):
    config = tiny_run.pretraining("")
    config.mesh.update(data=2, fsdp=1, tensor=4)
    config.model.codebooks.LULC = 21
    facts = plan.run(config, eight)
    assert {(r["name"], r["size"], r["axis"]) for r in facts["replicated"]} >= {("vocab", 21, "tensor"), ("heads", 1, "tensor")}
    text = plan.report.render(facts)
    assert "Replicated, because the mesh does not divide them\n" in text
    assert re.search(r"vocab 21 over tensor: \S*token_emb/tok_lulc@224", text)


def test_a_plan_follows_the_samples_that_there_are(eight, tmp_path):
    root = tiny_run.write_shards(tmp_path)
    facts = plan.run(tiny_run.pretraining(root), eight)
    assert facts["input"]["layout"] == "12 samples of config.data.root"
    assert 0 < facts["input"]["storage"] / facts["input"]["samples"] < 1e5  # small tiles


def test_a_step_that_does_not_fit_says_by_how_much_and_what_would_help(eight, tmp_path, monkeypatch, capsys):
    config = tiny_run.pretraining("")
    config.train.batch_size = config.data.view_window = 64
    config.model.update(encoder_depth=4, decoder_depth=4)

    def too_large(one):
        size = int(sum(search.estimator()(one)))
        return None, step.Memory({"everything": size}, available=size - 1000)

    monkeypatch.setattr(step, "compile", too_large)
    path = tiny_run.write_config(tmp_path / "config.py", config)
    assert cli.main(["plan", f"--config={path}", "--topology=v5e:2x4"]) == 1
    text = capsys.readouterr().out
    assert "DOES NOT FIT: too large by 0.00 GiB" in text
    assert "--config.model.remat=full: about 0.0 GiB" in text
    assert "--config.train.accumulate=2: about" in text
    assert "Time of a step" not in text


def test_what_the_compiler_says_of_a_program_that_is_too_large():
    new = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (33.58G) exceeds available HBM."
    old = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm."
    assert step._needed(new, ValueError()) == int(33.58 * GIB)
    assert step._needed(old, ValueError()) == int(20.5 * GIB)
    with pytest.raises(ZeroDivisionError):
        step._needed("INTERNAL: a bug", ZeroDivisionError())


# ---- the search ----


def test_meshes_that_pay():
    config = tiny_run.pretraining("")
    config.model.update(dim=768, num_heads=12)
    shapes = list(search.meshes(config, 16))
    assert {"data": 16, "fsdp": 1, "tensor": 1} in shapes and {"data": 1, "fsdp": 8, "tensor": 2} in shapes
    assert max(shape["fsdp"] for shape in shapes) == 8  # 96 rows of 768
    config.model.update(dim=192, num_heads=3)
    assert {shape["tensor"] for shape in search.meshes(config, 16)} == {1}


def test_a_search_takes_turns_and_leaves_out_what_cannot_fit():
    """First among batch sizes, then among meshes, and only then other policies of the same."""
    settings = [(8, 1, 1, 5), (8, 1, 1, 6), (8, 2, 1, 4), (8, 1, 9, 9), (16, 1, 1, 8), (16, 1, 1, 7), (32, 1, 9, 9)]
    found = [
        search.Candidate({"train.batch_size": batch, "mesh.fsdp": fsdp, "model.remat": n}, size, speed)
        for n, (batch, fsdp, size, speed) in enumerate(settings)
    ]
    assert [c.fields["model.remat"] for c in search.pick(iter(found), available=2, limit=4)] == [4, 1, 5, 2]


@pytest.mark.slow
def test_a_search_ranks(eight, monkeypatch):
    config = tiny_run.pretraining("")
    lines = []
    monkeypatch.setattr(search, "meshes", lambda config, chips: [{"data": chips, "fsdp": 1, "tensor": 1}])
    found = plan.ranked(config, eight, 2, progress=lines.append)
    assert len(found) == len(lines) == 2
    assert found[0]["tokens_per_second"] >= found[1]["tokens_per_second"]
    assert lines[0].startswith("1 of 2: --config.mesh.data=8 --config.mesh.fsdp=1 --config.mesh.tensor=1 --config.train.batch_size=")
    assert len(search.table(found).splitlines()) == 3


# ---- the command, compiled for TPUs ----


def command(*arguments: str) -> tuple[int, dict]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])}
    done = subprocess.run([sys.executable, "-m", "terramind_jax", "plan", "--json", *arguments], env=environment, capture_output=True)
    assert done.returncode in (0, 1), done.stderr.decode()[-2000:]
    return done.returncode, json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "where", "overrides", "axes"),
    [
        ("base", "v5e:4x4", ["--config.train.batch_size=512"], {"data"}),
        ("large", "v5p:2x2x2", ["--config.train.batch_size=256", "--config.mesh.data=1", "--config.mesh.fsdp=8"], {"fsdp"}),
    ],
)
def test_the_real_step_compiles_for_tpus(size, where, overrides, axes):
    pytest.importorskip("libtpu")
    code, facts = command(f"--config=configs/pretrain/{size}.py", f"--topology={where}", *overrides)
    assert code == 0 and facts["memory"]["fits"]
    assert facts["parameters"] == zoo.PARAMETERS[size]
    assert {t["axes"] for t in facts["collectives"] if t["sent"] > 1e6} == axes
    seconds = facts["seconds"]
    assert seconds["roofline"] < seconds["predicted"] <= seconds["in_line"]
    assert 0.05 < facts["mfu"] < 0.7
    # Every gradient is summed or scattered, in two bytes at least: the blocks' in bfloat16, token tables' in float32.
    moved = sum(t["bytes"] for t in facts["collectives"])
    assert 2 * facts["parameters"] < moved


@pytest.mark.slow
def test_a_step_too_large_for_a_tpu_is_refused_with_advice():
    pytest.importorskip("libtpu")
    code, facts = command(
        "--config=configs/pretrain/base.py", "--topology=v5e:2x2", "--config.train.batch_size=4096", "--config.model.remat=none"
    )
    assert code == 1 and not facts["memory"]["fits"]
    assert any("train.accumulate" in line for line in facts["advice"])
