# shellcheck shell=bash
# What the recipes beside this have in common; each of them begins with `source lib.sh` and `begin "$@"`.
#
# Environment of all: BASE_URL (http://127.0.0.1:8081), MODEL (the first one the gateway lists), API_KEY (none), MAX_TOKENS (64),
# CONNECTIONS (64), OHA (oha, from PATH). Settings are refused in words. --dry-run prints the command lines and runs nothing.

OHA_VERSION=1.16.0

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

# number NAME DEFAULT: the environment's, if it is a whole number from 1 up; becomes the variable NAME.
number() {
    local value=${!1:-$2}
    [[ $value =~ ^[1-9][0-9]{0,8}$ ]] || fail "$1 is \"$value\"; it must be a whole number from 1 to 999999999"
    printf -v "$1" %s "$value"
}

# seconds NAME DEFAULT: the same for a time that oha understands.
seconds() {
    local value=${!1:-$2}
    [[ $value =~ ^[1-9][0-9]*(s|m|h)$ ]] || fail "$1 is \"$value\"; it must be a time such as 30s, 5m or 1h"
    printf -v "$1" %s "$value"
}

# Reads the command line and the environment; with a gateway to ask, finds the model.
begin() {
    dry_run=no
    case "$#-${1:-}" in
    0-) ;;
    1---dry-run) dry_run=yes ;;
    *)
        echo "usage: $0 [--dry-run]" >&2
        exit 2
        ;;
    esac
    base=${BASE_URL:-http://127.0.0.1:8081}
    [[ $base =~ ^https?://[^/]+ ]] || fail "BASE_URL is \"$base\"; it must be http://HOST:PORT or https://HOST:PORT"
    base=${base%/}
    number MAX_TOKENS 64
    number CONNECTIONS 64
    oha=${OHA:-oha}
    model=${MODEL:-}
    headers=()
    [ -z "${API_KEY:-}" ] || headers=(-H "Authorization: Bearer $API_KEY")
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    failed=no
    if [ "$dry_run" = no ]; then
        find_oha
        find_model
    fi
    model=${model:-MODEL}
}

find_oha() {
    command -v "$oha" >/dev/null 2>&1 && return 0
    echo "oha is not installed (about ten minutes to build on two cores). Into a folder of its own:" >&2
    echo "    cargo install oha --locked --version $OHA_VERSION --root ~/.cache/penstock/oha" >&2
    echo "then add ~/.cache/penstock/oha/bin to PATH, or set OHA=~/.cache/penstock/oha/bin/oha" >&2
    exit 2
}

find_model() {
    [ -z "$model" ] || return 0
    command -v curl >/dev/null 2>&1 || fail "set MODEL, or install curl to ask the gateway for one"
    local listed
    listed=$(curl --fail --silent --show-error --max-time 10 "${headers[@]}" "$base/v1/models") ||
        fail "$base/v1/models does not answer as it should; is BASE_URL right?"
    model=$(sed -n 's/.*"data" *: *\[ *{[^}]*"id" *: *"\([^"]*\)".*/\1/p' <<<"$listed")
    [ -n "$model" ] || fail "$base/v1/models lists no model"
}

# body STREAM PROMPT-BYTES: a file with that request, as compact JSON; prints its path.
body() {
    local file=$work/body-$1-$2.json sentence="Water turns the wheel of the mill, and the wheel turns the stone. "
    {
        printf '{"model":"%s","messages":[{"role":"user","content":"' "$model"
        awk -v s="$sentence" -v n="$2" 'BEGIN { for (; n > 0; n -= length(s)) printf "%s", substr(s, 1, n) }'
        printf '"}],"max_tokens":%s,"stream":%s}' "$MAX_TOKENS" "$1"
    } >"$file"
    echo "$file"
}

# load TITLE BODY-FILE OHA-FLAG...: prints the command line and runs it; a request that fails makes the recipe fail at its end.
load() {
    local title=$1 file=$2 said
    shift 2
    local command=("$oha" --no-tui --no-color "$@" -m POST -T application/json "${headers[@]}" -D "$file"
        "$base/v1/chat/completions")
    echo "# $title"
    # Whoever reads the output is not to have the key.
    local shown=("${command[@]/#Authorization: Bearer */Authorization: Bearer \$API_KEY}")
    echo "${shown[*]@Q}"
    [ "$dry_run" = no ] || return 0
    said=$work/said
    "${command[@]}" | tee "$said"
    if ! grep -qE '^ +\[200\] [0-9]+ responses' "$said" || grep -qE '^ +\[([013-9]..|2[1-9].|20[1-9])\]|^Error distribution' "$said"; then
        echo "# $title: not every request was answered with 200" >&2
        failed=yes
    fi
}

# The last line of a recipe.
end() { [ "$failed" = no ]; }
