#!/usr/bin/env bash
# Stops this worker's Ray when the head has been unreachable for half a minute or a little more. Otherwise the raylet would stop only after a minute, and
# parts of Ray would keep running on machines that are not terminated.
#   follow_head.sh HEAD_ADDRESS RAYLET_PID
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

missed=0
while kill -0 "$2" 2>/dev/null; do # a new start of Ray has its own watcher
    sleep 3
    if head_answers "$1"; then missed=0; else missed=$((missed + 1)); fi
    if [ "$missed" = 10 ]; then exec ray stop; fi
done
