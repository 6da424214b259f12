#!/usr/bin/env bash
# Named groups of compiler flags, added to the environment of what is started next:
#
#   source launch/xla_flags.sh GROUP...     sets them in this shell
#   launch/xla_flags.sh GROUP...            prints them as `export` lines, for a container's environment
#   launch/xla_flags.sh                     lists the groups
#
# TPU flags go into LIBTPU_INIT_ARGS, those of GPU and CPU into XLA_FLAGS; what is set there already is kept. None is needed for
# right results. A wrong name ends the process as it starts, so tests/test_launch_flags.py gives every flag to the compilers that are
# installed. Measure before keeping one: launch/first_hour.sh, with and without.
#
# Sources: [guide] https://openxla.org/xla/flags_guidance, [maxtext] benchmarks/xla_flags_library.py in AI-Hypercomputer/maxtext,
# [jax] https://docs.jax.dev/en/latest/gpu_performance_tips.html,
# [nvidia] https://docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance

_xla_groups="none tpu tpu_fsdp tpu_dcn tpu_vmem tpu_sparsecore tpu_memory tpu_check gpu gpu_fsdp gpu_deterministic host8"

# Appends the flags $2... to the exported variable $1, each once.
_xla_add() {
  local variable=$1 flag
  shift
  for flag in "$@"; do
    case " ${!variable:-} " in
      *" $flag "*) ;;
      *) export "$variable=${!variable:+${!variable} }$flag" ;;
    esac
  done
}

