# Sourced by demo.sh and test.sh: a virtual environment in .venv with the pinned packages, made when it is missing.
# usage: prepare_environment [EXTRA]    e.g. prepare_environment test
prepare_environment() {
  cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
  local python=${PYTHON:-python3} wanted=".${1:+[$1]}"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$python is older than Python 3.11; set PYTHON to a newer one" >&2
    exit 2
  }
  [ -x .venv/bin/python ] || "$python" -m venv .venv || exit 1
  # Installing again is skipped while neither the packages asked for nor their pins have changed.
  local stamp=.venv/installed-${1:-base} state
  state=$(cat setup.cfg pyproject.toml scripts/constraints.txt | cksum)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$state" ]; then
    echo "installing into .venv (some minutes the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt setuptools || exit 1
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e "$wanted" || exit 1
    echo "$state" >"$stamp"
  fi
  . .venv/bin/activate
}
