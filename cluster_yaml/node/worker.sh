#!/usr/bin/env bash
# Joins the cluster of $RAY_HEAD_IP and, on a machine of a cloud, hands the cloud's notice of its loss to Ray.
#   worker.sh aws|gcp|azure     the head's runs and data are mounted below /moedisco; resources and labels come from the autoscaler
#   worker.sh hosts FILE        resources and labels are what FILE says of this host; runs lie on a file system that it has already
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
        # Soft: a lost head must fail the worker, not freeze it.
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
