#!/usr/bin/env bash
# The grid of tasks x models x run modes, with the comparisons of stages 8 to 10.
#   bash run_mecharule_experiments.sh --dry_run        print the commands
#   TASKS=arithmetic MODELS=SmolLM2-135M-Instruct MODES="spectral_plan fake_targets" bash run_mecharule_experiments.sh -- --no_llm
#   TASKS=arithmetic bash run_mecharule_experiments.sh --runs_only      runs without comparisons: one job of a cluster
# What is finished is skipped; a failed run does not stop the others, but the exit code is 1 and it is listed at the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash setup.sh --environment_only
exec .env/bin/python -m lib.grid_plans experiments "$@"
