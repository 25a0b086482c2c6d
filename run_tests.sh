#!/usr/bin/env bash
# Install what is missing, then run the linter and the tests.  Arguments go to pytest: bash run_tests.sh -m "not slow"
set -euo pipefail
cd "$(dirname "$0")"
source scripts/environment.sh
make_environment requirements-test.txt
"$PYTHON" -m ruff check .
exec "$PYTHON" -m pytest "$@"
