#!/usr/bin/env bash
# Pretrain on the hosts of a hostfile with DeepSpeed's launcher. Arguments are train.py's.
#
# With ssh: once, on any host that may log in to all of them without a password.
#
#     scripts/deepspeed_hostfile.sh --recipe v2 --data-dir /shared/imagenet --output-dir /shared/run
#
#   It needs pdsh here and sshd on all hosts, the checkout and its .venv at the same path on all of
#   them, and ssh keys: `ssh node2 hostname` has to answer without a question.
#
# Without ssh: on every host, with its place in the hostfile.
#
#     NODE_RANK=0 MASTER_ADDR=node1 scripts/deepspeed_hostfile.sh ...   # on the first host
#     NODE_RANK=1 MASTER_ADDR=node1 scripts/deepspeed_hostfile.sh ...   # on the second
#
# Environment:
#   HOSTFILE     default: the file `hostfile` beside this one.
#   NODE_RANK    line of this host in it, from 0; when set, nothing is started on other hosts.
#   MASTER_ADDR  address of the first host; needed with NODE_RANK. Otherwise DeepSpeed asks the
#                first host for its addresses and takes the first, which may be the wrong network.
#   MASTER_PORT  default: 29500. It must be free on the first host and open to the others.
#   DEEPSPEED    default: .venv/bin/deepspeed
#   CONFIG       DeepSpeed's JSON; default: ds_configs/zero1.json
#   INTERFACE    the network interface; see scripts/environment.sh.
#   DS_ENV_FILE  variables for the processes on all hosts, NAME=VALUE a line; default: DeepSpeed's,
#                .deepspeed_env in the home folder and in the checkout.
#
# The same command again goes on from the newest checkpoint. The status is 75 when a signal or
# --max-time has stopped the run and all is saved. pdsh does not pass signals on: to stop an ssh
# run in an orderly way, send SIGTERM to the train.py processes, or start it with --max-time.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

options=(--hostfile "${HOSTFILE:-scripts/hostfile}" --master_port "${MASTER_PORT:-29500}")
if [ -n "${MASTER_ADDR:-}" ]; then
    options+=(--master_addr "$MASTER_ADDR")
fi
if [ -n "${NODE_RANK:-}" ]; then
    : "${MASTER_ADDR:?NODE_RANK needs MASTER_ADDR, the address of the first host}"
    options+=(--no_ssh --node_rank "$NODE_RANK")
else
    # The shells that pdsh opens inherit nothing. DeepSpeed hands on what begins with NCCL or
    # PYTHON, and what a file says, a line for each variable, the last of which counts: what is set
    # here, then what the user's own files say, which this one takes the place of.
    name="${DS_ENV_FILE:-.deepspeed_env}"
    case "$name" in
        /*) given=("$name") ;;
        *) given=("$HOME/$name" "$name") ;;
    esac
    DS_ENV_FILE="$(mktemp)"
    trap 'rm -f "$DS_ENV_FILE"' EXIT
    export DS_ENV_FILE
    for name in OMP_NUM_THREADS GLOO_SOCKET_IFNAME; do
        [ -z "${!name:-}" ] || echo "$name=${!name}" >> "$DS_ENV_FILE"
    done
    for file in "${given[@]}"; do
        # DeepSpeed fails at a line that is empty or a comment.
        [ ! -f "$file" ] || grep -E '^[A-Za-z_][A-Za-z0-9_]*=' "$file" >> "$DS_ENV_FILE" || true
    done
fi
"${DEEPSPEED:-.venv/bin/deepspeed}" "${options[@]}" \
    train.py --deepspeed "${CONFIG:-ds_configs/zero1.json}" "$@"
