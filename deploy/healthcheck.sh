#!/usr/bin/env bash
# Exit code 0 if one of the ports of this host answers 200 to GET PATH. Needs bash alone: the image has no curl.
#
#   healthcheck.sh PATH PORT...
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: healthcheck.sh PATH PORT..." >&2
    exit 2
fi
path=$1
shift
for port in "$@"; do
    if { exec 3<>"/dev/tcp/127.0.0.1/$port"; } 2>/dev/null; then
        printf 'GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' "$path" >&3
        status=
        read -r -t 3 _ status _ <&3 || true
        exec 3>&-
        if [ "$status" = 200 ]; then
            exit 0
        fi
        echo "port $port answers ${status:-nothing} to GET $path" >&2
    fi
done
exit 1
