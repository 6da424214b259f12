#!/usr/bin/env bash
# Keeps a run going on capacity that may be taken away: asks for the machine, installs, starts, and does so again after a preemption
# or a failure, until the run has ended. What continues the run is its last checkpoint, so --workdir must outlive the machine.
#
#   babysit.sh [--poll=60] [--max_failures=3] [--healthy=1800] [--patience=10] [OPTION of tpu_vm.sh...] [--config.FIELD=VALUE...] [-- COMMAND...]
#
#   --poll=60           seconds between looks
#   --max_failures=3    failures in a row, none of them a preemption, after which it gives up
#   --healthy=1800      a run that lasted so many seconds was no failure in a row
#   --patience=10       looks in a row at which workers may not answer; then another machine is asked for
#   --dry-run           prints the gcloud commands of one life of the machine and runs none
#
# Ends with 0 when the run has ended, with 1 when it failed too often, and with 2 at once after an error of use. In each of these
# cases the machine is given back; interrupt it with Ctrl-C and the run goes on alone.
#
#   launch/babysit.sh --type=v5litepod-256 --spot --bucket=my-bucket --config=configs/pretrain/base.py
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

say() {
  echo "$(date -u +%FT%TZ) $*"
}

tpu() {
  local verb=$1
  shift
  "$here/tpu_vm.sh" "$verb" "$@" "${options[@]}" "${rest[@]}"
}

give_up() {
  tpu logs --lines=50 || true
  tpu stop || say "the machine could not be given back: it still costs"
  say "gave up: $1"
  exit "$2"
}

install_and_start() {
  if tpu setup && tpu run; then
    started=$SECONDS
  else
    say "not all workers could be reached"
  fi
}

# What the workers' states, one a line, amount to: `running`, `absent`, `idle` or `exited-0` if it is that on all.
verdict() {
  case $1 in
    running | exited-0 | absent | idle) echo "$1" ;;
    *)
      if grep -qx exited-2 <<<"$1" && [[ $((SECONDS - started)) -lt $healthy ]]; then
        echo error # of use, as `pretrain` tells by this code; later it may also be a storage that fails
      elif grep -qx unreachable <<<"$1"; then
        echo unreachable
      elif ! grep -qvx 'running\|exited-0' <<<"$1"; then
        echo running # its last seconds
      elif grep -qx exited-143 <<<"$1"; then
        echo terminated # by SIGTERM, and saved
      elif grep -q 'exited\|died' <<<"$1"; then
        echo failed
      else
        echo mixed # some run and others have not begun
      fi
      ;;
  esac
}

# Looks once, and does what is due.
look() {
  local report now runs
  report=$(tpu status) || {
    say "no answer: $report"
    return
  }
  now=$(awk '$1 == "machine" { print $2 }' <<<"$report")
  runs=$(awk '$1 == "run" { print $3 }' <<<"$report")
  say "$(tr '\n' ' ' <<<"$report")"
  case $now in
    absent) tpu create || say "not created; trying again" ;;
    FAILED | SUSPENDED) tpu stop ;; # a preempted machine: what is left of it is deleted, the next look asks for another
    ACTIVE) tend "$(verdict "$runs")" ;;
    *) ;; # on its way, or going
  esac
}

tend() {
  if [[ $((SECONDS - started)) -ge $healthy ]]; then
    failures=0
  fi
  case $1 in
    running) silent=0 ;;
    unreachable)
      silent=$((silent + 1))
      if [[ $silent -ge $patience ]]; then
        say "workers did not answer $silent times in a row; another machine is asked for"
        silent=0
        tpu stop
      fi
      ;;
    exited-0)
      tpu stop
      say "the run has ended"
      exit 0
      ;;
    absent | idle) install_and_start ;;
    error) give_up "the run refuses its arguments, its configuration or its data" 2 ;;
    *)
      if [[ $1 == failed ]]; then
        failures=$((failures + 1))
        say "failure $failures of $max_failures in a row"
        [[ $failures -lt $max_failures ]] || give_up "the run failed $failures times in a row" 1
      fi
      tpu stop --keep # those that wait for a dead one
      install_and_start
      ;;
  esac
}

poll=60 max_failures=3 healthy=1800 patience=10 dry_run=""
options=() rest=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --)
      rest=("$@")
      break
      ;;
    --poll=* | --max_failures=* | --healthy=* | --patience=*) set_option "$1" ;;
    --dry-run) dry_run=1 options+=("$1") ;;
    help | --help | -h)
      usage
      exit
      ;;
    --*) options+=("$1") ;;
    *) fail "there is no argument $1; see babysit.sh help" ;;
  esac
  shift
done
started=0 failures=0 silent=0
"$here/tpu_vm.sh" run --dry-run "${options[@]}" "${rest[@]}" >/dev/null # what it would refuse, it refuses before a machine is asked for
if [[ -n $dry_run ]]; then
  for verb in create status setup run stop; do
    tpu "$verb"
  done
  exit
fi
while true; do
  look
  sleep "$poll"
done
