#!/usr/bin/env bash
# Starts the cluster of local-fake.yaml: a head on this machine, and fake nodes that scale with the queue. `ray stop` stops it.
#   local-fake.sh [ARGUMENT OF ray start...]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/node/environment.sh"

# The fake provider and the autoscaler expect this name of the head.
head=fffffffffffffffffffffffffffffffffffffffffffffffffff00000
export RAY_FAKE_CLUSTER=1 RAY_enable_autoscaler_v2=1
export RAY_CLOUD_INSTANCE_ID=$head RAY_OVERRIDE_NODE_ID_FOR_TESTING=$head RAY_NODE_TYPE_NAME=ray.head.default
exec ray start --head --port=6380 --node-ip-address=127.0.0.1 --num-cpus=0 --num-gpus=0 --dashboard-host=127.0.0.1 --disable-usage-stats \
    "--autoscaling-config=$here/local-fake.yaml" "$@"
