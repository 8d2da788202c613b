#!/usr/bin/env bash
# Starts the head: Ray, then the service. Both restart after a reboot and store their state under $MOEDISCO_HOME.
#   head.sh PLACE [INPUT_ROOT...] [--OPTION...]
# PLACE is a folder that all nodes reach: a URI such as s3://BUCKET/FOLDER, or a directory that is the same on all of them. Runs are
# stored in PLACE/runs, and may read PLACE/data and each INPUT_ROOT. OPTION is one of `moedisco serve`.
# With MOEDISCO_JOIN_HOST, the address of this head for machines that join from outside, it also runs their gateway.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/environment.sh"

place=${1%/}
shift
mkdir -p "$MOEDISCO_HOME"/{state,config}
case $place in *://*) ;; *) mkdir -p "$place"/{runs,data} ;; esac
ulimit -n 65536 2>/dev/null || true
export BOTO_CREATE_MAX_RETRIES=1    # AWS: once in each zone, as `spot_fallback` asks; Ray would repeat each request five times
ray=(
    ray start --head --port=6379 --object-manager-port=8076 --dashboard-host=127.0.0.1
    "--autoscaling-config=$HOME/ray_bootstrap_config.yaml" --disable-usage-stats
    # Only drivers run here; CPU work runs on the workers.
    --num-cpus=0 --num-gpus=0
)
serve=(
    moedisco serve --ray-address=http://127.0.0.1:8265 --log-format=json
    "--state-dir=$MOEDISCO_HOME/state" "--output-root=$place/runs" "--input-root=$place/data"
)
for word in "$@"; do
    case $word in --*) serve+=("$word") ;; *) serve+=("--input-root=$word") ;; esac
done

# Drivers inherit Ray's environment; the database's password is only for the service.
without_password=(env --unset=MOEDISCO_DATABASE_URL)
if [ -d /run/systemd/system ]; then
    "${without_password[@]}" "$here/keep.sh" moedisco-ray "${ray[@]}" --block
    MOEDISCO_AFTER=moedisco-ray.service "$here/keep.sh" moedisco "${serve[@]}"
else
    "${without_password[@]}" "${ray[@]}"
    MOEDISCO_GCS=${RAY_HEAD_IP:-127.0.0.1}/6379 "$here/keep.sh" moedisco "${serve[@]}"
fi

if [ -n "${MOEDISCO_JOIN_HOST:-}" ]; then
    MOEDISCO_GCS=${RAY_HEAD_IP:-127.0.0.1}/6379 MOEDISCO_AFTER=moedisco-ray.service "$here/keep.sh" moedisco-join \
        sudo "$(command -v moedisco)" join-gateway "--public-host=$MOEDISCO_JOIN_HOST" "--ray-token-file=$HOME/.ray/auth_token"
fi
