# shellcheck shell=bash disable=SC2034
# What ../node/clouds.sh collects about AWS.
mounts+=(/opt/dlami/nvme)
ssds+=(/dev/disk/by-id/nvme-Amazon_EC2_NVMe_Instance_Storage_*)
power_off_aws() { sudo shutdown -h now; }      # `InstanceInitiatedShutdownBehavior` in spot.yaml terminates it
fetch_s3() { aws s3 sync --only-show-errors "$1" "$2"; }
