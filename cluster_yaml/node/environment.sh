# shellcheck shell=bash
# Environment of every process of the cluster; read by login shells and by the scripts in this folder.
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# Whether the head at an address answers. A connection to a machine that is gone may hang for minutes.
# shellcheck disable=SC2016  # the inner shell expands it
head_answers() { timeout 5 bash -c 'exec 3<>"/dev/tcp/$0/6379"' "$1" 2>/dev/null; }
export PATH="$project/.venv/bin:$PATH"
export RAY_AUTH_MODE=token                 # the token is ~/.ray/auth_token on every node
export RAY_TRAIN_ENABLE_STATE_TRACKING=1   # lets the dashboard show trainings
export RAY_JOB_STOP_WAIT_TIME_S=60         # time for a driver to upload its last events (s)
# State of the head, on the persistent disk if there is one.
MOEDISCO_HOME=$( [ -d /moedisco ] && echo /moedisco || echo "$HOME/moedisco-state" )
export MOEDISCO_HOME
export XDG_CONFIG_HOME="$MOEDISCO_HOME/config"  # URL of the service for this user's commands
# Address and credentials of your own storage, such as AWS_ENDPOINT_URL=https://HOST:PORT; a cloud's machines have a role instead.
# shellcheck source=/dev/null
if [ -f ~/.moedisco-storage.env ]; then set -a; source ~/.moedisco-storage.env; set +a; fi
