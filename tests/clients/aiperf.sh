#!/usr/bin/env bash
# aiperf against a gateway with simulated engines: every request answered, none with an error.
#
#   AIPERF=PROGRAM TOKENIZER=FOLDER scripts/clients.sh aiperf
set -euo pipefail

results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
"${AIPERF:?set it to the aiperf program}" profile --model sim-model --url "$BASE_URL" --api-key "$API_KEY" \
    --endpoint-type chat --streaming --tokenizer "${TOKENIZER:?set it to a folder with a tokenizer}" \
    --concurrency 16 --request-count 100 --synthetic-input-tokens-mean 64 --output-tokens-mean 40 \
    --extra-inputs ignore_eos:true --use-server-token-count --ui simple --output-artifact-dir "$results"
python3 - "$results" <<'PYTHON'
import json, pathlib, sys
[path] = pathlib.Path(sys.argv[1]).rglob("profile_export_aiperf.json")
result = json.loads(path.read_text())
count = result["request_count"]["avg"]
errors = (result.get("error_request_count") or {"avg": 0})["avg"]
assert (count, errors) == (100, 0), f"{count} answered, {errors} with an error"
tokens = result["output_sequence_length"]["avg"]
assert tokens == 40, f"{tokens} tokens an answer instead of 40"
PYTHON
