# shellcheck shell=bash
# Sourced by the launch files beside it: what processes on several hosts need, and why.
# Anything set before stays as it is.

# The network interface to use, for example INTERFACE=ib0 (`ip -br address` lists them). Without it
# gloo asks what this host's own name means, which on many systems is 127.0.1.1, and NCCL takes the
# first interface that is not lo or docker, which may be a management network or a bridge.
if [ -n "${INTERFACE:-}" ]; then
    export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$INTERFACE}"
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$INTERFACE}"
fi

# One thread a process: the processes that decode images use the other cores. torchrun does the
# same; under other launchers every process would start as many threads as the host has cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# NCCL says what is wrong, and nothing else. INFO shows interfaces, rings and transports.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Shards, workers and connections are open files: take what the administrator allows.
ulimit -n "$(ulimit -Hn)" 2> /dev/null || true
# InfiniBand pins memory. With a low limit NCCL fails to register buffers ("Cannot allocate memory").
ulimit -l unlimited 2> /dev/null || true
# The memory of a process with a GPU is large; a crash should not write it to a shared disk.
ulimit -c 0
