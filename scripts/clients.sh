#!/usr/bin/env bash
# The official openai client, end to end, against a `penstock up` of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec scripts/with_up.py -- .venv/bin/python tests/clients/openai_client.py
