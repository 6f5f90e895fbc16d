"""Launchers: their environment variables translated to those of ``torchrun``.

``torchrun`` and ``deepspeed`` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
Slurm's ``srun``, Open MPI's ``mpirun``, and PMI's launchers (MPICH, Intel, Cray) have names of
their own. Everything is read from the environment: no scheduler is asked, and torch is not
imported.
"""

from __future__ import annotations

import re
import socket
import zlib
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable

SCHEDULERS = ("srun", "mpirun", "PMI")
"""Launchers, by :attr:`Place.launcher`, that may show each process its own GPU only."""
DEFAULT_PORT = 29500
# Below the ports that Linux hands out by itself (from 32768), above those of services.
_PORTS = range(12000, 32000)


class Place(NamedTuple):
    """Place of this process in a job.

    Attributes:
        launcher: its name in messages.
        rank: in the whole job.
        world_size: processes of the job.
        local_rank: on this host.
        local_world_size: processes on this host; None when the launcher does not say.
        address: of rank 0's host; None when the launcher does not say.
        port: likewise.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None = None
    address: str | None = None
    port: int | None = None


def rank_of(environ: Mapping[str, str]) -> int:
    """Rank of this process; 0 where the environment has none, or nonsense."""
    try:
        place = find_place(environ)
    except UserError:
        return 0
    return place.rank if place else 0


def speaker(environ: Mapping[str, str]) -> str:
    """Return the beginning of a message of this rank only: "rank 3 on node-b: "; "" of rank 0."""
    rank = rank_of(environ)
    return f"rank {rank} on {socket.gethostname()}: " if rank else ""


_OWN_VARIABLES = (
    ("TORCHELASTIC_RUN_ID",),
    ("CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE"),
    ("SLURM_STEP_ID", "SLURM_PROCID"),
    ("OMPI_COMM_WORLD_RANK",),
    ("PMI_RANK", "PMI_SIZE"),
)
"""Variables of torchrun, deepspeed, srun, mpirun and PMI's launchers that nobody sets by hand."""


def has_launcher(environ: Mapping[str, str]) -> bool:
    """Tell whether a launcher has started this process, and not a shell."""
    return any(environ.keys() >= set(names) for names in _OWN_VARIABLES)


def started_by_deepspeed(environ: Mapping[str, str]) -> bool:
    """Tell whether deepspeed has started this process."""
    return environ.keys() >= set(_OWN_VARIABLES[1]) and "TORCHELASTIC_RUN_ID" not in environ


def gpu_of(place: Place, visible: int) -> int | None:
    """Index of this process's GPU among those it sees; None: it has none.

    Processes of torchrun or deepspeed count by host, also where a scheduler, whose variables they
    inherit, has started the launcher.
    """
    if visible == 1 and place.launcher in SCHEDULERS:
        return 0  # the scheduler has hidden the other tasks' GPUs
    return place.local_rank if place.local_rank < visible else None


def complete_environment(environ: MutableMapping[str, str]) -> Place:
    """Set RANK, WORLD_SIZE, LOCAL_RANK and, for several processes, MASTER_ADDR and MASTER_PORT.

    Variables that are set stay. LOCAL_WORLD_SIZE is set where it is known.

    Returns:
        The place of this process, from the variables set before.

    Raises:
        UserError: The environment contradicts itself, or is incomplete.
    """
    place = find_place(environ)
    if place is None:
        place = Place("no launcher", 0, 1, 0, 1)
    if place.world_size < 1:
        raise UserError(f"{place.launcher}: a job of 0 processes; there is at least 1")
    if not 0 <= place.rank < place.world_size:
        raise UserError(
            f"{place.launcher}: rank {place.rank} of {place.world_size} processes: ranks are "
            f"numbered from 0 to {place.world_size - 1}"
        )
    environ["RANK"] = str(place.rank)
    environ["WORLD_SIZE"] = str(place.world_size)
    environ["LOCAL_RANK"] = str(place.local_rank)
    if place.world_size > 1:
        address = environ.get("MASTER_ADDR") or place.address
        if address is None:
            raise UserError(
                f"started by {place.launcher} as {place.world_size} processes, but MASTER_ADDR is "
                f"not set: {_HOW_TO_NAME.get(place.launcher, 'name the host of rank 0 in it')}"
            )
        environ["MASTER_ADDR"] = address
        environ["MASTER_PORT"] = environ.get("MASTER_PORT") or str(place.port or DEFAULT_PORT)
        if not 0 < _number(environ, "MASTER_PORT") < 1 << 16:
            raise UserError(f"MASTER_PORT={environ['MASTER_PORT']}: ports are 1 to 65535")
    local = place.local_world_size
    if local is None and environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost"):
        local = place.world_size
    if local is not None:
        environ.setdefault("LOCAL_WORLD_SIZE", str(local))
    return place


