#!/usr/bin/env bash
# Mounts the head's persistent disk, which holds the service's database and tokens, at /moedisco. Formats the disk only if it is blank.
#   state_disk.sh DEVICE
set -euo pipefail

device=$(readlink -f "$1")
for _ in $(seq 60); do [ -b "$device" ] && break; sleep 1; device=$(readlink -f "$1"); done
[ -b "$device" ] || { echo "moedisco: $1 is no disk of this machine" >&2; exit 1; }
if ! sudo blkid "$device" >/dev/null; then sudo mkfs.ext4 -q -L moedisco "$device"; fi
sudo mkdir -p "/moedisco"
grep -q " /moedisco " /etc/fstab || echo "LABEL=moedisco /moedisco ext4 defaults,nofail 0 2" | sudo tee -a /etc/fstab >/dev/null
mountpoint -q "/moedisco" || sudo mount "/moedisco"
sudo mkdir -p "/moedisco"/{state,config}
sudo chown "$USER" "/moedisco" "/moedisco"/{state,config}
chmod 700 "/moedisco"/{state,config}
