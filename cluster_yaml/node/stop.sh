#!/usr/bin/env bash
# Stops what head.sh and worker.sh keep running on this machine; what it remembers stays.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [ -d /run/systemd/system ]; then
    for name in moedisco moedisco-node-agent moedisco-ray; do
        if systemctl --quiet is-enabled "$name" 2>/dev/null; then sudo systemctl disable --quiet --now "$name"; fi
    done
fi
ray stop
