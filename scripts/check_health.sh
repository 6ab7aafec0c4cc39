#!/usr/bin/env bash
# deploy/healthcheck.sh against a running Penstock: each process healthy, an unknown path and a closed port not.
#
#   scripts/with_up.py -- scripts/check_health.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ports=$(python3 -c 'import json, os
up = json.loads(os.environ["PENSTOCK_UP"])
print(*(up[key].rsplit(":", 1)[1] for key in ("proxy_private", "controlplane", "agent_private")))')
read -r -a ports <<<"$ports"
for port in "${ports[@]}"; do
    deploy/healthcheck.sh /livez "$port"
    deploy/healthcheck.sh /readyz "$port"
    if deploy/healthcheck.sh /no-such-path "$port" 2>/dev/null; then
        echo "port $port: an unknown path counts as healthy" >&2
        exit 1
    fi
done
# Port 1 is nobody's; the first live one of several is enough.
deploy/healthcheck.sh /livez 1 "${ports[0]}"
if deploy/healthcheck.sh /livez 1; then
    echo "a closed port counts as healthy" >&2
    exit 1
fi
echo "${#ports[@]} processes are healthy"
