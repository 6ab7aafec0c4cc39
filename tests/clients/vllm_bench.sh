#!/usr/bin/env bash
# `vllm bench serve` against a gateway with simulated engines: every request answered, with every token asked for.
#
#   VLLM_DIR=DIR scripts/clients.sh vllm-bench     DIR is what scripts/vllm_cpu.sh made: DIR/venv and DIR/tiny
set -euo pipefail

vllm=${VLLM_DIR:?set it to the folder that scripts/vllm_cpu.sh made}/venv/bin/vllm
tokenizer=$VLLM_DIR/tiny
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT

# bench NAME FLAG...: 200 requests of 40 tokens each.
bench() {
    local name=$1
    shift
    echo "--- $name"
    HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 OPENAI_API_KEY=$API_KEY "$vllm" bench serve \
        --base-url "$BASE_URL" --model sim-model --tokenizer "$tokenizer" --dataset-name random \
        --random-input-len 64 --random-output-len 40 --num-prompts 200 --ignore-eos --max-concurrency 32 \
        --save-result --result-dir "$results" --result-filename "$name.json" "$@"
    python3 - "$results/$name.json" <<'PYTHON'
import json, sys
result = json.load(open(sys.argv[1]))
assert result["completed"] == 200 and result.get("failed", 0) == 0, (result["completed"], result.get("failed"))
assert result["total_output_tokens"] == 200 * 40, result["total_output_tokens"]
PYTHON
}

bench completions --backend openai --endpoint /v1/completions
bench chat --backend openai-chat --endpoint /v1/chat/completions
