#!/usr/bin/env bash
# Stages 6 and 7 of the main run again with donor activations instead of means, and what shifts.
#   bash run_resample_recheck.sh --dry_run             print the commands
#   MODELS=SmolLM2-135M-Instruct CANDIDATE_INTERVENTION=mean-donor bash run_resample_recheck.sh -- --no_llm
# What is finished is skipped; a failed run does not stop the others, but the exit code is 1 and it is listed at the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash setup.sh --environment_only
exec .env/bin/python -m lib.grid_plans resample "$@"
