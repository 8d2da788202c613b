# shellcheck shell=bash disable=SC2034
# What ../node/clouds.sh collects about Azure.
mounts+=(/mnt/nvme /mnt/resource_nvme)
ssds+=(/dev/disk/by-id/nvme-Microsoft_NVMe_Direct_Disk_*)
# A machine that only shuts down is billed on. Its identity may deallocate it; what is left to pay for is its disk.
power_off_azure() {
    local metadata=http://169.254.169.254/metadata machine token
    machine=$(curl -sf --noproxy '*' -H Metadata:true "$metadata/instance/compute/resourceId?api-version=2021-02-01&format=text")
    token=$(curl -sf --noproxy '*' -H Metadata:true \
        "$metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://management.azure.com/" |
        python -c 'import json, sys; print(json.load(sys.stdin)["access_token"])')
    curl -sf --request POST --data '' --header @- "https://management.azure.com$machine/deallocate?api-version=2024-07-01" \
        <<<"Authorization: Bearer $token"
}
fetch_abfs() { AZCOPY_AUTO_LOGIN_TYPE=MSI azcopy copy "https://${1#abfs://}/*" "$2" --output-level=quiet; }
