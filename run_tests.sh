#!/usr/bin/env bash
# Installs what is missing, then runs the linter and the tests.  Arguments go to pytest: bash run_tests.sh -m "not slow"
set -euo pipefail
cd "$(dirname "$0")"
source scripts/environment.sh
make_environment requirements-test.txt
bash scripts/install_sshd.sh
bash scripts/install_slurm.sh
"$PYTHON" -m ruff check .
# One process per core with one thread each: on few cores this is faster than one process with several threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" -m pytest -n auto --dist loadfile "$@"
