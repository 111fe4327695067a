#!/usr/bin/env bash
# The paper's tables, and the comparison of methods, from finished or downloaded results.
#   bash run_paper_tables_generation.sh [DATA_ROOT or .zip] [OUT_DIR] [options]     default: ./data ./paper_tables
#   bash run_paper_tables_generation.sh --help                                      all options
# Without ./data, ./data.zip is read.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bash "$root/setup.sh" --environment_only
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.env/bin/python" -m lib.grid_plans tables "$@"
