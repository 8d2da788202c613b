"""The files of the head's sshd for joining machines: its configuration, and the scripts that its user runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moedisco_ray.contrib.join.token import FIRST_DEVICE

_KNOWN_DAYS = 7
"""Days after its last connection for which a machine may connect again without a new token."""
_SSHD_CONFIG = """\
Port {port}
HostKey {directory}/host
PidFile none
AllowUsers {user}
AuthenticationMethods publickey
AuthorizedKeysFile none
TrustedUserCAKeys {directory}/ca.pub
AuthorizedPrincipalsCommand {directory}/admit.sh %s
AuthorizedPrincipalsCommandUser {user}
AuthorizedKeysCommand {directory}/known.sh %t %k
AuthorizedKeysCommandUser {user}
ExposeAuthInfo yes
ForceCommand {directory}/offer.sh
PermitTunnel point-to-point
AllowTcpForwarding no
AllowStreamLocalForwarding no
AllowAgentForwarding no
GatewayPorts no
X11Forwarding no
PermitTTY no
PermitUserRC no
PermitUserEnvironment no
PermitRootLogin no
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
MaxSessions 1
MaxStartups 1000
LoginGraceTime 20
ClientAliveInterval 10
ClientAliveCountMax 3
LogLevel VERBOSE
"""
_ADMIT = """\
#!/bin/sh
# Admits the certificate with serial number $1 if no other connection used it.
# sshd asks twice per connection, from one process.
asking="$PPID $(cut -d ' ' -f 22 /proc/$PPID/stat)"
(set -C; echo "$asking" >"{directory}/used/$1") 2>/dev/null
[ "$(cat "{directory}/used/$1")" = "$asking" ] && echo join
"""
_KNOWN = """\
#!/bin/sh
# Admits the key $2 of type $1 to its machine's tunnel, if the machine was here within {known_days} days.
[ "$1" = ssh-ed25519 ] && cd "{directory}/machines" || exit 0
for slot in [0-9]*; do
    if [ "$(cat "$slot" 2>/dev/null)" = "$2" ] && [ -n "$(find "$slot" -mmin -$(({known_days} * 1440)))" ]; then
        echo "restrict,tunnel=\\"$(({first_device} + slot))\\" $1 $2"
    fi
done
"""
_OFFER = """\
#!/bin/sh
# Prints the offer. A machine that comes with a token first sends `key` and the key with which it will come again; one
# that leaves for good sends `leave`.
cd "{directory}/machines" || exit 1
IFS=' ' read -r type own <<AUTHENTICATED
$(sed -n 's/^publickey //p' "$SSH_USER_AUTH")
AUTHENTICATED
case $type in
    *-cert-*)
        slot=$(echo "$type $own" | ssh-keygen -L -f - | sed -n 's/^ *Key ID: "join-\\([0-9]*\\)"$/\\1/p')
        IFS=' ' read -r word key
        case $word$key in key*[!A-Za-z0-9+/=]*) key= ;; esac
        if [ "$word" = key ] && [ ${{#key}} = 68 ]; then echo "$key" >"new-$slot" && mv "new-$slot" "$slot"; fi ;;
    *) slot=$(grep -lxF -e "$own" [0-9]*) ;;
esac
slot=${{slot:-none}}
touch -c "$slot"
echo "$PPID" >"connection-$slot"
while sleep 3600; do touch -c "$slot"; done >/dev/null 2>&1 </dev/null &
trap "kill $!" EXIT
cat "{directory}/offer.json"
echo
while read -r word; do
    if [ "$word" = leave ]; then rm -f "$slot"; fi
done
touch -c "$slot"
"""


def gateway_files(directory: Path, user: str, port: int) -> Mapping[str, tuple[str, int]]:
    """Text and mode of each file, by name.

    Args:
        directory: Directory of the files.
        user: The unprivileged user.
        port: Port of the sshd.
    """
    values = {
        "directory": directory,
        "user": user,
        "port": port,
        "known_days": _KNOWN_DAYS,
        "first_device": FIRST_DEVICE,
    }
    return {
        "sshd_config": (_SSHD_CONFIG.format(**values), 0o644),
        **{
            name: (text.format(**values), 0o755)
            for name, text in (("admit.sh", _ADMIT), ("known.sh", _KNOWN), ("offer.sh", _OFFER))
        },
    }
