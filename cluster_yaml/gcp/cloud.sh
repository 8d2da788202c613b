# shellcheck shell=bash disable=SC2034
# What ../node/clouds.sh collects about Google Cloud.
ssds+=(/dev/disk/by-id/google-local-nvme-ssd-0)
fetch_gs() { gcloud storage rsync "$1" "$2"; }
