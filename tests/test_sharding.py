"""The mesh, the table of logical axes, and the training step on meshes of eight devices against one."""

import functools
import itertools
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny_run
from flax.core import meta
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from terramind_jax import model, sharding, zoo
from terramind_jax.train import optimizer, pretrain, state

# ---- the mesh ----


def test_minus_one_takes_the_remaining_devices():
    assert dict(sharding.make_mesh(data=-1, fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sharding.make_mesh(devices=jax.devices()[2:4]).devices.ravel().tolist() == jax.devices()[2:4]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((3, 1, 1), "does not cover 8 devices"), ((-1, 16, 1), "does not cover"), ((-1, -1, 1), "at most one"), ((0, 1, 1), "positive")],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(*sizes)


def _devices(n, per_host, platform="cpu", per_slice=None):
    """`n` stand-ins for devices, each numbered, with hosts of `per_host` and, if given, slices of `per_slice`."""
    slices = {} if per_slice is None else {"slice_index": None}
    devices = [SimpleNamespace(id=i, process_index=i // per_host, platform=platform, device_kind=platform, **slices) for i in range(n)]
    for i, device in enumerate(devices):
        if per_slice:
            device.slice_index = i // per_slice
    return devices


def _ids(devices, sizes):
    return np.vectorize(lambda device: device.id)(sharding._arrange(sizes, devices))


def test_between_slices_only_data_is_split_then_fsdp():
    devices = _devices(16, per_host=4, per_slice=8)
    shuffled = devices[1::2] + devices[::2]
    of_slice = _ids(shuffled, (4, 2, 2)) // 8
    assert (of_slice == np.array([0, 0, 1, 1])[:, None, None]).all()
    assert (_ids(shuffled, (1, 8, 2)) // 8 == np.repeat([0, 1], 4)[:, None]).all()
    with pytest.raises(ValueError, match=r"A mesh of 1 x 1 x 16 \(data, fsdp, tensor\) cannot be cut .* into 2 slices; make data a mult"):
        sharding._arrange((1, 1, 16), devices)


def test_hosts_of_gpus_without_slices_are_slices():
    devices = _devices(16, per_host=4, platform="gpu")
    assert (_ids(devices[::-1], (4, 4, 1)) // 4 == np.arange(4)[:, None, None]).all()
    assert sharding._islands(_devices(16, per_host=4)) == (False, 1)
    with pytest.raises(ValueError, match="into 4 hosts"):
        sharding._arrange((2, 1, 8), devices)


def test_hosts_share_a_batch_by_rows():
    """Hosts that differ along tensor only load the same share; rows of which two hosts have some in common are refused."""
    devices = np.array(_devices(8, per_host=2))
    assert sharding.shares(devices.reshape(8, 1, 1)) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert sharding.shares(devices.reshape(2, 1, 4)) == {0: 0, 1: 0, 2: 1, 3: 1}
    assert sharding.shares(devices[::-1].reshape(1, 4, 2)) == {3: 0, 2: 1, 1: 2, 0: 3}
    assert sharding.host_share(sharding.make_mesh()) == (0, 1)
    three = np.array(_devices(12, per_host=4))
    with pytest.raises(ValueError, match=r"2 x 1 x 6 \(data, fsdp, tensor\) gives 3 hosts unequal or overlapping parts of a batch; choose"):
        sharding.shares(three.reshape(2, 1, 6))


# ---- logical axes ----


def _boxed(config):
    return jax.eval_shape(functools.partial(model.init, model.TerraMind(config)), jax.random.key(0))


def test_dimensions_that_do_not_divide_are_replicated():
    mesh, boxed = sharding.make_mesh(data=1, fsdp=4, tensor=2), _boxed(model.TransformerConfig(**zoo.SIZES["tiny"]))
    places = sharding.param_shardings(mesh, boxed)["params"]
    assert places["encoder"]["mlp"]["fc1"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert places["decoder_token_emb"]["tok_dem@224"].spec == P("tensor", "fsdp")
    assert places["decoder_token_emb"]["tok_lulc@224"].spec == P(None, "fsdp")  # 4,375 codes are odd
    assert places["encoder"]["attn"]["qkv"]["kernel"].spec == P(None, "fsdp", None, None, None)  # three heads
    found = sharding.replicated_dimensions(mesh, boxed)
    assert ("params/decoder_token_emb/tok_lulc@224", "vocab", 4375, "tensor") in found
    assert {(name, size, axis) for _, name, size, axis in found} == {("vocab", 4375, "tensor"), ("heads", 3, "tensor")}
    assert not sharding.replicated_dimensions(sharding.make_mesh(data=2, fsdp=4), boxed)


def test_the_moments_and_the_average_lie_as_the_parameters_do():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    init = functools.partial(model.init, model.TerraMind(model.TransformerConfig(**zoo.SIZES["small"])))
    shapes, _ = state.abstract(init, optimizer.adamw(ConfigDict({"betas": (0.9, 0.95)})), mesh, ema=True)
    params, *others = (jax.tree.map(lambda x: x.sharding, t) for t in (shapes.params, shapes.ema, shapes.opt_state.mu, shapes.opt_state.nu))
    assert all(other == params for other in others)
    split = sum(x.size * 4 for x in jax.tree.leaves(shapes.params) if not x.sharding.is_fully_replicated)
    assert split > 0.99 * sum(x.size * 4 for x in jax.tree.leaves(shapes.params))


def _box(*names):
    return {"kernel": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((8,) * len(names), np.float32), names)}


def test_two_dimensions_on_one_mesh_axis_are_refused():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    message = r"The dimensions 'heads' and 'mlp' of kernel lie on one mesh axis, 'tensor'; give one of them a name on another axis\."
    with pytest.raises(ValueError, match=message):
        sharding.param_shardings(mesh, _box("embed", "heads", "mlp"))
    with pytest.raises(ValueError, match="kernel has the logical axis 'width'; sharding.RULES knows batch, embed"):
        sharding.param_shardings(mesh, _box("embed", "width"))


# ---- the step on a mesh ----

STEPS = 3
MESHES = {"data 8": (8, 1, 1), "fsdp 8": (1, 8, 1), "fsdp 4, tensor 2": (1, 4, 2), "data 2, fsdp 2, tensor 2": (2, 2, 2)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A configuration whose vocabulary of 25 and hidden width of 131 no tensor axis divides, its first batches, and its start."""
    config = tiny_run.pretraining(tiny_run.write_shards(tmp_path_factory.mktemp("shards")), steps=100)
    config.model.update(dim=48, num_heads=2, gated_mlp=True, mlp_ratio=4.1, encoder_depth=2, decoder_depth=2)
    with config.unlocked():
        config.model.codebooks = ConfigDict({"DEM": 30, "LULC": 25})
    config.data.update(inputs=("DEM", "LULC"), patch_group=2, view_window=32)
    config.train.batch_size = 32
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    index = pretrain.open_tokenized(config, "train")
    batches = jax.device_get(list(itertools.islice(pretrain.device_batches(config, index, mesh), STEPS)))
    return config, batches, _start(config)


def _start(config):
    """State and buffers off their initial zeros and ones, as after some training."""

    @jax.jit
    def make():
        module = model.TerraMind(pretrain.transformer_config(config))
        made = meta.unbox(model.init(module, jax.random.key(0)))
        leaves, tree = jax.tree.flatten(made)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        made = tree.unflatten([x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])
        return state.create(made["params"], optimizer.adamw(config.optimizer)), made["buffers"]

    return jax.device_get(make())


def _steps(run, mesh, **changes):
    """Loss, first moments and parameters after each step, and the last state."""
    config, batches, start = run
    config = config.copy_and_resolve_references()
    for field, value in changes.items():
        group, name = field.split("__")
        config[group][name] = value
    pretrain.check_batch(config, mesh)
    module, tx = model.TerraMind(pretrain.transformer_config(config)), optimizer.adamw(config.optimizer)
    layout = jax.tree.map(lambda x: x.sharding, state.abstract(functools.partial(model.init, module), tx, mesh))
    train_state, buffers = jax.device_put(start, layout)
    step = pretrain.make_step(config, module, tx, mesh, layout[0])
    after = []
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        for batch in batches:
            before = train_state
            train_state, metrics = step(train_state, buffers, sharding.to_global(batch, mesh))
            # Later states have copies on the host, which on a CPU are the buffers themselves.
            assert after or all(x.is_deleted() for x in jax.tree.leaves(before)), "the state is donated"
            after.append(jax.device_get((metrics["loss"], train_state.opt_state.mu, train_state.params)))
    assert step._cache_size() == 1
    assert jax.tree.map(lambda x: x.sharding, train_state) == layout[0]
    return after


@pytest.fixture(scope="module")
def alone(run):
    return _steps(run, sharding.make_mesh(devices=jax.devices()[:1]))


def _worst(got, expected):
    """Greatest relative differences over the steps: of losses, of gradients (as Adam's first moments hold them) and of parameters."""
    loss = max(abs(a[0] - b[0]) / abs(b[0]) for a, b in zip(got, expected, strict=True))
    return loss, *(max(max(tiny_run.differences(a[i], b[i])) for a, b in zip(got, expected, strict=True)) for i in (1, 2))


# A compiled step is 6 seconds of a core, so the fast tests have both switches on everywhere and both off once.
VARIANTS = [(name, *switches) for name in MESHES for switches in ((2, "full"), (1, "none"), (2, "none"), (1, "full"), (2, "dots"))]
FAST = {*((name, 2, "full") for name in MESHES), ("data 2, fsdp 2, tensor 2", 1, "none")}


@pytest.mark.parametrize(("mesh", "accumulate", "remat"), [pytest.param(*v, marks=() if v in FAST else pytest.mark.slow) for v in VARIANTS])
def test_a_mesh_changes_no_number(run, alone, mesh, accumulate, remat):
    got = _steps(run, sharding.make_mesh(*MESHES[mesh]), train__accumulate=accumulate, model__remat=remat)
    loss, gradients, parameters = _worst(got, alone)
    print(f"loss {loss:.1e}, gradients {gradients:.1e}, parameters {parameters:.1e}")
    assert loss < 1e-6 and gradients < 1e-5 and parameters < 1e-5


def test_one_device_accumulates_to_the_same(run, alone):
    config, batches, _ = run
    counts = [np.bincount(b["target_modality"].ravel(), minlength=2)[:2] for b in batches]
    halves = [np.bincount(b["target_modality"][::2].ravel(), minlength=2)[:2] for b in batches]
    assert any((2 * half != whole).any() for half, whole in zip(halves, counts, strict=True))  # else no weight could be wrong
    got = _steps(run, sharding.make_mesh(devices=jax.devices()[:1]), train__accumulate=4)
    loss, gradients, parameters = _worst(got, alone)
    assert loss < 1e-6 and gradients < 1e-5 and parameters < 1e-5


def test_a_microbatch_keeps_groups_whole_and_samples_on_their_device(run):
    """Rows 4i, 4i+1 and group 2i go to the first of two, and so for every device that held them."""
    batch = {"bad": np.arange(16), "patches": {"x": np.arange(8)[:, None]}}
    parts = pretrain.microbatches(batch, 2)
    assert parts["bad"].tolist() == [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]
    assert parts["patches"]["x"][..., 0].tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    mesh = sharding.make_mesh(data=4, devices=jax.devices()[:4])
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        compiled = jax.jit(functools.partial(pretrain.microbatches, k=2)).lower(sharding.to_global(batch, mesh)).compile()
    assert not any(kind in compiled.as_text() for kind in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
