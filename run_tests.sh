#!/usr/bin/env bash
# Runs the tests (all, or what the arguments of pytest select); sets itself up first when needed.
#   bash run_tests.sh                     everything
#   bash run_tests.sh tests/lib -k rules  some
#   MECHARULE_TEST_WORKERS=2              processes that share the tests, file by file (default 2; 0 for a debugger)
#   MECHARULE_TEST_DATA=/folder           folder with real data sets for tests; tests that need it are skipped without
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash setup.sh --environment_only
# In the order of the tree: the end-to-end runs, which take longest, come first.
exec .env/bin/python -m pytest -n "${MECHARULE_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
