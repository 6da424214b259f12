"""What a compiled program does: loops, traffic and transfers, against programs of which these are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from terramind_jax.plan import hlo, roofline, step, topology
from terramind_jax.plan.collectives import Collective, collectives

MESH = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def compiled(function, *shapes, inputs, outputs) -> hlo.Program:
    """`function` of one device's blocks of float32 arrays, compiled for the mesh; `shapes` are of the whole arrays."""
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(MESH, spec)) for s, spec in zip(shapes, inputs, strict=True)]
    mapped = jax.shard_map(function, mesh=MESH, in_specs=inputs, out_specs=outputs, check_vma=False)
    return hlo.parse(jax.jit(mapped).lower(*arguments).compile().as_text())


def only(program: hlo.Program, unknown: float = 1.0) -> Collective:
    (one,) = collectives(program, 8, unknown=unknown)
    return one


@pytest.mark.parametrize(
    ("function", "outputs", "kind", "size", "group", "sent"),
    [
        (lambda x: jax.lax.psum(x, ("a", "b")), P(), "all-reduce", 4000, range(8), 2 * 4000 * 7 / 8),
        (lambda x: jax.lax.psum(x, "b"), P("a"), "all-reduce", 4000, range(4), 2 * 4000 * 3 / 4),
        (lambda x: jax.lax.psum(x, "a"), P("b"), "all-reduce", 4000, (0, 4), 4000),
        (lambda x: jax.lax.all_gather(x, "b", tiled=True), P("a"), "all-gather", 16000, range(4), 16000 * 3 / 4),
        (lambda x: jax.lax.psum_scatter(x, "b", tiled=True), P(("a", "b")), "reduce-scatter", 4000, range(4), 4000 * 3 / 4),
        (lambda x: jax.lax.all_to_all(x, "b", 0, 0, tiled=True), P(("a", "b")), "all-to-all", 4000, range(4), 4000 * 3 / 4),
        (lambda x: jax.lax.ppermute(x, "b", [(0, 1), (1, 0)]), P(("a", "b")), "collective-permute", 4000, (0, 1), 4000),
    ],
)
def test_transfers_are_read_exactly(function, outputs, kind, size, group, sent):
    one = only(compiled(function, (8000,), inputs=(P(("a", "b")),), outputs=outputs))
    assert (one.kind, one.bytes, one.group, one.times) == (kind, size, tuple(group), 1)
    assert one.sent == pytest.approx(sent)


def loop(lengths: tuple[int, ...]):
    """Sums over the devices inside of nested loops."""

    def body(x, _):
        return (jax.lax.psum(x, "b") if len(lengths) == 1 else loop(lengths[1:])(x)) * 0.5, None

    return lambda x: jax.lax.scan(body, x, None, length=lengths[0])[0]


@pytest.mark.parametrize("lengths", [(5,), (3, 4)])
def test_a_transfer_in_a_loop_counts_as_often_as_it_turns(lengths):
    program = compiled(loop(lengths), (8000,), inputs=(P(("a", "b")),), outputs=P(("a", "b")))
    assert only(program).times == np.prod(lengths)


def test_a_loop_whose_length_depends_on_data_counts_as_told():
    def function(x, n):
        return jax.lax.fori_loop(0, n[0].astype(int), lambda i, y: jax.lax.psum(y, "b") * 0.5, x)

    program = compiled(function, (8000,), (1,), inputs=(P(("a", "b")), P()), outputs=P(("a", "b")))
    assert only(program).times == 1
    assert only(program, unknown=7.5).times == 7.5


# As TPUs have them: a loop that the compiler has unrolled by two, a reduce-scatter in a fusion, a gather dealt out over a chain of
# fusions of which the first counts, a transfer between slices, and a sum over one axis of a named mesh.
TPU = """\
HloModule jit_step, is_scheduled=true

%all-reduce-scatter (input: bf16[768,1536]) -> bf16[192,1536] {
  %input = bf16[768,1536]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.1 = bf16[768,1536]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  %constant.9 = s32[] constant(0)
  ROOT %slice = bf16[192,1536]{1,0} dynamic-slice(%all-reduce.1, %constant.9, %constant.9), dynamic_slice_sizes={192,1536}
}

%first (param: bf16[96,768]) -> bf16[384,768] {
  %param = bf16[96,768]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[384,768]{1,0} all-gather(%param), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
}

%later (param.2: bf16[96,768]) -> bf16[384,768] {
  %param.2 = bf16[96,768]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[384,768]{1,0} all-gather(%param.2), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
}

%cond (state: (u32[], bf16[768,1536])) -> pred[] {
  %bound = u32[]{:T(128)} constant(4), metadata={op_name="while"}
  %state = (u32[]{:T(128)}, bf16[768,1536]{1,0:T(8,128)(2,1)}) parameter(0)
  %counter = u32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %bound), direction=LT
}

%body (state.2: (u32[], bf16[768,1536])) -> (u32[], bf16[768,1536]) {
  %two = u32[]{:T(128)} constant(2)
  %state.2 = (u32[]{:T(128)}, bf16[768,1536]{1,0:T(8,128)(2,1)}) parameter(0)
  %counter.2 = u32[]{:T(128)} get-tuple-element(%state.2), index=0
  %value = bf16[768,1536]{1,0:T(8,128)(2,1)} get-tuple-element(%state.2), index=1
  %next = u32[]{:T(128)} add(%counter.2, %two)
  %fusion.1 = bf16[192,1536]{1,0} fusion(%value), kind=kCustom, calls=%all-reduce-scatter, backend_config={"estimated_cycles":"1000"}
  ROOT %tuple = (u32[]{:T(128)}, bf16[768,1536]{1,0:T(8,128)(2,1)}) tuple(%next, %value)
}

ENTRY %main (p: bf16[768,1536], q: bf16[96,768]) -> bf16[384,768] {
  %p = bf16[768,1536]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[96,768]{1,0} parameter(1)
  %zero = u32[]{:T(128)} constant(0)
  %start = (u32[]{:T(128)}, bf16[768,1536]{1,0:T(8,128)(2,1)}) tuple(%zero, %p)
  %while = (u32[]{:T(128)}, bf16[768,1536]{1,0:T(8,128)(2,1)}) while(%start), condition=%cond, body=%body
  %async-collective-start = bf16[384,768]{1,0} fusion(%q), kind=kCustom, calls=%first
  %fusion.2 = bf16[384,768]{1,0} fusion(%q), kind=kOutput, calls=%later
  %copy-start = (bf16[96,768]{1,0}, bf16[96,768]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%q)
  %token = token[] after-all()
  %send = (bf16[96,768]{1,0}, u32[], token[]) send(%q, %token), is_host_transfer=true, \
frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}, backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %all-reduce.2 = bf16[384,768]{1,0} all-reduce(%fusion.2), \
replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}, to_apply=%add
}
"""