_EXPORT = 'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
_HOW_TO_NAME = {
    "mpirun": "mpirun -x MASTER_ADDR=HOST_OF_RANK_0 -x MASTER_PORT=29500 ... names it",
    "PMI": "mpiexec -genv MASTER_ADDR HOST_OF_RANK_0 -genv MASTER_PORT 29500 ... names it",
    "srun": f"{_EXPORT} in the job script",
}


def find_place(environ: Mapping[str, str]) -> Place | None:
    """Find the place of this process; None when no launcher started it.

    Raises:
        UserError: A launcher's variables are incomplete, or not numbers.
    """
    place = _torchrun(environ) or _slurm(environ) or _open_mpi(environ) or _pmi(environ)
    if place is not None:
        return place
    if environ.get("PET_NNODES", "1") != "1":
        raise UserError(
            f"PET_NNODES={environ['PET_NNODES']}: this container is one of several that Kubernetes "
            "has prepared for torchrun; its command has to be `torchrun train.py ...`"
        )
    return None


def _torchrun(environ: Mapping[str, str]) -> Place | None:
    """Read the variables of torchrun, deepspeed and Kubernetes, or set by hand."""
    given = [name for name in ("RANK", "WORLD_SIZE") if name in environ]
    if not given:
        return None
    if len(given) == 1:
        missing = "WORLD_SIZE" if given == ["RANK"] else "RANK"
        raise UserError(
            f"{given[0]}={environ[given[0]]} is set but {missing} is not; set both, or neither for "
            "a single process"
        )
    local = _number(environ, "LOCAL_WORLD_SIZE", -1)
    local = local if local >= 0 else _number(environ, "LOCAL_SIZE", -1)  # deepspeed's name
    return Place(
        "torchrun",
        _number(environ, "RANK"),
        _number(environ, "WORLD_SIZE"),
        _number(environ, "LOCAL_RANK", 0),
        local if local >= 0 else None,
        # One host, unless MASTER_ADDR is set.
        "127.0.0.1",
    )


def _slurm(environ: Mapping[str, str]) -> Place | None:
    # Only a step started by srun has a step id; a batch script has the other variables too.
    if not {"SLURM_STEP_ID", "SLURM_PROCID"} <= environ.keys():
        return None
    counted = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    world, local = _number(environ, counted), None
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    per_node = tasks_per_node(tasks) if tasks else []
    if sum(per_node) == world:  # otherwise they are the whole job's, not this step's
        node = _number(environ, "SLURM_NODEID", 0 if len(per_node) == 1 else None)
        local = per_node[node] if node < len(per_node) else None
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    job = _number(environ, "SLURM_JOB_ID", _number(environ, "SLURM_JOBID", 0))
    return Place(
        "srun",
        _number(environ, "SLURM_PROCID"),
        world,
        _number(environ, "SLURM_LOCALID", 0),
        local,
        first_host(nodes) if nodes else None,
        # Steps of a job may run beside each other, and jobs on shared nodes too.
        _PORTS[(job + 1009 * _number(environ, "SLURM_STEP_ID")) % len(_PORTS)],
    )


def _open_mpi(environ: Mapping[str, str]) -> Place | None:
    if "OMPI_COMM_WORLD_RANK" not in environ:
        return None
    world = _number(environ, "OMPI_COMM_WORLD_SIZE")
    local = _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE")
    return Place(
        "mpirun",
        _number(environ, "OMPI_COMM_WORLD_RANK"),
        world,
        _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
        local,
        _address_without_launcher(environ, one_host=local == world),
        _port_of(environ, "PMIX_NAMESPACE"),
    )


