#!/usr/bin/env bash
# Install what is missing, then run the linter and the tests.  Arguments go to pytest: bash run_tests.sh -m "not slow"
set -euo pipefail
cd "$(dirname "$0")"
source scripts/environment.sh
make_environment requirements-test.txt
bash scripts/install_sshd.sh
"$PYTHON" -m ruff check .
# One test process a core, one thread each: on few cores faster than one process whose threads wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" -m pytest -n auto --dist loadfile "$@"
