#!/usr/bin/env bash
# Do the lower bounds of setup.cfg hold? Every package at the lowest version that is promised, in a virtual environment
# of its own (.venv-lower), and the tests there; those of docs/ are left out. About 25 minutes on one core.
# usage: bash scripts/checks/lower_bounds.sh [ARGUMENTS]    arguments go to pytest, in place of the four parts below
#   PYTHON=python3.12  VENV=FOLDER  WORKERS=8  TORCH=2.11.0
# Not at its bound is torch: its wheels for Linux on PyPI bring CUDA, gigabytes of it, so that the version of
# scripts/constraints.txt is taken, of which there may be one at hand. With TORCH another is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv=${VENV:-.venv-lower}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
. "$venv/bin/activate"
pip=(python -m pip --quiet --disable-pip-version-check)

# Exactly the bounds, and scripts/constraints.txt for what has none; a bound that another package rules out ends here.
torch=${TORCH:-$(sed -n 's/^torch==//p' scripts/constraints.txt)}
sed -nE 's/^ +([a-z0-9_-]+)(\[[a-z]+\])? >= ([0-9.]+).*/\1==\3/p' setup.cfg | sort -u |
  sed "s/^torch==.*/torch==$torch/" >"$venv/bounds.txt"
{
  cat "$venv/bounds.txt"
  # pandas: the version there wants a newer numpy.
  awk -F== 'NR == FNR { bound[tolower($1)]; next } !(tolower($1) in bound) && $1 != "pandas"' \
    "$venv/bounds.txt" scripts/constraints.txt
  echo "pyparsing<3.3  # matplotlib 3.9 warns with a later one, and warnings are errors"
} >"$venv/constraints.txt"
# Flower asks for more than we do of these two.
grep -v -e "^rich==" -e "^pyyaml==" "$venv/constraints.txt" >"$venv/constraints-flower.txt"

export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
failed=0
tests() {
  python -m pytest -q -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@" || failed=1
}

"${pip[@]}" uninstall --yes flwr bitsandbytes deepspeed
"${pip[@]}" install -c "$venv/constraints.txt" setuptools
"${pip[@]}" install -c "$venv/constraints.txt" -e ".[privacy,trackers]" pytest pytest-xdist hypothesis build
if [ $# -gt 0 ]; then
  tests "$@"
  exit $failed
fi
tests tests --ignore=tests/docs --ignore=tests/flower --ignore=tests/scripts
# The extras, one after the other: each is imported by transformers, PEFT or accelerate wherever it is installed.
"${pip[@]}" install -c "$venv/constraints-flower.txt" -e ".[flower]"
tests tests/flower tests/scripts
"${pip[@]}" install -c "$venv/constraints-flower.txt" -e ".[quantised]"
tests tests/launch/test_quantisation.py tests/dirmag/test_dirmag_quantised.py \
  -W "ignore:_check_is_size will be removed:FutureWarning" -W "ignore:MatMul8bitLt:UserWarning"
"${pip[@]}" install -c "$venv/constraints-flower.txt" -e ".[deepspeed]"
tests tests/launch/test_zero.py
exit $failed
