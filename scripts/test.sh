#!/usr/bin/env bash
# Lint, format, types and tests; makes the environment first where there is none. Arguments go to pytest:
#   bash scripts/test.sh
#   bash scripts/test.sh -k cache -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
ruff check
ruff format --check
mypy .
python -m pytest "$@"
