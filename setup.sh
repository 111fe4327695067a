#!/usr/bin/env bash
# Makes the Python environment .env with the pinned packages. Instant when it is there and matches.
#   bash setup.sh                     environment, and the default feature model when ollama is installed
#   bash setup.sh --environment_only  environment only (what _run_pipeline.sh and run_tests.sh need)
#   PYTHON=/path/to/python bash setup.sh   uses that interpreter (3.11 or 3.12)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

feature_model="gemma3:27b"
requirements=(requirements.txt requirements-nodeps.txt constraints.txt)
stamp=".env/installed-requirements.txt"
log=".env/setup.log"

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit 2; }

# Prints "3.11.7" if the interpreter truly runs and is a supported version (a pyenv shim may exist and still fail).
supported_version() {
    "$1" -c 'import sys; sys.version_info[:2] in ((3, 11), (3, 12)) or sys.exit(1); print(sys.version.split()[0])' 2>/dev/null
}

pick_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        supported_version "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON does not run or is not Python 3.11 or 3.12"
        printf '%s' "$PYTHON"
        return
    fi
    for candidate in python3.12 python3.11 python3 python; do
        if supported_version "$candidate" >/dev/null; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or 3.12 found; install one or name it: PYTHON=/path/to/python3.11 bash setup.sh"
}

# What a finished environment records: interpreter, folder (an environment cannot be moved), all requirements.
wanted_stamp() {
    printf 'python %s in %s\n' "$1" "$PWD"
    cat "${requirements[@]}"
}

is_current() {
    local version
    [ -f "$stamp" ] || return 1
    version=$(supported_version .env/bin/python) || return 1
    if [ -n "${PYTHON:-}" ]; then
        [ "$(supported_version "$PYTHON")" = "$version" ] || return 1
    fi
    [ "$(wanted_stamp "$version")" = "$(cat "$stamp")" ]
}

pip_install() {
    .env/bin/python -m pip install --disable-pip-version-check --no-input "$@" >>"$log" 2>&1 || {
        tail -n 15 "$log" >&2
        fail "pip install $* failed; see $log, then run bash setup.sh again"
    }
}

make_environment() {
    local python version
    python=$(pick_python)
    version=$(supported_version "$python")
    if [ -e .env ] && [ ! -f .env/pyvenv.cfg ] && [ -n "$(find .env -type f)" ]; then
        fail "$PWD/.env exists and is not a Python environment; move it away"
    fi
    if [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "python $version in $PWD" ] && [ -x .env/bin/python ]; then
        say "requirements have changed: updating .env (Python $version)"
        rm -f "$stamp"
    else
        # No stamp means that an earlier set-up did not finish: nothing in it is trusted.
        say "making .env with Python $version"
        rm -rf .env.discarded
        [ ! -e .env ] || mv .env .env.discarded
        rm -rf .env.discarded
        "$python" -m venv .env || fail "$python -m venv failed; on Debian and Ubuntu install python3-venv"
    fi
    say "installing packages (the largest is PyTorch; a first time can take several minutes, log: $log)"
    pip_install -c constraints.txt -r requirements.txt
    pip_install --no-deps -r requirements-nodeps.txt
    check_environment
    wanted_stamp "$version" >"$stamp.new"
    mv "$stamp.new" "$stamp"
    say "done; environment in $PWD/.env"
}

# XGBoost and PyTorch need an OpenMP runtime, which macOS does not ship.
check_environment() {
    if ! .env/bin/python -c 'import torch, xgboost' >>"$log" 2>&1; then
        tail -n 5 "$log" >&2
        if [ "$(uname -s)" = Darwin ]; then
            fail "XGBoost or PyTorch cannot be loaded; install OpenMP with: brew install libomp"
        fi
        fail "XGBoost or PyTorch cannot be loaded; see $log"
    fi
}

pull_feature_model() {
    if ! command -v ollama >/dev/null 2>&1; then
        say "ollama is not installed: the download of $feature_model is skipped (only LLM-written features need it)"
    elif ollama show "$feature_model" >/dev/null 2>&1; then
        say "feature model $feature_model is there"
    else
        say "pulling the feature model $feature_model with ollama (about 17 GB)"
        ollama pull "$feature_model" || say "could not pull $feature_model; is the server up? Later: ollama pull $feature_model"
    fi
}

environment_only=false
case "${1:-}" in
    "") ;;
    --environment_only) environment_only=true ;;
    -h | --help) sed -n '2,5p' setup.sh | cut -c3-; exit 0 ;;
    *) fail "unknown option $1; options: --environment_only, --help" ;;
esac

if ! is_current; then
    # One set-up at a time; the lock belongs to this open file, so it ends with the process, however that ends.
    exec 9<setup.sh
    python=$(pick_python)
    "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null || {
        say "waiting for another set-up of this folder"
        "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
    }
    is_current || make_environment
fi
$environment_only || pull_feature_model
