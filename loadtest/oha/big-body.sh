#!/usr/bin/env bash
# Long prompts: whole answers to bodies of 64 KB, 500 KB and 5 MB.
#
#   loadtest/oha/big-body.sh [--dry-run]
#
# Environment, beside that of all recipes (lib.sh): REQUESTS (200), of each size. An engine may refuse so long a prompt (400):
# its context is given with --max-model-len.
set -euo pipefail
# shellcheck source=loadtest/oha/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
begin "$@"
number REQUESTS 200
for bytes in 64000 500000 5000000; do
    load "unary, prompts of $bytes bytes" "$(body false "$bytes")" -n "$REQUESTS" -c "$CONNECTIONS"
done
end
