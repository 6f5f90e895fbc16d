"""Which errors mean that another process is gone."""

import pytest
import torch.distributed as dist

from moco_scale.utils.errors import first_line, is_peer_gone

NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3699, "
PAIR = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] "


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(PAIR + "Connection closed by peer [10.73.0.2]:48213"),
        RuntimeError(PAIR + "Connection reset by peer"),
        RuntimeError(PAIR + "Read error [10.73.0.2]:48213: Connection timed out"),
        RuntimeError(PAIR + "Read error [10.73.0.2]:48213: No route to host"),
        RuntimeError(PAIR + "Write error [10.73.0.2]:48213: Broken pipe"),
        RuntimeError("Application timeout caused pair closure"),
        RuntimeError("Timed out waiting 1800000ms for recv operation to complete"),
        RuntimeError(
            "Gloo connectFullMesh failed with timed out connecting: SO_ERROR: Connection refused, "
            "remote=[10.73.0.2]:48213"
        ),
        RuntimeError("Socket Timeout"),
        RuntimeError("Connection refused"),
        dist.DistNetworkError("failed to recv, got 0 bytes"),
        dist.DistStoreError("wait timeout after 1800000ms, keys: /default_pg/0/1"),
        dist.DistBackendError("NCCL communicator was aborted on rank 3."),
        dist.DistBackendError("NCCL communicator was aborted after a previous error"),
        dist.DistBackendError(
            NCCL + "remote process exited or there was a network error, NCCL version 2.27.5\n"
            "ncclRemoteError: A call failed possibly due to a network error or a remote process "
            "exiting prematurely."
        ),
        dist.DistBackendError(
            NCCL + "unhandled system error (run with NCCL_DEBUG=INFO for details)\n"
            "ncclSystemError: System call (e.g. socket, malloc) or external library call failed"
        ),
    ],
    ids=lambda error: str(error)[-40:],
)
def test_what_the_network_says_of_others(error: RuntimeError) -> None:
    assert is_peer_gone(error)


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError(
            NCCL + "invalid usage (run with NCCL_DEBUG=WARN for details)\nncclInvalidUsage: This "
            "usually reflects invalid usage of NCCL library.\nLast error:\nDuplicate GPU detected "
            ": rank 1 and rank 0 both on CUDA device 3b000"
        ),
        dist.DistBackendError(NCCL + "invalid argument (run with NCCL_DEBUG=WARN for details)"),
        dist.DistBackendError(
            NCCL + "unhandled cuda error\nncclUnhandledCudaError: Call to CUDA function failed.\n"
            "Last error:\nCuda failure 2 'out of memory'"
        ),
        dist.DistBackendError(
            NCCL
            + "unhandled system error\nLast error:\nError while creating shared memory segment "
            "/dev/shm/nccl-7jQ2Xa (size 9637888)"
        ),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        ZeroDivisionError("division by zero"),
    ],
    ids=lambda error: str(error)[-40:],
)
def test_what_is_a_fault_of_one_s_own(error: Exception) -> None:
    assert not is_peer_gone(error)


def test_an_error_that_says_nothing_is_named_by_its_kind() -> None:
    assert first_line(dist.DistNetworkError("")) == "DistNetworkError"
    assert first_line(RuntimeError("\n timed out\nat rank 1")) == "timed out"
