#!/usr/bin/env bash
# What the scripts of this folder share; sourced by them, behind their `set -euo pipefail`.

# The comment at the top of the script.
usage() {
  sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "$0"
}

fail() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# The words as one would type them.
quoted() {
  local word words=()
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,+-]+$ ]] && words+=("$word") || words+=("${word@Q}")
  done
  echo "${words[*]}"
}

# Runs a command; with $dry_run, prints it instead.
invoke() {
  if [[ -n ${dry_run:-} ]]; then
    quoted "$@"
  else
    "$@"
  fi
}

# `--name=VALUE` sets the variable `name`.
set_option() {
  local option=${1%%=*}
  printf -v "${option#--}" %s "${1#*=}"
}
