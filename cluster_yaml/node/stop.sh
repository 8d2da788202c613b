#!/usr/bin/env bash
# Stops the processes that head.sh and worker.sh started on this machine; stored state stays. On a cloud's machine, the watcher that powers
# it off stays too.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [ -d /run/systemd/system ]; then
    for name in moedisco moedisco-join moedisco-node-agent moedisco-ray; do
        if systemctl --quiet is-enabled "$name" 2>/dev/null; then sudo systemctl disable --quiet --now "$name"; fi
    done
fi
ray stop
