#!/usr/bin/env bash
# The whole check, setting everything up first: lint, format, types, tests. Arguments go to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment test
# One thread a process: tests run side by side, and threads that fight for cores are slower than none.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
ruff check .
ruff format --check .
mypy -p fedlora_hf
python -m pytest -q -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
