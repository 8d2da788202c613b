# shellcheck shell=bash disable=SC2034
# What ../node/clouds.sh collects about Google Cloud.
ssds+=(/dev/disk/by-id/google-local-nvme-ssd-0)
power_off_gcp() { sudo shutdown -h now; }      # its disk is billed until it is deleted
fetch_gs() { gcloud storage rsync "$1" "$2"; }
