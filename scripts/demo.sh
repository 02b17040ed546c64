#!/usr/bin/env bash
# Run `fedlora demo`, setting everything up first: twelve clients, four of them contaminated; a minute or two.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment
exec fedlora demo "$@"
