#!/usr/bin/env bash
# cargo-deny over deny.toml: licences, banned and duplicate crates, sources. The advisory database is not asked: it has
# to be fetched from the network at every run, which would make this check depend on the day.
#
#   scripts/deny.sh                  installs cargo-deny (pinned, from crates.io: about three minutes on two cores, once)
#                                    when it is missing
#   scripts/deny.sh --if-installed   says so and succeeds when it is missing, except in CI (CI=true), which installs it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=0.20.2
case "${1:-}" in
"") ;;
--if-installed)
    if [ "${CI:-}" != true ] && ! cargo deny --version >/dev/null 2>&1; then
        echo "skipped: cargo-deny is not installed; \`make deny\` installs and runs it"
        exit 0
    fi
    ;;
*)
    echo "usage: scripts/deny.sh [--if-installed]" >&2
    exit 2
    ;;
esac

if ! cargo deny --version >/dev/null 2>&1; then
    echo "deny: installing cargo-deny $version (about three minutes, once)" >&2
    cargo install --locked --quiet "cargo-deny@$version" </dev/null
fi
cargo deny --workspace --locked check --hide-inclusion-graph bans licenses sources