def test_forms_that_only_tpus_have():
    scatter, gather, between, reduce = collectives(hlo.parse(TPU), 8, slices=2)
    assert (scatter.kind, scatter.bytes, scatter.times, scatter.group) == ("reduce-scatter", 768 * 1536 * 2, 2, (0, 2, 4, 6))
    assert (gather.kind, gather.bytes, gather.times, gather.hidden) == ("all-gather", 384 * 768 * 2, 1, True)
    assert (between.kind, between.between_slices, between.sent) == ("all-reduce", True, 96 * 768 * 2)
    assert (reduce.kind, reduce.group, reduce.hidden) == ("all-reduce", (0, 2, 4, 6), False)


def test_cycles_count_as_often_as_the_loop_turns():
    cycles = [(i.name, i.cycles, times) for _, i, times in hlo.executed(hlo.parse(TPU)) if i.cycles is not None]
    assert cycles == [("fusion.1", 1000, 2)]  # the largest integer stands for no estimate


def test_a_part_of_a_mesh_axis():
    text = "replica_groups=mesh['x'=8,'y'=2] {'x':(2)2}"
    program = hlo.parse(TPU.replace("replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}", text))
    assert collectives(program, 16)[-1].group == (0, 4)  # x is 2 x 2 x 2, and its middle part is meant


def traffic(program: hlo.Program) -> float:
    return sum(times * hlo.traffic(program, computation, instruction) for computation, instruction, times in hlo.executed(program))


def test_traffic_is_what_is_read_and_written():
    x = jax.ShapeDtypeStruct((1000, 256), jnp.float32)
    once = hlo.parse(jax.jit(lambda x: x * 2 + 1).lower(x).compile().as_text())
    assert traffic(once) == 2 * x.size * 4

    def rows(x):  # reads every row once, not the whole array at every turn
        return jax.lax.scan(lambda total, row: (total + jnp.sin(row), None), jnp.zeros(256), x)[0]

    assert traffic(hlo.parse(jax.jit(rows).lower(x).compile().as_text())) < 6 * x.size * 4


def test_memory_of_a_tpu_chip_costs_no_traffic():
    program = hlo.parse(TPU)
    entry = program.computations["main"]
    assert hlo.traffic(program, entry, entry.instructions["copy-start"]) == 96 * 768 * 2


def test_gradients_of_a_training_step_are_summed_once():
    """Data parallelism alone: what is summed over the devices are the gradients of all parameters, and a few numbers."""
    one = step.prepare(tiny_run.pretraining(""), topology.parse("v5e:2x4"), devices=jax.devices())
    text, memory = step.compile(one)
    transfers = collectives(hlo.parse(text), 8)
    gradients = sum(x.size * 4 for x in jax.tree.leaves(one.state.params))
    assert {t.kind for t in transfers} == {"all-reduce"}
    assert {roofline.mesh_axes(t, one.mesh) for t in transfers} == {"data"}
    assert sum(t.bytes * t.times for t in transfers) == pytest.approx(gradients, rel=0.02)
    assert memory.parts["parameters"] == gradients
    assert memory.parts["optimizer state"] == 2 * gradients + 4


def test_sharded_parameters_are_gathered():
    config = tiny_run.pretraining("")
    config.mesh.update(data=2, fsdp=4)
    with pytest.warns(UserWarning, match="mesh.fsdp=4 leaves 16 rows"):
        one = step.prepare(config, topology.parse("v5e:2x4"), devices=jax.devices())
    text, memory = step.compile(one)
    axes = {(t.kind, roofline.mesh_axes(t, one.mesh)) for t in collectives(hlo.parse(text), 8)}
    assert ("all-gather", "fsdp") in axes
    assert any(axes_of == "data" for _, axes_of in axes)
    whole = sum(x.size * 4 for x in jax.tree.leaves(one.state.params))
    assert whole / 4 < memory.parts["parameters"] < 0.3 * whole


def test_what_waits_for_the_backward_pass_grows_with_the_batch_and_shrinks_with_remat():
    config = tiny_run.pretraining("")
    config.data.patch_group = 2
    sizes = {}
    for remat in ("none", "dots", "full"):
        config.model.remat = remat
        one = step.prepare(config, topology.parse("v5e:1x1"), devices=jax.devices()[:1])
        sizes[remat] = [step.residuals(one.module, one.config, rows) for rows in (2, 4, 8)]
    assert sizes["none"] > sizes["dots"] > sizes["full"]
    for two, four, eight in sizes.values():
        assert eight - four == pytest.approx(2 * (four - two), rel=1e-3)
