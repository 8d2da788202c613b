#!/usr/bin/env bash
# Powers this machine of a cloud off when its head has been unreachable for 15 minutes: nothing else would return it, and it would be
# billed until someone notices. `worker.sh` never starts this on machines of your own.
#   power_off.sh CLOUD HEAD_ADDRESS [SECONDS [SECONDS_BETWEEN_LOOKS]]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/environment.sh"
source "$here/clouds.sh"

cloud=$1 head=$2 limit=${3:-900} pause=${4:-10}
uptime() { local up; read -r up _ </proc/uptime; echo "${up%.*}"; }    # a clock that nobody sets

seen=$(uptime)
while sleep "$pause"; do
    if head_answers "$head"; then
        seen=$(uptime)
    elif (($(uptime) - seen >= limit)); then
        echo "moedisco: the head $head has been unreachable for $limit s; powering off" >&2
        "power_off_$cloud" || true    # again after the next pause
    fi
done
