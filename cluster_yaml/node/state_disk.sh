#!/usr/bin/env bash
# Mounts the head's persistent disk at /moedisco and shares runs and data with the workers. Formats the disk only if it is blank.
#   state_disk.sh DEVICE
set -euo pipefail

device=$(readlink -f "$1")
for _ in $(seq 60); do [ -b "$device" ] && break; sleep 1; device=$(readlink -f "$1"); done
[ -b "$device" ] || { echo "moedisco: $1 is no disk of this machine" >&2; exit 1; }
if ! sudo blkid "$device" >/dev/null; then sudo mkfs.ext4 -q -L moedisco "$device"; fi
sudo mkdir -p "/moedisco"
grep -q " /moedisco " /etc/fstab || echo "LABEL=moedisco /moedisco ext4 defaults,nofail 0 2" | sudo tee -a /etc/fstab >/dev/null
mountpoint -q "/moedisco" || sudo mount "/moedisco"
sudo mkdir -p "/moedisco"/{state,config,runs,data}
sudo chown "$USER" "/moedisco" "/moedisco"/{state,config,runs,data}
chmod 700 "/moedisco"/{state,config}

command -v exportfs >/dev/null || { sudo apt-get update -q && sudo apt-get install -qy nfs-kernel-server; }
# The firewall allows only nodes of the cluster.
sudo mkdir -p /etc/exports.d
printf '/moedisco/%s,no_subtree_check)\n' 'runs *(rw,async' 'data *(ro' | sudo tee /etc/exports.d/moedisco.exports >/dev/null
sudo exportfs -ra
