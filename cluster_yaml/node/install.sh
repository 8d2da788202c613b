#!/usr/bin/env bash
# Installs the packages of requirements.txt and this project into ~/moedisco/.venv. Skips what a baked image or an earlier call installed.
# Takes packages from `wheels` below the folder that ~/moedisco/bucket names, if it exists; pip checks their hashes.
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
venv=$project/.venv
lock=$project/cluster_yaml/node/requirements.txt
wheels=$project/wheels
source "$project/cluster_yaml/node/clouds.sh"
sources() { find "$project/moedisco_ray" "$project/service" "$project/pyproject.toml" -type f -not -name '*.pyc' | sort; }
packages_stamp=$venv/.packages-$(sha256sum <"$lock" | cut -c1-16)
project_stamp=$venv/.project-$(sources | xargs -d '\n' sha256sum | sha256sum | cut -c1-16)

fetch_wheels() {
    local bucket
    mkdir -p "$wheels"
    bucket=$(cat "$project/bucket" 2>/dev/null) || return 0
    if declare -F "fetch_${bucket%%://*}" >/dev/null; then
        "fetch_${bucket%%://*}" "$bucket/wheels" "$wheels" ||
            echo "moedisco: no wheels in $bucket; installing from the package index" >&2
    fi
}

make_venv() {
    local python
    if ! python=$(command -v python3.11); then # uv installs the tested version
        command -v pip3 >/dev/null || { sudo apt-get update -q && sudo apt-get install -qy python3-pip; }
        pip3 install --quiet --user --require-hashes --find-links "$wheels" --requirement <(sed -n '/^uv==/,/[^\\]$/p' "$lock")
        "$HOME/.local/bin/uv" python install --quiet 3.11
        python=$("$HOME/.local/bin/uv" python find 3.11)
    fi
    "$python" -m venv "$venv"
}

if ! [ -e "$packages_stamp" ]; then
    fetch_wheels
    [ -x "$venv/bin/python" ] || make_venv
    "$venv/bin/pip" install --quiet --require-hashes --only-binary=:all: --find-links "$wheels" --requirement "$lock"
    rm -rf "$wheels"
    touch "$packages_stamp"
fi
if ! [ -e "$project_stamp" ]; then
    "$venv/bin/pip" install --quiet --no-index --no-deps --no-build-isolation --force-reinstall "$project"
    touch "$project_stamp"
fi

# Ray starts nodes through a login shell, which must find this `ray` first, and the cluster's token.
line="source $project/cluster_yaml/node/environment.sh"
grep -qxF "$line" ~/.bashrc 2>/dev/null || printf '%s\n%s\n' "$line" "$(cat ~/.bashrc 2>/dev/null)" >~/.bashrc
