#!/usr/bin/env bash
# A pretraining run on Cloud TPU VMs: one slice or several, asked for as a queued resource.
#
#   tpu_vm.sh create [OPTION...]    asks for the machine; it comes when there is capacity. Nothing happens if it is there already
#   tpu_vm.sh setup  [OPTION...]    copies this checkout to all workers and installs it
#   tpu_vm.sh run    [OPTION...] [--config.FIELD=VALUE...] [-- COMMAND...]
#                                   starts `pretrain` on all workers in the background, or COMMAND; does nothing where one runs
#   tpu_vm.sh logs   [OPTION...]    what one worker printed
#   tpu_vm.sh status [OPTION...]    `machine STATE` and, once it is there, `run WORKERS STATE` for each state that workers are in
#   tpu_vm.sh stop   [OPTION...]    ends the run, which saves a checkpoint, and gives the machine back
#
#   --name=terramind          the queued resource; its nodes are called the same
#   --project=                default: that of `gcloud config`
#   --zone=us-west4-a         where the type is offered and you have quota: https://cloud.google.com/tpu/docs/regions-zones
#   --type=v5litepod-16       accelerator type of one slice: v5litepod-CHIPS, v6e-CHIPS, v5p-CORES (two a chip), v4-CORES
#   --slices=1                slices, joined by the data centre's network
#   --runtime=                image of the workers; default: the one for --type
#   --spot                    cheaper, and may be taken away at any moment; see babysit.sh
#   --reserved                from your reservation
#   --valid_until=            give up if there is no capacity within so long, such as 6h; default: wait
#   --bucket=                 Cloud Storage bucket: mounted read-only at --mount for data, and the place of --workdir
#   --mount=/mnt/data         where the bucket is mounted on each worker
#   --data=                   shards, config.data.root; default: MOUNT/shards if there is a --bucket
#   --config=configs/pretrain/base.py
#   --workdir=                checkpoints and metrics, seen by all workers; default: gs://BUCKET/runs/NAME
#   --flags=                  groups of xla_flags.sh; default: tpu, and tpu_dcn with several slices
#   --extras=tpu,gcs          extras of setup.py to install
#   --python=3.12             version of Python for the workers
#   --worker=0 --node=0       whose log
#   --lines=100 --follow      how much of it, and whether to go on
#   --grace=600               seconds to save a checkpoint in, at stop
#   --keep                    stop ends the run only; the machine stays, and costs
#   --dry-run                 prints the gcloud commands and runs none
#
#   launch/tpu_vm.sh create --type=v5litepod-256 --spot --bucket=my-bucket
#   launch/tpu_vm.sh setup --bucket=my-bucket
#   launch/tpu_vm.sh run --bucket=my-bucket --config.train.batch_size=8192
#   launch/tpu_vm.sh run --bucket=my-bucket -- bash launch/first_hour.sh --topology=v5e:16x16 --workdir=gs://my-bucket/first_hour
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/lib.sh
source "$root/launch/lib.sh"
checkout=terramind_jax # on the workers, in their home directory

# ---- the machine ----

# invoke_tpus VERB ARGUMENT...
invoke_tpus() {
  local verb=$1
  shift
  invoke gcloud compute tpus queued-resources "$verb" "$@" "${where[@]}"
}

on_all() {
  invoke_tpus ssh "$name" --node=all --worker=all "--command=$1"
}

# Its state, `absent` if there is none; anything else that goes wrong ends the script with gcloud's own words.
machine() {
  local out
  if out=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)' 2>&1); then
    echo "$out" | tail -n 1
  elif [[ $out == *NOT_FOUND* ]]; then
    echo absent
  else
    fail "$out"
  fi
}

require_active() {
  [[ -z $dry_run ]] || return 0
  local now
  now=$(machine)
  [[ $now == ACTIVE ]] || fail "$name is $now, not ACTIVE; $1"
}

default_runtime() {
  case $type in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) fail "--type=$type: no image is known for it; name one with --runtime" ;;
  esac
}

