#!/usr/bin/env bash
# Writes requirements/{dev,run,tools}.lock from pyproject.toml, with uv in a throw-away environment.
#
#   scripts/lock.sh             keep the locked versions where they still fit
#   scripts/lock.sh --upgrade   the newest of everything (what `make lock` runs)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet uv

compile() {
    UV_CUSTOM_COMPILE_COMMAND='make lock' "$folder/venv/bin/uv" --quiet pip compile --no-config \
        --python-platform linux --python-version 3.11 --generate-hashes "$@" pyproject.toml
}

# run.lock is constrained by dev.lock: what the tests ran with is what is installed.
compile "$@" --extra dev --output-file requirements/dev.lock
compile "$@" --constraint requirements/dev.lock --output-file requirements/run.lock
compile "$@" --constraint requirements/dev.lock --extra tools --output-file requirements/tools.lock
