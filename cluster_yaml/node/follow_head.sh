#!/usr/bin/env bash
# Stops this worker's Ray when its head has been away for half a minute. Ray's own launcher leaves parts of it on machines that it does
# not end, and the raylet would end only after a minute.
#   follow_head.sh HEAD_ADDRESS RAYLET_PID
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

missed=0
while kill -0 "$2" 2>/dev/null; do # another start has its own
    sleep 3
    if (exec 3<>"/dev/tcp/$1/6379") 2>/dev/null; then missed=0; else missed=$((missed + 1)); fi
    if [ "$missed" = 10 ]; then exec ray stop; fi
done