def _pmi(environ: Mapping[str, str]) -> Place | None:
    """Read the variables of MPICH's and Intel's hydra, and of Cray's PALS."""
    if not {"PMI_RANK", "PMI_SIZE"} <= environ.keys():
        return None
    names = {"MPI_LOCALRANKID": "MPI_LOCALNRANKS", "PMI_LOCAL_RANK": "PMI_LOCAL_SIZE"}
    name = next((name for name in names if name in environ), None)
    world = _number(environ, "PMI_SIZE")
    if name is None and world > 1:
        raise UserError(
            "PMI_RANK and PMI_SIZE are set but none of LOCAL_RANK's names "
            f"({', '.join(names)}): set RANK, WORLD_SIZE and LOCAL_RANK yourself"
        )
    local = _number(environ, names[name], -1) if name else 1
    return Place(
        "PMI",
        _number(environ, "PMI_RANK"),
        world,
        _number(environ, name) if name else 0,
        local if local >= 0 else None,
        _address_without_launcher(environ, one_host=local == world),
    )


def _address_without_launcher(environ: Mapping[str, str], *, one_host: bool) -> str | None:
    if one_host:
        return "127.0.0.1"
    nodes = environ.get("SLURM_JOB_NODELIST")  # mpirun inside an allocation
    return first_host(nodes) if nodes else None


def _port_of(environ: Mapping[str, str], name: str) -> int | None:
    """Derive a port that differs between jobs from the job's name; None without a name."""
    value = environ.get(name)
    return _PORTS[zlib.crc32(value.encode()) % len(_PORTS)] if value else None


def why_not_met(environ: Mapping[str, str], said: str) -> str | None:
    """Explain why processes did not meet; None for other failures.

    Args:
        environ: complete.
        said: by torch.
    """
    where = f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
    if "EADDRINUSE" in said:
        return (
            f"{where} is taken: another run, or one that hangs, listens there; end it, or choose "
            "another MASTER_PORT for all processes"
        )
    if "waiting for clients" in said:
        return (
            f"not all {environ['WORLD_SIZE']} processes came to {where} ({said}): were all "
            "started, and can their hosts reach that address?"
        )
    if "client socket" in said or "failed to connect" in said:
        return (
            f"cannot reach rank 0 at {where}: was it started, is that the address of its host in "
            f"a network that this host shares, is the port open? ({said})"
        )
    if "connectFullMesh" in said:
        return (
            f"met the others at {where}, but gloo cannot connect to them: name the network "
            f"interface that all hosts share in GLOO_SOCKET_IFNAME, such as eth0 ({said})"
        )
    return None


def first_host(nodes: str) -> str:
    """First host of Slurm's list: ``gpu[07-12,3],login1`` begins with ``gpu07``.

    Raises:
        UserError: The text is no such list.
    """
    # The first comma outside brackets ends the first entry; brackets do not nest.
    entry = re.match(r"(?:[^\[\],]|\[[^\[\]]*\])+(?=,|$)", nodes.strip())
    # Every bracket gives its first number: rack[1-2]n[1-4] begins with rack1n1.
    host = re.sub(r"\[(\d+)[^\[\]]*\]", r"\1", entry[0]) if entry else ""
    if not re.fullmatch(r"[\w.-]+", host):
        raise UserError(
            f"cannot read the first host from Slurm's list {printable(nodes, 200)!r}; set "
            f"MASTER_ADDR in the job script: {_EXPORT}"
        )
    return host


def tasks_per_node(text: str) -> list[int]:
    """Expand Slurm's short form: ``2(x3),1`` is 2, 2, 2, 1.

    Raises:
        UserError: The text is no such form.
    """
    counts: list[int] = []
    for entry in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", entry.strip())
        if match is None:
            raise UserError(f"cannot read Slurm's tasks per node {printable(text, 200)!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None:
        if default is not None:
            return default
        raise UserError(f"{name} is not set, although the launcher's other variables are")
    number = text.strip()  # of more kinds of white space than int() takes
    if not re.fullmatch(r"\d{1,18}", number):
        raise UserError(f"{name}={printable(text, 60)!r} in the environment is not a number")
    return int(number)