_xla_group() {
  case $1 in
    none) ;;

    # Pure data parallelism on one slice. Gradients are summed while the backward pass goes on: all-reduces become asynchronous, which
    # by default they are not [guide, v5e/Async], run over several steps of the program, and beside matrix products [maxtext,
    # CF_FOR_ALL_REDUCE]. Of base's step on v5e:4x4 and v5e:16x16 libtpu 0.0.42.1 still schedules none beside computation, and `plan`
    # sees no gain (90.0 instead of 89.4 ms on v5e:16x16).
    tpu)
      _xla_add LIBTPU_INIT_ARGS \
        --xla_tpu_enable_async_collective_fusion=true \
        --xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true \
        --xla_tpu_enable_async_collective_fusion_multiple_steps=true \
        --xla_tpu_overlap_compute_collective_tc=true \
        --xla_enable_async_all_reduce=true
      ;;

    # mesh.fsdp > 1: the same for the gathering of weights, layer by layer [guide, v5e/Async; maxtext, CF_FOR_ALL_GATHER], and the next
    # layer's weights are gathered while this one computes [guide, Pipelining]. Holds one layer more in memory. For that step on a mesh
    # of data 2 x fsdp 8 the compiler makes 12 gathers asynchronous instead of 2.
    tpu_fsdp)
      _xla_add LIBTPU_INIT_ARGS \
        --xla_tpu_enable_async_collective_fusion=true \
        --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true \
        --xla_tpu_enable_async_collective_fusion_multiple_steps=true \
        --xla_tpu_overlap_compute_collective_tc=true \
        --xla_enable_async_all_gather=true \
        --xla_should_allow_loop_variant_parameter_in_chain=enabled \
        --xla_should_add_loop_invariant_op_in_chain=enabled \
        --xla_tpu_enable_ici_ag_pipelining=true
      ;;

    # Several slices: all-reduces across the data centre's network overlap with compute, also those whose sizes differ, which costs
    # memory [guide, TPU XLA flags; maxtext, DATA_PARALLEL_OVERLAP].
    tpu_dcn)
      _xla_add LIBTPU_INIT_ARGS \
        --xla_tpu_enable_data_parallel_all_reduce_opt=true \
        --xla_tpu_data_parallel_opt_different_sized_ops=true
      ;;

    # v6e: more of the chip's scratchpad for the operation that runs, less for fetching the next, where compute is the bound
    # [guide, Compute centric; maxtext, DENSE_VMEM_LIMIT_FLAG].
    tpu_vmem)
      _xla_add LIBTPU_INIT_ARGS --xla_tpu_scoped_vmem_limit_kib=98304
      ;;

    # v5p and v6e, instead of `tpu`: all-reduces run on the SparseCores, which v5e has not, and leave the matrix units alone
    # [maxtext, ENABLE_SPARSECORE_OFFLOADING_FOR_ALL_REDUCE].
    tpu_sparsecore)
      _xla_add LIBTPU_INIT_ARGS \
        --xla_tpu_enable_async_collective_fusion_fuse_all_reduce=false \
        --xla_tpu_enable_sparse_core_collective_offload_all_reduce=true \
        --xla_tpu_use_tc_device_shape_on_sc=true \
        --xla_sc_enable_instruction_fusion=false \
        --xla_sc_disjoint_spmem=false \
        --xla_sc_disable_megacore_partitioning=true
      ;;

    # `plan` says that a step misses the chip's memory by a few percent: up to five schedules are tried, each allowed less memory
    # [guide, Memory flags], at the cost of overlap. A smaller batch, train.accumulate or model.remat come first.
    tpu_memory)
      _xla_add LIBTPU_INIT_ARGS --xla_latency_hiding_scheduler_rerun=5
      ;;

    # A loss that spikes on one host only: every program runs again and results are compared, on a difference the chip halts
    # [maxtext, SDC_CHECKER]. Several times slower; for an hour, not for a run.
    tpu_check)
      _xla_add LIBTPU_INIT_ARGS \
        --xla_tpu_enable_sdc_checker=true \
        --xla_tpu_sdc_check_halt_on_detection=true \
        --xla_tpu_sdc_replicate_llo=true \
        --xla_tpu_sdc_check_repeat_count=5
      ;;

    # GPUs, data parallel: collectives overlap with compute [jax, nvidia]; gradients are summed in pieces of 128 MiB, so that the first
    # is under way before the backward pass ends; JAX takes 90 % of the memory instead of 75 % [nvidia].
    gpu)
      _xla_add XLA_FLAGS \
        --xla_gpu_enable_latency_hiding_scheduler=true \
        --xla_gpu_all_reduce_combine_threshold_bytes=134217728
      export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"
      ;;

    # mesh.fsdp > 1: weights of the next layer are gathered while this one computes, a layer's in one piece, and the loop over layers is
    # unrolled by two so that its buffers need no copies [guide, GPU XLA flags; nvidia].
    gpu_fsdp)
      _xla_add XLA_FLAGS \
        --xla_gpu_enable_latency_hiding_scheduler=true \
        --xla_gpu_enable_pipelined_all_gather=true \
        --xla_gpu_enable_pipelined_reduce_scatter=true \
        --xla_gpu_enable_while_loop_double_buffering=true \
        --xla_gpu_all_gather_combine_threshold_bytes=134217728 \
        --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
      export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"
      ;;

    # Two runs that must agree to the last bit: no atomics in scatters, no choice of kernels by timing. Slower.
    gpu_deterministic)
      _xla_add XLA_FLAGS --xla_gpu_deterministic_ops=true
      ;;

    # A machine without accelerators: eight devices of its CPU, to try a mesh.
    host8)
      _xla_add XLA_FLAGS --xla_force_host_platform_device_count=8
      ;;

    *)
      echo "xla_flags.sh: there is no group '$1'; the groups are: $_xla_groups" >&2
      return 2
      ;;
  esac
}

if [[ "${BASH_SOURCE[0]}" != "$0" ]]; then
  for _xla_name in "$@"; do
    _xla_group "$_xla_name" || return
  done
  unset _xla_name
elif [[ $# -eq 0 ]]; then
  tr ' ' '\n' <<<"$_xla_groups"
else
  set -euo pipefail
  for _xla_name in "$@"; do
    _xla_group "$_xla_name"
  done
  for _xla_name in LIBTPU_INIT_ARGS XLA_FLAGS XLA_PYTHON_CLIENT_MEM_FRACTION; do
    [[ -z "${!_xla_name:-}" ]] || echo "export $_xla_name=\"${!_xla_name}\""
  done
fi
