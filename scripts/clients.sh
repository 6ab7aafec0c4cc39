#!/usr/bin/env bash
# Real clients, unmodified, each against a `penstock up` of its own with simulated engines and an API key.
#
#   scripts/clients.sh [CLIENT]...    openai, openai-async, openai-npm, anthropic, langchain, curl: all of them by default
#   VLLM_DIR=DIR scripts/clients.sh vllm-bench       `vllm bench serve`, out of the DIR that scripts/vllm_cpu.sh made
#   AIPERF=PROGRAM scripts/clients.sh aiperf         aiperf, wherever it was installed
#
# docs/clients.md says what each was tried with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

clients=("$@")
[ $# -gt 0 ] || clients=(openai openai-async openai-npm anthropic langchain curl)

# A key, so that each client shows its own way of sending one.
export API_KEY=a-key-of-the-tests
hash=$(printf %s "$API_KEY" | sha256sum | cut -d ' ' -f 1)
export PENSTOCK_PROXY__AUTH__KEYS="[\"tests:$hash\"]"

with_up() { scripts/with_up.py -- "$@"; }

# with_tls COMMAND...: the same with a second listener that speaks TLS; TLS_URL and TLS_CA say where.
with_tls() {
    local folder port
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' RETURN
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost \
        -addext subjectAltName=IP:127.0.0.1 -keyout "$folder/key.pem" -out "$folder/cert.pem" 2>/dev/null
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    TLS_URL=https://127.0.0.1:$port TLS_CA=$folder/cert.pem \
        PENSTOCK_PROXY__LISTENERS="{tls = {listen = '127.0.0.1:$port', certificate = '$folder/cert.pem', key = '$folder/key.pem'}}" \
        with_up "$@"
}

for client in "${clients[@]}"; do
    case "$client" in
    curl) with_tls .venv/bin/python tests/clients/curl_client.py ;;
    openai | anthropic | langchain) with_up .venv/bin/python "tests/clients/${client}_client.py" ;;
    openai-async) with_up .venv/bin/python tests/clients/openai_async.py ;;
    openai-npm) with_up .venv/bin/node tests/clients/openai_client.mjs ;;
    vllm-bench | aiperf) with_up "tests/clients/${client//-/_}.sh" ;;
    *)
        echo "clients.sh: no client is called $client" >&2
        exit 2
        ;;
    esac
done
