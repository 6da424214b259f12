#!/usr/bin/env bash
# Entry point of the image: `terramind_jax COMMAND...` under the groups of xla_flags.sh named in $XLA_GROUPS. `exec`, so that SIGTERM
# reaches the run itself.
set -euo pipefail
read -ra groups <<<"${XLA_GROUPS:-none}"
# shellcheck source=launch/xla_flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/xla_flags.sh" "${groups[@]}"
exec python -m terramind_jax "$@"
