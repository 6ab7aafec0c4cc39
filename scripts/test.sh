#!/usr/bin/env bash
# Every test of the repository; `make test` runs it after the set-up. Goes on after a failure, so that one run shows them
# all; the last line is "N passed, N failed" over everything, and the exit code is 1 if any failed.
#
#   scripts/test.sh [rust|doc|tools|count]...      all four by default
#
# rust: the workspace's tests, through cargo-nextest where it is installed, else cargo test. doc: the examples in the API
# documentation. tools: real clients and tools against what the repository ships and against a running `penstock up`.
# count: what the hot path costs, in instructions, against what it did; it builds for release.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

parts=("$@")
[ $# -gt 0 ] || parts=(rust doc tools count)

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
passed=0
failed=0

# sum WORD: adds up the numbers before WORD in the summary lines on standard input.
sum() { { grep -oE "[0-9]+ $1" || true; } | awk '{n += $1} END {print n + 0}'; }

# count_results SUMMARY-PATTERN COMMAND...: runs it, passes its output on, and adds up what its closing lines say.
count_results() {
    local pattern=$1 log=$logs/run summary more
    shift
    echo "--- $*"
    local code=0
    "$@" 2>&1 | tee "$log" || code=$?
    summary=$(sed 's/\x1b\[[0-9;]*m//g' "$log" | grep -E "$pattern" || true)
    passed=$((passed + $(sum passed <<<"$summary")))
    more=$(($(sum failed <<<"$summary") + $(sum 'timed out' <<<"$summary")))
    # It did not build, or died before it could count.
    [ "$code" -eq 0 ] || [ "$more" -gt 0 ] || more=1
    failed=$((failed + more))
}

# check NAME COMMAND...: one tool; its output is shown when it fails.
check() {
    local name=$1 log=$logs/check start=$SECONDS
    shift
    if "$@" >"$log" 2>&1 </dev/null; then
        passed=$((passed + 1))
        echo "ok      $name ($((SECONDS - start)) s)"
    else
        failed=$((failed + 1))
        echo "FAILED  $name ($((SECONDS - start)) s): $*"
        sed 's/^/        /' "$log"
    fi
}

rust() {
    if cargo nextest --version >/dev/null 2>&1; then
        count_results '^ *Summary \[' cargo nextest run --locked --workspace --no-fail-fast
    else
        count_results '^test result:' cargo test --locked --workspace --no-fail-fast --lib --bins --tests
    fi
}

doc() { count_results '^test result:' cargo test --locked --workspace --no-fail-fast --doc; }

tools() {
    echo "--- tools"
    local client recipe script
    for recipe in chat stream big-body rate ramp; do
        check "oha: command lines, $recipe" "loadtest/oha/$recipe.sh" --dry-run
    done
    check "compose.yaml: schema" \
        .venv/bin/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml
    check "deploy/: its files agree" .venv/bin/python scripts/check_deploy.py
    check "Dockerfile: hadolint" .venv/bin/hadolint deploy/Dockerfile
    check "prometheus.yml: promtool" promtool check config deploy/prometheus/prometheus.yml
    check "rules.yml: promtool" promtool test rules deploy/prometheus/rules_test.yml
    check "k6: types, options, refusals" scripts/check_k6.sh
    # With every target, as the tests above were built: the same binary, not a second build of its dependencies.
    check "penstock: build" cargo build --locked --workspace --bins --tests
    check "health check of the image" scripts/with_up.py -- scripts/check_health.sh
    check "admin API: answers are as its document says" scripts/with_up.py -- .venv/bin/python scripts/check_api.py answers
    check "admin API: schemathesis" .venv/bin/python scripts/check_api.py fuzz
    for client in openai openai-async openai-npm anthropic langchain curl; do
        check "client: $client" scripts/clients.sh "$client"
    done
    check "a stock Envoy, delta" scripts/envoy.sh delta
    check "a stock Envoy, state of the world" scripts/envoy.sh sotw
    for script in smoke ramp spike soak; do
        check "k6: $script" scripts/k6.sh "$script"
    done
    check "dashboard and metrics" scripts/with_up.py -- scripts/check_dashboard.py
}

count() {
    echo "--- instructions"
    check "instructions of the hot path" scripts/count.sh
}

for part in "${parts[@]}"; do
    case "$part" in
    rust | doc | tools | count) "$part" ;;
    *)
        echo "usage: scripts/test.sh [rust|doc|tools|count]..." >&2
        exit 2
        ;;
    esac
done

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
