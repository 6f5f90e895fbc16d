#!/usr/bin/env bash
# Pretrain without any launcher: one process for each terminal, on one host or on several.
#
#     scripts/two_terminals.sh 0 2 node1 --recipe v2 --data-dir data/mine     # in one terminal
#     scripts/two_terminals.sh 1 2 node1 --recipe v2 --data-dir data/mine     # in another
#
# RANK, WORLD_SIZE and the address of rank 0's host (HOST or HOST:PORT; port 29500 if it is not
# said), then train.py's arguments. The order in which they are started does not matter.
#
# Environment:
#   LOCAL_RANK  which GPU of its host a process takes. Default: with localhost or 127.0.0.1 its
#               RANK, otherwise 0, as for hosts with a process each.
#   PYTHON      default: .venv/bin/python
#   INTERFACE   the network interface; see scripts/environment.sh. On one host nothing is needed.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

if [ "$#" -lt 3 ]; then
    echo "usage: $0 RANK WORLD_SIZE HOST[:PORT] [arguments of train.py]" >&2
    exit 2
fi
export RANK="$1" WORLD_SIZE="$2" MASTER_ADDR="${3%:*}" MASTER_PORT=29500
case "$3" in *:*) MASTER_PORT="${3##*:}" ;; esac
shift 3
case "$MASTER_ADDR" in
    localhost | 127.*) export LOCAL_RANK="${LOCAL_RANK:-$RANK}" ;;
    *) export LOCAL_RANK="${LOCAL_RANK:-0}" ;;
esac
exec "${PYTHON:-.venv/bin/python}" -u train.py "$@"
