# shellcheck shell=bash
# What every process of the cluster runs with; read by login shells and by the scripts beside it.
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PATH="$project/.venv/bin:$PATH"
export RAY_AUTH_MODE=token                 # the token is ~/.ray/auth_token on every node
export RAY_TRAIN_ENABLE_STATE_TRACKING=1   # what the dashboard shows of trainers
export RAY_JOB_STOP_WAIT_TIME_S=60         # what a driver has for its last checkpoint
# What the head remembers: on the disk that outlives it, where there is one.
MOEDISCO_HOME=$( [ -d /moedisco ] && echo /moedisco || echo "$HOME/moedisco-state" )
export MOEDISCO_HOME MOEDISCO_RUNS="${MOEDISCO_RUNS:-$MOEDISCO_HOME/runs}" MOEDISCO_DATA="${MOEDISCO_DATA:-$MOEDISCO_HOME/data}"
export XDG_CONFIG_HOME="$MOEDISCO_HOME/config"  # the service's address, for this user's commands
