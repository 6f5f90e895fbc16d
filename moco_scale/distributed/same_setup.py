"""Comparison of code, libraries and flags over the processes of a run.

A process with another seed, library version or an edited file would not fail: it would silently
train something else, or wait for ever for a message that the others never send.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import moco_scale
from moco_scale.distributed import collectives
from moco_scale.untrusted.deepspeed_file import located
from moco_scale.utils.errors import UserError
from moco_scale.utils.text import some_of

LIBRARIES = ("torch", "torchvision", "numpy", "simplejpeg", "pillow")
MAY_DIFFER = (
    "data_dir",
    "output_dir",
    "pretrained_model",
    "deepspeed",
    "num_workers",
    "shard_cache",
    "shard_cache_size",
    "log_level",
)
"""Flags that may differ, as paths do between hosts. The contents of the files are compared."""
PACKAGE = Path(moco_scale.__file__).parent


def installation(device: torch.device, engine: str = "") -> dict[str, str]:
    """Versions of the code, its libraries and the device."""
    libraries = (*LIBRARIES, "deepspeed") if engine == "deepspeed" else LIBRARIES
    facts = {"code": code_version(), "python": platform.python_version()}
    facts |= {name: _version(name) for name in libraries}
    facts["device"] = device.type
    if device.type == "cuda":
        facts["CUDA"] = str(torch.version.cuda)
        facts["cuDNN"] = str(torch.backends.cudnn.version())
        facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return facts


def of_run(flags: Mapping[str, object]) -> dict[str, str]:
    """Facts that must be the same on all processes of a run: the installation and flags.

    Args:
        flags: all flags by name with underscores; the DeepSpeed file has been checked.
    """
    facts = installation(collectives.device(), str(flags["engine"])) | of_flags(flags)
    if file := flags["deepspeed"]:
        content = located(str(file)).read_bytes()
        facts["content of the --deepspeed file"] = _short_digest(content)
    return facts


def of_flags(flags: Mapping[str, object]) -> dict[str, str]:
    """Facts of flags by name (with underscores), without those that may differ."""
    return {"--" + k.replace("_", "-"): str(v) for k, v in flags.items() if k not in MAY_DIFFER}


def code_version() -> str:
    """Version of the package and a digest of its files, which may have been edited."""
    content = json.dumps(source_digests(), sort_keys=True).encode()
    return f"moco_scale {moco_scale.__version__}, files {_short_digest(content)}"


def source_digests() -> dict[str, str]:
    """Digests of the package's files, by name."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {str(f.relative_to(PACKAGE)): _short_digest(f.read_bytes()) for f in files}


SAME_START = "start all of them with the same installation and the same flags"
SAME_DATA = "give all of them the same images and the same index"


def require_same(facts: Mapping[str, str], remedy: str = SAME_START) -> None:
    """Raise an error when processes differ; every rank calls it.

    Costs one message of 16 bytes when they are the same.

    Args:
        facts: values to compare, by name.
        remedy: what to do about a difference.

    Raises:
        UserError: Processes differ; the message has each fact with its ranks, hosts and values.
    """
    if collectives.world_size() == 1:
        return
    content = json.dumps(facts, sort_keys=True).encode()
    digest = torch.tensor([list(hashlib.blake2b(content, digest_size=16).digest())])
    if (collectives.all_gather_rows(digest.to(torch.uint8)) == digest).all():
        return
    mine = socket.gethostname(), dict(facts), source_digests()
    hosts, values, digests = zip(*collectives.gather_objects(mine), strict=True)
    lines = [
        f"  {name}: {_values_of_ranks([each.get(name, 'nothing') for each in values], hosts)}"
        for name in dict.fromkeys(name for each in values for name in each)
        if len({each.get(name) for each in values}) > 1
    ]
    names = {name for each in digests for name in each}
    files = sorted(name for name in names if len({each.get(name) for each in digests}) > 1)
    if files:
        lines.append(f"  files of the package that differ: {some_of(files)}")
    raise UserError("the processes differ:\n" + "\n".join(lines) + f"\n{remedy}")


def _values_of_ranks(values: Sequence[str], hosts: Sequence[str]) -> str:
    """List values, rare ones first: ``7 on rank 3 (node-b), 0 on ranks 0-2 (node-a, node-b)``."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    rare_first = sorted(ranks.items(), key=lambda item: (len(item[1]), -item[1][0]))
    return ", ".join(f"{value} on {ranks_on_hosts(have, hosts)}" for value, have in rare_first)


def ranks_on_hosts(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Name ranks and up to four hosts: ``ranks 0-2, 5 (node-a, node-b)``."""
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    shown = ", ".join(names) if len(names) <= 4 else f"{names[0]} and {len(names) - 1} more hosts"
    return f"rank{'s' if len(ranks) > 1 else ''} {spans(ranks)} ({shown})"


def spans(numbers: Sequence[int]) -> str:
    """Write numbers as spans: 0, 1, 2, 5 as ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _short_digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=4).hexdigest()
