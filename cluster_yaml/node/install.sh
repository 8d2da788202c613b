#!/usr/bin/env bash
# Installs this project into ~/moedisco/.venv with the tested package versions; fast if it is already installed.
#   install.sh [FURTHER PACKAGE...]
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
venv=$project/.venv
pins=$project/cluster_yaml/node/constraints.txt
sources() { find "$project/moedisco_ray" "$project/service" "$project/pyproject.toml" "$pins" -type f -not -name '*.pyc'; }
stamp=$venv/.installed-$( (sources | sort | xargs -d '\n' sha256sum; echo "$@") | sha256sum | cut -c1-16)
[ -e "$stamp" ] && exit

if ! [ -x "$venv/bin/python" ]; then
    if command -v python3.11 >/dev/null; then
        python3.11 -m venv "$venv"
    else # an image with another Python: uv installs the tested version
        command -v pip3 >/dev/null || { sudo apt-get update -q && sudo apt-get install -qy python3-pip; }
        pip3 install --quiet --user "$(grep '^uv==' "$pins")"
        "$HOME/.local/bin/uv" venv --seed --python 3.11 "$venv"
    fi
fi
"$venv/bin/pip" install --quiet --disable-pip-version-check --constraint "$pins" "$project" "$@"

# Ray starts nodes through a login shell, which must find this `ray` first, and the cluster's token.
line="source $project/cluster_yaml/node/environment.sh"
grep -qxF "$line" ~/.bashrc 2>/dev/null || printf '%s\n%s\n' "$line" "$(cat ~/.bashrc 2>/dev/null)" >~/.bashrc
touch "$stamp"
