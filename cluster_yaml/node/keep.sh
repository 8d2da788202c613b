#!/usr/bin/env bash
# Keeps a command running with the present environment: as a systemd unit that survives a reboot or, without systemd, while Ray runs on
# this node.
#   keep.sh NAME COMMAND [ARGUMENT...]
set -euo pipefail

name=$1
shift
if [ -d /run/systemd/system ]; then
    environment=/etc/$name.env
    env | grep -E '^(RAY|MOEDISCO|XDG|AWS|BOTO|PATH|HOME)[A-Za-z0-9_]*=' | sudo install -m 600 -o "$USER" /dev/stdin "$environment"
    sudo tee "/etc/systemd/system/$name.service" >/dev/null <<UNIT
[Unit]
Description=MoE-DisCo: $name
After=network-online.target ${MOEDISCO_AFTER:-}
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
User=$USER
EnvironmentFile=$environment
WorkingDirectory=$HOME
ExecStart=$(command -v "$1") $(printf '"%s" ' "${@:2}")
Restart=always
RestartSec=2
LimitNOFILE=65536

[Install]
WantedBy=multi-user.target
UNIT
    sudo systemctl daemon-reload
    sudo systemctl enable --quiet "$name"
    sudo systemctl restart "$name"
else
    log=${MOEDISCO_LOGS:-$HOME}/$name.log
    # `ray stop` stops only Ray's own processes; this loop ends when Ray has been down for a while.
    # shellcheck disable=SC2016  # the inner shell expands it
    setsid nohup bash -c '
        trap "kill \$child 2>/dev/null" EXIT
        missed=0
        until [ "$missed" = 3 ]; do
            kill -0 $child 2>/dev/null || { "$@" & child=$!; }
            sleep 3
            if (exec 3<>"/dev/tcp/$MOEDISCO_GCS") 2>/dev/null; then missed=0; else missed=$((missed + 1)); fi
        done' "$name" "$@" >"$log" 2>&1 </dev/null &
fi
