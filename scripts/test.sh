#!/usr/bin/env bash
# Sets up a virtual environment, then runs all tests, two at a time: a quarter of an hour on two cores.
# Arguments go to pytest: ./scripts/test.sh -m slow
source "$(dirname "$0")/setup.sh" test
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
ruff check .
ruff format --check .
[ $# -gt 0 ] || set -- -m "not slow" --numprocesses=2 --dist=worksteal
exec python -m pytest "$@"
