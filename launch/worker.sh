#!/usr/bin/env bash
# One worker of a machine: installs, starts, watches and stops what every worker runs. `tpu_vm.sh` calls it on all workers at once.
#
#   worker.sh setup [--python=3.12] [--extras=tpu,gcs] [--bucket=NAME] [--mount=/mnt/data]
#   worker.sh start [--flags="GROUP..."] -- COMMAND...    in the background; does nothing if one runs already
#   worker.sh status      run=running, run=exited-CODE, run=died (without an exit code: the machine went down) or run=idle
#   worker.sh log [--lines=100] [--follow]
#   worker.sh stop [--grace=600]                          SIGTERM, on which a run saves; SIGKILL after so many seconds
#
#   --python   version of Python for the environment, .venv in the checkout; fetched if the machine has none
#   --extras   extras of setup.py to install
#   --bucket   Cloud Storage bucket to mount read-only at --mount, for data; none: nothing is mounted
#   --flags    groups of xla_flags.sh
#
# The log, the process and its exit code are kept in $TERRAMIND_STATE, by default ~/.terramind.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/lib.sh
source "$root/launch/lib.sh"
state=${TERRAMIND_STATE:-$HOME/.terramind}

# ---- install ----

setup() {
  [[ -z $bucket ]] || mount_bucket
  if ! python3 -m uv --version >/dev/null 2>&1; then
    python3 -m pip install --user --quiet uv
  fi
  [[ -x $root/.venv/bin/python ]] || python3 -m uv venv --quiet --python "$python" "$root/.venv"
  python3 -m uv pip install --quiet --python "$root/.venv/bin/python" -e "${root}[${extras}]"
  "$root/.venv/bin/python" -m terramind_jax --help >/dev/null
  echo "$(hostname): installed in $root/.venv"
}

# https://cloud.google.com/storage/docs/cloud-storage-fuse/install; nothing in the bucket changes during a run, so listings and
# metadata are cached for good.
mount_bucket() {
  if mountpoint -q "$mount"; then
    return
  fi
  if ! command -v gcsfuse >/dev/null; then
    curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
    echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -q
    sudo apt-get install -q -y gcsfuse
  fi
  sudo mkdir -p "$mount"
  sudo chown "$(id -u):$(id -g)" "$mount"
  gcsfuse -o ro --implicit-dirs --metadata-cache-ttl-secs=-1 --stat-cache-max-size-mb=-1 --type-cache-max-size-mb=-1 \
    --kernel-list-cache-ttl-secs=-1 "$bucket" "$mount"
}

# ---- run ----

# Prints the supervisor's process id if it lives; a number left over from before a reboot may belong to another program by now.
alive() {
  local pid
  pid=$(cat "$state/pid" 2>/dev/null) || return 1
  [[ $(ps -o args= -p "$pid" 2>/dev/null) == *worker.sh*supervise* ]] || return 1
  echo "$pid"
}

start() {
  local pid
  [[ $# -gt 0 ]] || fail "start needs a command: worker.sh start -- COMMAND..."
  mkdir -p "$state"
  if pid=$(alive); then
    echo "$(hostname): runs already, process $pid"
    return
  fi
  rm -f "$state/exit"
  setsid bash "${BASH_SOURCE[0]}" supervise "--flags=$flags" -- "$@" >>"$state/log" 2>&1 </dev/null &
  echo "$!" >"$state/pid"
  echo "$(hostname): started, process $!"
}

# In a session of its own, so that it outlives the connection; passes SIGTERM on and writes down the exit code.
supervise() {
  local code=0 child
  read -ra groups <<<"$flags"
  # shellcheck source=launch/xla_flags.sh
  source "$root/launch/xla_flags.sh" "${groups[@]:-none}"
  cd "$root"
  export PATH="$root/.venv/bin:$PATH"
  export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/jax}" # a restart on this machine compiles nothing
  echo "== $(date -u +%FT%TZ) $(printf '%q ' "$@")"
  "$@" &
  child=$!
  trap 'kill -TERM "$child" 2>/dev/null || true' TERM
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do # a trapped signal ends the wait, not the child
    code=0
    wait "$child" || code=$?
  done
  echo "$code" >"$state/exit"
  echo "== $(date -u +%FT%TZ) exit code $code"
}

status() {
  local pid
  if pid=$(alive); then
    echo "$(hostname) run=running process $pid"
  elif [[ -f $state/exit ]]; then
    echo "$(hostname) run=exited-$(cat "$state/exit")"
  elif [[ -f $state/pid ]]; then
    echo "$(hostname) run=died"
  else
    echo "$(hostname) run=idle"
  fi
}

show_log() {
  local options=(-n "$lines")
  [[ -z $follow ]] || options+=(-F)
  tail "${options[@]}" "$state/log"
}

stop() {
  local pid
  if ! pid=$(alive); then
    status
    return
  fi
  kill -TERM "$pid"
  for ((i = 0; i < grace; i++)); do
    if ! alive >/dev/null; then
      status
      return
    fi
    sleep 1
  done
  kill -KILL -- "-$pid"
  echo "$(hostname) run=died killed after $grace s"
}

# ---- arguments ----

[[ $# -gt 0 ]] || {
  usage >&2
  exit 2
}
action=$1
shift
python=3.12 extras=tpu,gcs bucket="" mount=/mnt/data flags=none lines=100 follow="" grace=600
while [[ $# -gt 0 ]]; do
  case $1 in
    --) shift && break ;;
    --follow) follow=1 ;;
    --python=* | --extras=* | --bucket=* | --mount=* | --flags=* | --lines=* | --grace=*)
      set_option "$1"
      ;;
    *) fail "there is no option $1; see worker.sh help" ;;
  esac
  shift
done
case $action in
  setup | start | supervise | status | stop) "$action" "$@" ;;
  log) show_log ;;
  help | --help | -h) usage ;;
  *) fail "there is no action '$action'; see worker.sh help" ;;
esac
