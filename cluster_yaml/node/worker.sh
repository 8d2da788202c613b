#!/usr/bin/env bash
# Joins the cluster of $RAY_HEAD_IP and, in a cloud, passes the cloud's preemption notice on to Ray.
#   worker.sh aws|gcp|azure     mounts the head's runs and data below /moedisco; the autoscaler sets resources and labels
#   worker.sh hosts FILE        FILE sets resources and labels of this host; runs are on a file system that is already mounted
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/environment.sh"

arguments=("--address=$RAY_HEAD_IP:6379" --object-manager-port=8076)
if [ "$1" = hosts ]; then
    mapfile -t tags < <(python "$here/host_tags.py" "$2")
    arguments+=("${tags[@]}")
else
    for share in runs:rw data:ro; do
        folder=/moedisco/${share%:*}
        mountpoint -q "$folder" && continue
        sudo mkdir -p "$folder"
        # soft: if the head is lost, the worker must fail instead of hang.
        sudo mount -t nfs4 -o "${share#*:},soft,timeo=600,retrans=3" "$RAY_HEAD_IP:$folder" "$folder"
    done
fi
ulimit -n 65536 2>/dev/null || true
ray start "${arguments[@]}"
if [ "$1" = hosts ]; then
    setsid nohup "$here/follow_head.sh" "$RAY_HEAD_IP" "$(pgrep --newest --exact raylet)" >/dev/null 2>&1 </dev/null &
else
    MOEDISCO_GCS=$RAY_HEAD_IP/6379 "$here/keep.sh" moedisco-node-agent moedisco node-agent --provider "$1"
fi
