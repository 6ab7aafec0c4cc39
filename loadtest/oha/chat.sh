#!/usr/bin/env bash
# oha against a gateway: unary chats, then streamed chats, then streamed chats at a fixed rate. The exact command lines
# are printed before they run.
#
#   loadtest/oha/chat.sh [--dry-run]      --dry-run prints the command lines and runs nothing
#
# Environment: BASE_URL (http://127.0.0.1:8081), MODEL (the first one the gateway lists), API_KEY (none),
# CONNECTIONS (64), REQUESTS (2000), RATE in requests a second (200), MAX_TOKENS (64).
#
# oha counts a stream as one response: its latency is the whole stream's. The fixed-rate run is open loop and corrected
# for coordinated omission, so its percentiles are those a user would see.
set -euo pipefail

dry_run=no
case "${1:-}" in
"") ;;
--dry-run) dry_run=yes ;;
*)
    echo "usage: loadtest/oha/chat.sh [--dry-run]" >&2
    exit 2
    ;;
esac

base=${BASE_URL:-http://127.0.0.1:8081}
base=${base%/}
model=${MODEL:-}
connections=${CONNECTIONS:-64}
requests=${REQUESTS:-2000}
rate=${RATE:-200}
max_tokens=${MAX_TOKENS:-64}

headers=()
[ -z "${API_KEY:-}" ] || headers=(-H "Authorization: Bearer $API_KEY")

if [ "$dry_run" = no ]; then
    if ! command -v oha >/dev/null 2>&1; then
        echo "oha is not installed (about ten minutes to build on two cores):" >&2
        echo "    cargo install oha --locked --version 1.16.0" >&2
        exit 1
    fi
    if [ -z "$model" ]; then
        command -v curl >/dev/null 2>&1 || { echo "set MODEL, or install curl to ask the gateway for one" >&2 && exit 1; }
        model=$(curl --fail --silent --show-error "${headers[@]}" "$base/v1/models" |
            sed -n 's/.*"data" *: *\[ *{[^}]*"id" *: *"\([^"]*\)".*/\1/p')
        [ -n "$model" ] || { echo "$base/v1/models lists no model" >&2 && exit 1; }
    fi
fi
model=${model:-MODEL}

# body STREAM: the request, as compact JSON.
body() {
    printf '{"model":"%s","messages":[{"role":"user","content":"Tell me something."}],"max_tokens":%s,"stream":%s}' \
        "$model" "$max_tokens" "$1"
}

# load TITLE STREAM OHA-FLAG...
load() {
    local title=$1 stream=$2
    shift 2
    local command=(oha --no-tui "$@" -m POST -T application/json "${headers[@]}" -d "$(body "$stream")"
        "$base/v1/chat/completions")
    echo "# $title"
    echo "${command[*]@Q}"
    [ "$dry_run" = yes ] || "${command[@]}"
}

load "unary, as fast as $connections connections go" false -n "$requests" -c "$connections"
load "streamed, as fast as $connections connections go" true -n "$requests" -c "$connections"
load "streamed, $rate requests a second, open loop" true \
    -n "$requests" -c "$connections" -q "$rate" --latency-correction
