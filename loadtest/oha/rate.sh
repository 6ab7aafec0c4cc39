#!/usr/bin/env bash
# Streams at a fixed rate, whether or not earlier ones have ended (open loop), with latencies corrected for coordinated
# omission: a request that had to wait for its turn has waited, so the percentiles are those that users would see.
#
#   loadtest/oha/rate.sh [--dry-run]
#
# Environment, beside that of all recipes (lib.sh): RATE (200) in requests a second, DURATION (30s), PROMPT_BYTES (1000).
# CONNECTIONS bounds how many are under way: take more than RATE times the length of a stream in seconds.
set -euo pipefail
# shellcheck source=loadtest/oha/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
begin "$@"
number RATE 200
number PROMPT_BYTES 1000
seconds DURATION 30s
load "streamed, $RATE requests a second for $DURATION" "$(body true "$PROMPT_BYTES")" \
    -z "$DURATION" -c "$CONNECTIONS" -q "$RATE" --latency-correction --wait-ongoing-requests-after-deadline
end
