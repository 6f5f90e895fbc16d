#!/usr/bin/env bash
# Pretrain on several hosts with torchrun, which starts all processes again when one is lost.
# On every host, with the same values:
#
#     RENDEZVOUS=node1:29400 NODES=2 scripts/torchrun_elastic.sh --recipe v2 --data-dir /shared/imagenet
#
# Arguments are train.py's. Hosts may be started in any order, and one that has crashed may be
# started again, or replaced by another: whenever somebody is lost or comes, torchrun ends all
# processes, waits until NODES hosts are there, and starts them again; train.py goes on from the
# newest checkpoint by itself. So lose little: --checkpoint-freq 500 saves every 500 steps.
#
# Environment:
#   RENDEZVOUS    HOST:PORT where hosts meet. The host has to be one of them and to stay; the port
#                 must be free there and open to the others, as are those above 32767, which
#                 processes then connect through.
#   NODES         hosts, or MIN:MAX. Processes must divide the global batch, whatever comes.
#   GPUS          processes a host; default: as many as it has GPUs.
#   RUN_ID        told apart from other runs that meet there; default: moco.
#   MAX_RESTARTS  default: 10. A wrong flag is started again as often as a crash: try --preflight.
#   TORCHRUN      default: .venv/bin/torchrun
#   INTERFACE     the network interface; see scripts/environment.sh.
#
# To stop, send SIGTERM to torchrun on every host: all processes save and end. It waits 30 seconds
# for its own before it kills them. (For torchrun a process that has saved and left is one that
# failed. So do not use --max-time here: it would be followed by a restart.)
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

: "${RENDEZVOUS:?name where hosts meet: RENDEZVOUS=HOST:PORT}"
exec "${TORCHRUN:-.venv/bin/torchrun}" \
    --nnodes "${NODES:?say how many hosts take part: NODES=2, or NODES=MIN:MAX}" \
    --nproc-per-node "${GPUS:-gpu}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$RENDEZVOUS" \
    --rdzv-id "${RUN_ID:-moco}" \
    --max-restarts "${MAX_RESTARTS:-10}" \
    train.py "$@"
