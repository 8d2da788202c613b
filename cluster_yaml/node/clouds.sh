# shellcheck shell=bash disable=SC2034
# What the clouds have in common, by the `cloud.sh` of each cloud's folder: places where their images mount local SSDs (`mounts`), the
# names of the first local SSD (`ssds`), fetch_SCHEME, which copies the files of a folder of a bucket to a directory, and power_off_CLOUD,
# which ends this machine and, as far as the cloud allows, its bill.
mounts=() ssds=()
for each in "$(dirname "${BASH_SOURCE[0]}")"/../*/cloud.sh; do
    # shellcheck source=/dev/null
    source "$each"
done
