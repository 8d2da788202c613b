#!/usr/bin/env bash
# Prints folder and size (GB) of the cache of a cloud's machine: on a local SSD if it has one, formatted if it is blank; otherwise half
# of the root disk.
set -euo pipefail

folder=$HOME/.cache/moedisco share=50
source "$(dirname "${BASH_SOURCE[0]}")/clouds.sh"
mounts+=(/moedisco-cache)
mounted() { for each in "${mounts[@]}"; do if mountpoint -q "$each"; then echo "$each"; return; fi; done; }

if [ -z "$(mounted)" ]; then
    for device in "${ssds[@]}"; do
        [ -b "$device" ] || continue
        sudo blkid "$device" >/dev/null || sudo mkfs.ext4 -q -E nodiscard "$device"
        sudo mkdir -p /moedisco-cache
        if sudo mount "$device" /moedisco-cache; then break; fi
    done
fi
disk=$(mounted)
if [ -n "$disk" ]; then
    folder=$disk/moedisco share=90
    sudo install -d -o "$USER" "$folder"
else
    mkdir -p "$folder"
fi
echo "$folder $(($(df --output=size -B1000000000 "$folder" | tail -n 1) * share / 100))"
