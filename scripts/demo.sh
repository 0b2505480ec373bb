#!/usr/bin/env bash
# The main job on real data: which training digits harm the network? Those with wrong labels are to be found.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" examples

"$python" scripts/demo.py
