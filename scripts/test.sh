#!/usr/bin/env bash
# Lint, types and tests; stops at the first that fails. Arguments go to pytest: bash scripts/test.sh -k cg
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
"$python" -m pytest "$@"
