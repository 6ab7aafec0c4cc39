#!/usr/bin/env bash
# Streams, as fast as the connections go. oha counts a stream as one response: its latency is the whole stream's; of the time
# to the first token it says nothing.
#
#   loadtest/oha/stream.sh [--dry-run]
#
# Environment, beside that of all recipes (lib.sh): REQUESTS (2000), PROMPT_BYTES (1000).
set -euo pipefail
# shellcheck source=loadtest/oha/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
begin "$@"
number REQUESTS 2000
number PROMPT_BYTES 1000
load "streamed, $REQUESTS requests on $CONNECTIONS connections" "$(body true "$PROMPT_BYTES")" -n "$REQUESTS" -c "$CONNECTIONS"
end
