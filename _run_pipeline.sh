#!/usr/bin/env bash
# The whole pipeline, from prompts to neuron-anchored rules; sets itself up first when needed.
#   bash _run_pipeline.sh                                      the built-in example: arithmetic on a packaged small model
#   bash _run_pipeline.sh arithmetic Qwen/Qwen2-1.5B-Instruct [options]
#   bash _run_pipeline.sh --help                               all options
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bash "$root/setup.sh" --environment_only
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.env/bin/python" -m lib.pipeline "$@"