create() {
  local now options
  [[ -n $runtime ]] || runtime=$(default_runtime)
  options=("--accelerator-type=$type" "--runtime-version=$runtime" --scopes=https://www.googleapis.com/auth/cloud-platform)
  if [[ $slices -gt 1 ]]; then
    options+=("--node-count=$slices" "--node-prefix=$name")
  else
    options+=("--node-id=$name")
  fi
  [[ -z $spot ]] || options+=(--spot)
  [[ -z $reserved ]] || options+=(--reserved)
  [[ -z $valid_until ]] || options+=("--valid-until-duration=$valid_until")
  if [[ -z $dry_run ]]; then
    now=$(machine)
    if [[ $now != absent ]]; then
      echo "$name exists already and is $now; nothing was created"
      return
    fi
  fi
  invoke_tpus create "$name" "${options[@]}"
}

setup() {
  local archive=${TMPDIR:-/tmp}/$checkout.tgz options=("--python=$python" "--extras=$extras")
  require_active "setup comes when it is; see tpu_vm.sh status"
  [[ -z $bucket ]] || options+=("--bucket=$bucket" "--mount=$mount")
  [[ -n $dry_run ]] || pack "$archive"
  invoke_tpus scp "$archive" "$name:" --node=all --worker=all
  on_all "mkdir -p $checkout && tar -xzf $checkout.tgz -C $checkout && $(quoted bash "$checkout/launch/worker.sh" setup "${options[@]}")"
}

# The files of this checkout as they are, changed and new ones included, without what git ignores.
pack() {
  git -C "$root" ls-files -z --cached --others --exclude-standard |
    tar -C "$root" --null --files-from=- --ignore-failed-read -czf "$1" 2>/dev/null
}

# ---- the run ----

run() {
  local command
  if [[ $# -gt 0 ]]; then
    command=("$@")
  else
    [[ $workdir == gs://* || $workdir == /* ]] ||
      fail "--workdir='$workdir' would lie on each worker's own disk; give one that all see, gs://BUCKET/DIR, or a --bucket"
    command=(python -m terramind_jax pretrain "--config=$config" "--workdir=$workdir")
    [[ -z $data ]] || command+=("--config.data.root=$data")
    command+=(${overrides[@]+"${overrides[@]}"})
  fi
  require_active "a run needs it; see tpu_vm.sh status"
  on_all "$(quoted bash "$checkout/launch/worker.sh" start "--flags=$flags" -- "${command[@]}")"
}

logs() {
  local options=("--lines=$lines")
  [[ -z $follow ]] || options+=(--follow)
  invoke_tpus ssh "$name" "--node=$node" "--worker=$worker" "--command=$(quoted bash "$checkout/launch/worker.sh" log "${options[@]}")"
}

status() {
  local now out ask="bash $checkout/launch/worker.sh status 2>/dev/null || echo run=absent"
  if [[ -n $dry_run ]]; then
    invoke_tpus describe "$name" '--format=value(state.state)'
    on_all "$ask"
    return
  fi
  now=$(machine)
  echo "machine $now"
  [[ $now == ACTIVE ]] || return 0
  out=$(on_all "$ask" 2>&1) || echo "run some unreachable"
  { grep -o 'run=[a-z0-9-]*' <<<"$out" || true; } | sort | uniq -c | awk '{ sub("run=", "", $2); print "run", $1, $2 }'
}

stop() {
  local now=ACTIVE
  [[ -n $dry_run ]] || now=$(machine)
  if [[ $now == absent ]]; then
    echo "there is no $name"
    return
  fi
  if [[ $now == ACTIVE ]]; then
    on_all "bash $checkout/launch/worker.sh stop --grace=$grace" || echo "tpu_vm.sh: not all workers answered" >&2
  fi
  [[ -n $keep ]] || invoke_tpus delete "$name" --force --quiet
}

# ---- arguments ----

[[ $# -gt 0 ]] || {
  usage >&2
  exit 2
}
action=$1
shift
name=terramind project="" zone=us-west4-a type=v5litepod-16 slices=1 runtime="" spot="" reserved="" valid_until=""
bucket="" mount=/mnt/data data="" config=configs/pretrain/base.py workdir="" flags="" extras=tpu,gcs python=3.12
worker=0 node=0 lines=100 follow="" grace=600 keep="" dry_run=""
overrides=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --) shift && break ;;
    --config.*=*) overrides+=("$1") ;;
    --spot | --reserved | --follow | --keep) printf -v "${1#--}" 1 ;;
    --dry-run) dry_run=1 ;;
    --name=* | --project=* | --zone=* | --type=* | --slices=* | --runtime=* | --valid_until=* | --bucket=* | --mount=* | --data=* | \
      --config=* | --workdir=* | --flags=* | --extras=* | --python=* | --worker=* | --node=* | --lines=* | --grace=*)
      set_option "$1"
      ;;
    *) fail "there is no option $1; see tpu_vm.sh help" ;;
  esac
  shift
done
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices=$slices; expected a number of at least 1"
bucket=${bucket#gs://}
if [[ -n $bucket ]]; then
  data=${data:-$mount/shards}
  workdir=${workdir:-gs://$bucket/runs/$name}
fi
where=("--zone=$zone")
[[ -z $project ]] || where+=("--project=$project")
if [[ -z $flags ]]; then
  flags=tpu
  [[ $slices -eq 1 ]] || flags+=" tpu_dcn"
fi
case $action in
  create | setup | run | logs | status | stop) "$action" "$@" ;;
  help | --help | -h) usage ;;
  *) fail "there is no action '$action'; see tpu_vm.sh help" ;;
esac
