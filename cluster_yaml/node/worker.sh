#!/usr/bin/env bash
# Joins the cluster of $RAY_HEAD_IP. In a cloud, also passes the cloud's preemption notice on to Ray, and powers the machine off once the
# head has been gone for 15 minutes.
#   worker.sh CLOUD              such as aws; the autoscaler sets resources and labels
#   worker.sh hosts FILE         FILE sets resources and labels of this host; nothing starts if torch cannot use one of its GPUs
# A cloud's machine joins in any case: runs leave it out and say why, whereas the autoscaler would replace it for ever.
# The node keeps what it reads and writes of runs in $MOEDISCO_CACHE_DIR, up to $MOEDISCO_CACHE_GB. In a cloud, these default to its
# fastest local disk.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/environment.sh"

arguments=("--address=$RAY_HEAD_IP:6379" --object-manager-port=8076)
if [ "$1" = hosts ]; then
    tags=$(python "$here/host_tags.py" "$2")
    gpus=$(sed -n 's/^--num-gpus=//p' <<<"$tags")
    python -m moedisco_ray.execution.cards GPU "${gpus:-0}"
    mapfile -t -O "${#arguments[@]}" arguments <<<"$tags"
else
    "$here/keep.sh" moedisco-power-off "$here/power_off.sh" "$1" "$RAY_HEAD_IP"
    if [ -z "${MOEDISCO_CACHE_DIR:-}" ]; then
        read -r MOEDISCO_CACHE_DIR gigabytes < <("$here/cache_disk.sh")
        export MOEDISCO_CACHE_DIR MOEDISCO_CACHE_GB="${MOEDISCO_CACHE_GB:-$gigabytes}"
    fi
fi
ulimit -n 65536 2>/dev/null || true
ray start "${arguments[@]}"
if [ "$1" = hosts ]; then
    setsid nohup "$here/follow_head.sh" "$RAY_HEAD_IP" "$(pgrep --newest --exact raylet)" >/dev/null 2>&1 </dev/null &
else
    MOEDISCO_GCS=$RAY_HEAD_IP/6379 "$here/keep.sh" moedisco-node-agent moedisco node-agent --provider "$1"
fi
