#!/usr/bin/env bash
# Runs the tests (all, or what the arguments of pytest select); sets itself up first when needed.
#   bash run_tests.sh                     everything
#   bash run_tests.sh tests/lib -k rules  some
#   MECHARULE_TEST_DATA=/folder           folder with real data sets for tests; tests that need it are skipped without
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash setup.sh --environment_only
exec .env/bin/python -m pytest "$@"
