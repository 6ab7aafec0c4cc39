#!/usr/bin/env bash
# How many instructions an event and a request cost the proxy, against loadtest/instructions.toml. `make count`.
#
#   scripts/count.sh [FLAG]...      flags of penstock-bench-instructions: --pin, --only TEXT, --runs N, --keep FOLDER
#
# Builds as `make build` does, with the features of the whole workspace: other features would be other instructions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

messages=$(mktemp)
trap 'rm -f "$messages"' EXIT
"${CARGO:-cargo}" build --locked --release --workspace --bin penstock-proxy --bin penstock-engine-sim \
    --bin penstock-bench-instructions --bench instructions --message-format=json-render-diagnostics >"$messages"

# built NAME: the path of the executable that cargo built last under that name.
built() {
    local path
    path=$(grep -F "\"name\":\"$1\"" "$messages" | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
    [ -n "$path" ] || { echo "count: cargo did not say where $1 is" >&2 && return 1; }
    echo "$path"
}
proxy=$(built penstock-proxy)
engine_sim=$(built penstock-engine-sim)
parts=$(built instructions)
count=$(built penstock-bench-instructions)
"$count" --proxy "$proxy" --engine-sim "$engine_sim" --parts "$parts" --pins loadtest/instructions.toml "$@"
