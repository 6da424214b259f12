#!/usr/bin/env bash
# The first hour on the real machine, on every host of it at once: are all devices there and fast, how fast is the storage, what do 50
# steps of the run take, and how does that compare with the plan. From the checkout, in its environment:
#
#   first_hour.sh --config=FILE --workdir=DIR --config.data.root=DIR [OPTION...] [--config.FIELD=VALUE...]
#
#   --config=           the configuration of the run; its fields are overridden as for `pretrain`
#   --workdir=          a work directory of its own, which does not exist yet
#   --topology=         the machine as `plan` calls it, such as v5e:16x16; none: no plan to compare with
#   --num_slices=1      slices of it
#   --steps=50          steps of the run
#   --seconds=20        time to read shards for
#   --threads=32        that read at once on a host
#   --out=first_hour    folder on this host for what was measured, as JSON
#   --dry-run           prints the commands and runs none
#
#   launch/tpu_vm.sh run --bucket=b -- bash launch/first_hour.sh --topology=v5e:4x4 --config=configs/pretrain/base.py --workdir=gs://b/first_hour --config.data.root=/mnt/data/shards
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

first_process() {
  [[ -n $dry_run ]] || python -c 'import json, sys; sys.exit(json.load(open(sys.argv[1]))["process"])' "$out/devices.json"
}

config="" workdir="" root="" topology="" num_slices=1 steps=50 seconds=20 threads=32 out=first_hour dry_run=""
overrides=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --config.data.root=*)
      root=${1#*=}
      overrides+=("$1")
      ;;
    --config.*=*) overrides+=("$1") ;;
    --dry-run) dry_run=1 ;;
    --config=* | --workdir=* | --topology=* | --num_slices=* | --steps=* | --seconds=* | --threads=* | --out=*)
      set_option "$1"
      ;;
    help | --help | -h)
      usage
      exit
      ;;
    *) fail "there is no option $1; see first_hour.sh help" ;;
  esac
  shift
done
[[ -n $config && -n $workdir && -n $root ]] || fail "--config, --workdir and --config.data.root are needed; see first_hour.sh help"

measure=(python "$here/first_hour.py" "--out=$out")
if [[ -z $dry_run ]]; then
  mkdir -p "$out"
  if python -m terramind_jax watch "$workdir" --once >/dev/null; then
    fail "--workdir=$workdir holds a run already; choose another"
  fi
fi
invoke "${measure[@]}" devices "--topology=$topology" "--num_slices=$num_slices"
invoke "${measure[@]}" storage "--root=$root" "--seconds=$seconds" "--threads=$threads"
invoke python -m terramind_jax pretrain "--config=$config" "--workdir=$workdir" "${overrides[@]}" "--config.train.steps=$steps" \
  --config.run.log_every=5 --config.run.eval_every=0 "--config.run.checkpoint_every=$steps" --config.run.progress=false
if first_process; then
  if [[ -n $topology ]]; then
    plan=(python -m terramind_jax plan "--config=$config" "--topology=$topology" "--num_slices=$num_slices" --json "${overrides[@]}")
    if [[ -n $dry_run ]]; then
      invoke "${plan[@]}"
    else
      "${plan[@]}" >"$out/plan.json" || [[ -s $out/plan.json ]] # one that does not fit is a plan too
    fi
  fi
  invoke "${measure[@]}" compare "--workdir=$workdir"
fi
