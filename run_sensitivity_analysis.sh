#!/usr/bin/env bash
# The main run at other circuit sizes and flip-rate thresholds, with the summary of stage 11.
#   bash run_sensitivity_analysis.sh --dry_run         print the commands
#   TASKS=arithmetic MODELS=SmolLM2-135M-Instruct BASE_SIZE=2000 SIZES=500 RATES="0.3 0.4" bash run_sensitivity_analysis.sh -- --no_llm
# What is finished is skipped; a failed run does not stop the others, but the exit code is 1 and it is listed at the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash setup.sh --environment_only
exec .env/bin/python -m lib.grid_plans sensitivity "$@"
