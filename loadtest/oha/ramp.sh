#!/usr/bin/env bash
# Which rate is too much? Streams at a quarter, half, three quarters and all of RATE, one after the other, each open loop and
# corrected as in rate.sh. The step at which the percentiles rise, or the rate reached stays below the rate asked for, is
# beyond what the gateway and its engines can do.
#
#   loadtest/oha/ramp.sh [--dry-run]
#
# Environment, beside that of all recipes (lib.sh): RATE (400) in requests a second, STEP (15s), PROMPT_BYTES (1000).
set -euo pipefail
# shellcheck source=loadtest/oha/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
begin "$@"
number RATE 400
number PROMPT_BYTES 1000
seconds STEP 15s
for quarters in 1 2 3 4; do
    # shellcheck disable=SC2153 # `number` has assigned it
    rate=$((RATE * quarters / 4 > 0 ? RATE * quarters / 4 : 1))
    load "streamed, $rate requests a second for $STEP" "$(body true "$PROMPT_BYTES")" \
        -z "$STEP" -c "$CONNECTIONS" -q "$rate" --latency-correction --wait-ongoing-requests-after-deadline
done
end
