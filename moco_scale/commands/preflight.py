"""``train.py --preflight``: is everything in place for a run? Starts it, measures, and leaves.

All that a start does before its first step is done by the start's own code: files read, processes
compared, data opened, the output folder claimed, model and engine built, a checkpoint loaded. This
adds what takes a second or two, the machines and the network, and takes back what was made.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from moco_scale.checkpoints.run_folder import LOCK
from moco_scale.config.schema import Config
from moco_scale.distributed import bandwidth, collectives, same_setup
from moco_scale.distributed.bandwidth import Bandwidth
from moco_scale.distributed.stop_signal import StopRequest
from moco_scale.observe.loggers import Loggers
from moco_scale.observe.phases import Phases
from moco_scale.training.monitor import Monitor
from moco_scale.training.run import Run
from moco_scale.utils.errors import UserError
from moco_scale.utils.log import tell
from moco_scale.utils.process_pool import core_count
from moco_scale.utils.text import printable

GIB = 1 << 30
SHARED_MEMORY = Path("/dev/shm")
CLOCK_LIMIT = 2.0
"""Seconds that clocks may differ before it is worth a line."""
FREE_DISK = 10 * GIB
OPEN_FILES = 4096
WATCHED = ("NCCL_", "GLOO_", "TORCH_NCCL_", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
"""Beginnings of environment variables that decide how a run goes."""


class Machine(NamedTuple):
    """What one process finds where it runs; sizes in bytes.

    Attributes:
        host: its name.
        device: name of the GPU, or "CPU".
        device_id: tells GPUs apart; empty for a CPU.
        memory: of the GPU, else of the host.
        cores: that this process may use.
        shared_memory: free in /dev/shm.
        open_files: that this process may have.
        clock: seconds since 1970, at about the same moment on all.
    """

    host: str
    device: str
    device_id: str
    memory: int
    cores: int
    shared_memory: int
    open_files: int
    clock: float


def run(config: Config, phases: Phases) -> None:
    """Check everything, print it on rank 0; all ranks call it.

    Args:
        config: of the run.
        phases: says that this process gets on, for who watches it.

    Raises:
        UserError: something would keep the run from starting or from going on; what keeps it from
            starting is said in the start's words.
    """
    started = time.monotonic()
    machines = collectives.gather_objects(look())
    share = config.optim.batch_size // collectives.world_size()
    needed = shared_memory_needed(share, config.data.image_size, config.run.num_workers)
    if shared := shared_gpus(machines):  # with which nothing could be built
        raise UserError(_not_ready(shared))
    with _left_as_it_was(config):
        run = Run(config, phases)
        try:
            _say(*_found(run, machines))
            loggers = Loggers(None, run.total_steps, run.step)
            Monitor(run, loggers, StopRequest(0, started)).log_summary(0)
            loggers.close()
            if wrong := problems(machines, needed):
                raise UserError(_not_ready(wrong))
            if len(machines) > 1:
                several = len({machine.host for machine in machines}) > 1
                _say(*_measured(several_hosts=several), "")
            free = shutil.disk_usage(run.folder.path).free
            _say(*(f"note: {line}" for line in notes(machines, free)))
            if run.cache is not None and not run.cache.passing:
                run.cache.close()  # before who made it removes it
            collectives.barrier()
        finally:
            run.folder.release()
            if run.cache is not None:
                run.cache.close()
    _say(f"ready, after {time.monotonic() - started:.1f} s")


def _found(run: Run, machines: Sequence[Machine]) -> list[str]:
    """What a run that could begin its first step is, and where."""
    config, facts = run.config, same_setup.of_run(run.config.flat())
    hosts = {machine.host for machine in machines}
    versions = [f"{n} {v}" for n, v in facts.items() if _is_library(n)]
    settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(WATCHED)]
    start = f"goes on from {run.resumed_from}" if run.resumed_from else "starts at step 0"
    return [
        f"{len(machines)} process(es) on {len(hosts)} host(s), all with the same code, libraries, "
        "flags and index",
        f"code: {facts['code']}",
        f"libraries: {', '.join(versions)}",
        f"data: {len(run.shards)} images, index {run.shards.fingerprint}, "
        f"{run.plan.steps_per_epoch} steps an epoch of {config.optim.batch_size} images",
        f"output: {config.run.output_dir}, seen and writable by all, "
        f"{_gib(shutil.disk_usage(run.folder.path).free)} free",
        f"run: {start}",
        f"environment of rank 0: {printable(' '.join(settings), 2000) or 'nothing of note'}",
        "",
        *machine_table(machines),
        "",
    ]


@contextlib.contextmanager
def _left_as_it_was(config: Config) -> Iterator[None]:
    """Remove within, on rank 0, the folders and the lock that a start makes, where they are new."""
    output = Path(config.run.output_dir)
    lock = output / LOCK
    had_lock = lock.exists()
    made = [p for p in (output, *output.parents) if not p.exists()]
    try:
        yield
    finally:
        if collectives.is_main():
            with contextlib.suppress(OSError):
                if not had_lock:
                    lock.unlink(missing_ok=True)
                for path in made:
                    path.rmdir()


def _not_ready(lines: Sequence[str]) -> str:
    return "not ready:\n" + "\n".join(f"  {line}" for line in lines)


def look() -> Machine:
    """What this process finds; all ranks call it, so that clocks are read at one moment."""
    device = collectives.device()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = properties.name, str(properties.uuid), properties.total_memory
    else:
        gpu = "CPU", "", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    collectives.barrier()
    return Machine(
        socket.gethostname(),
        *gpu,
        core_count(),
        shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0,
        resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        time.time(),
    )


def shared_memory_needed(share: int, image_size: int, num_workers: int) -> int:
    """Bytes of the batches that one process's workers keep ready.

    Args:
        share: images of one process in a batch.
        image_size: side of a crop in pixels.
        num_workers: of this process; without any, batches are not in shared memory.
    """
    crops = 2 * share * 3 * image_size**2
    # Each worker works on one while one waits; the loop holds another.
    return (2 * num_workers + 1) * crops if num_workers else 0


def problems(machines: Sequence[Machine], shared_memory: int) -> list[str]:
    """What would keep a run from going on, a line each.

    Args:
        machines: by rank.
        shared_memory: bytes that each process needs.
    """
    lines = shared_gpus(machines)
    hosts = [machine.host for machine in machines]
    for host in dict.fromkeys(hosts):
        ranks = [rank for rank, each in enumerate(hosts) if each == host]
        free = min(machines[rank].shared_memory for rank in ranks)
        if free < shared_memory * len(ranks):
            lines.append(
                f"{host}: {SHARED_MEMORY} has {_gib(free)} free, the workers of {len(ranks)} "
                f"process(es) need {_gib(shared_memory * len(ranks))}: make it larger (docker run "
                "--shm-size, Kubernetes: an emptyDir of medium Memory), or lower --num-workers"
            )
    return lines


def shared_gpus(machines: Sequence[Machine]) -> list[str]:
    """A line for each GPU that several processes compute on, of which NCCL would not have any."""
    hosts = [machine.host for machine in machines]
    gpus: dict[str, list[int]] = {}
    for rank, machine in enumerate(machines):
        if machine.device_id:
            gpus.setdefault(machine.device_id, []).append(rank)
    return [
        f"{same_setup.ranks_on_hosts(ranks, hosts)} share one GPU: start one process per GPU, each "
        "with LOCAL_RANK"
        for ranks in gpus.values()
        if len(ranks) > 1
    ]


def notes(machines: Sequence[Machine], free_disk: int) -> list[str]:
    """What is worth knowing and stops nothing."""
    lines = []
    hosts = [machine.host for machine in machines]
    first = machines[0].clock
    late = max(range(len(machines)), key=lambda rank: abs(machines[rank].clock - first))
    difference = machines[late].clock - first
    if abs(difference) > CLOCK_LIMIT:
        lines.append(
            f"the clock of {hosts[late]} is {abs(difference):.1f} s "
            f"{'ahead of' if difference > 0 else 'behind'} that of {hosts[0]}: times in logs and "
            "dates of files will not agree"
        )
    kinds = list(dict.fromkeys(machine.device for machine in machines))
    if len(kinds) > 1:
        lines.append(f"processes compute on {', '.join(kinds)}: the slowest sets the pace")
    if free_disk < FREE_DISK:
        lines.append(f"only {_gib(free_disk)} are free for --output-dir")
    few = [rank for rank, machine in enumerate(machines) if 0 <= machine.open_files < OPEN_FILES]
    if few:
        lines.append(
            f"{same_setup.ranks_on_hosts(few, hosts)} may open {machines[few[0]].open_files} files "
            "at a time, which is few for many shards and connections: ulimit -n 65536"
        )
    return lines


def machine_table(machines: Sequence[Machine]) -> list[str]:
    """One line for each kind of process of each host."""
    kinds: dict[tuple[str, ...], list[int]] = {}
    for rank, m in enumerate(machines):
        sizes = _gib(m.memory), str(m.cores), _gib(m.shared_memory), str(m.open_files)
        kinds.setdefault((m.host, m.device, *sizes), []).append(rank)
    rows: list[tuple[str, ...]] = [
        ("ranks", "host", "device", "memory", "cores", "/dev/shm free", "open files"),
        *((same_setup.spans(ranks), *kind) for kind, ranks in kinds.items()),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows
    ]


def _measured(several_hosts: bool) -> list[str]:
    everyone = collectives.neighbours(collectives.world_size())
    columns = [("all processes", bandwidth.measure(everyone))]
    if several_hosts:
        within = bandwidth.measure(collectives.host_group())
        if within.ranks > 1:
            columns.insert(0, ("within a host", within))
    return bandwidth_table(columns)


def bandwidth_table(columns: Sequence[tuple[str, Bandwidth]]) -> list[str]:
    """Figures side by side."""
    heads = [f"{name} ({b.ranks})" for name, b in columns]
    lines = [f"{'bandwidth per process':30}" + "".join(f"{head:>22}" for head in heads)]
    mib = columns[0][1].size >> 20
    for what, values in (
        (f"all-reduce of {mib} MiB", [f"{b.all_reduce / 1e9:.2f} GB/s" for _, b in columns]),
        (f"all-to-all of {mib} MiB", [f"{b.all_to_all / 1e9:.2f} GB/s" for _, b in columns]),
        ("all-reduce of one number", [f"{b.latency * 1e3:.2f} ms" for _, b in columns]),
    ):
        lines.append(f"{what:30}" + "".join(f"{value:>22}" for value in values))
    return lines


def _is_library(name: str) -> bool:
    return name not in ("code", "device") and not name.startswith(("--", "content"))


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _say(*lines: str) -> None:
    if collectives.is_main() and lines:
        tell("\n".join(lines))
