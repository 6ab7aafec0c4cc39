#!/usr/bin/env bash
# One of loadtest/k6's scripts, for a few seconds, against a `penstock up` of its own.
#
#   scripts/k6.sh smoke|ramp|spike|soak
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

script=${1:-}
# Whatever the machine is busy with: here it is the scripts that are tried, not the gateway's speed.
export MAX_TTFT=20s MAX_DURATION=50s MIN_TOKENS_PER_S=0.1 VUS=50
case "$script" in
smoke) export VUS=4 ITERATIONS=40 ;;
ramp) export RATE=10 RAMP=3s HOLD=2s ;;
spike) export RATE=2 SPIKE_RATE=20 BEFORE=3s SPIKE=3s RECOVERY=1s AFTER=3s ;;
soak) export RATE=5 DURATION=8s ;;
*)
    echo "usage: scripts/k6.sh smoke|ramp|spike|soak" >&2
    exit 2
    ;;
esac
exec scripts/with_up.py -- .venv/bin/k6 run --no-usage-report --no-color --quiet "loadtest/k6/$script.js"
