#!/usr/bin/env bash
# Whole answers, as fast as the connections go: each sends its next request when it has its answer (closed loop).
#
#   loadtest/oha/chat.sh [--dry-run]
#
# Environment, beside that of all recipes (lib.sh): REQUESTS (2000), PROMPT_BYTES (1000).
set -euo pipefail
# shellcheck source=loadtest/oha/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
begin "$@"
number REQUESTS 2000
number PROMPT_BYTES 1000
load "unary, $REQUESTS requests on $CONNECTIONS connections" "$(body false "$PROMPT_BYTES")" -n "$REQUESTS" -c "$CONNECTIONS"
end
