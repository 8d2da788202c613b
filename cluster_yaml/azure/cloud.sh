# shellcheck shell=bash disable=SC2034
# What ../node/clouds.sh collects about Azure.
mounts+=(/mnt/nvme /mnt/resource_nvme)
ssds+=(/dev/disk/by-id/nvme-Microsoft_NVMe_Direct_Disk_*)
fetch_abfs() { AZCOPY_AUTO_LOGIN_TYPE=MSI azcopy copy "https://${1#abfs://}/*" "$2" --output-level=quiet; }
