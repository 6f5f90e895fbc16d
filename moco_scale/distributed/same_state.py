"""Check that ranks are still in the same state, by a few numbers that must be equal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moco_scale.distributed import collectives
from moco_scale.utils.errors import PeerLost
from moco_scale.utils.text import some_of

_SAMPLED = 64  # elements of each tensor
_NAMED = 6


def require_same_state(numbers: Mapping[str, int | Tensor], step: int) -> None:
    """Compare numbers by name over all ranks; every rank calls it.

    Args:
        numbers: the same names on every rank; Python integers, or int64 scalars on the device.
        step: of the run.

    Raises:
        PeerLost: Ranks differ; the message names them and the numbers.
    """
    if collectives.world_size() == 1:
        return
    row = torch.stack([torch.as_tensor(value).cpu() for value in numbers.values()])
    table = collectives.all_gather_rows(row[None])
    if bool((table == table[0]).all()):
        return
    found = differences(table.tolist(), list(numbers), collectives.hosts())
    raise PeerLost(
        f"after step {step} the ranks are no longer in the same state: {'; '.join(found)}. "
        "Start the same command again: it resumes from the newest checkpoint, which is good. If "
        "it happens again on the same host, take that host out of the job"
    )


def differences(
    table: Sequence[Sequence[int]], names: Sequence[str], hosts: Sequence[str]
) -> list[str]:
    """Describe, for each name whose values differ, the ranks that differ from most.

    Args:
        table: [ranks][names].
        names: of the columns.
        hosts: of the ranks.
    """
    found = []
    for name, values in zip(names, zip(*table, strict=True), strict=True):
        counts = Counter(values).most_common()
        if len(counts) == 1:
            continue
        most, times = counts[0]
        even = times == counts[1][1]
        odd = [rank for rank, value in enumerate(values) if even or value != most]
        shown = [f"rank {rank} on {hosts[rank]} has {values[rank]}" for rank in odd]
        where = "" if even else f" (most have {most})"
        found.append(f"{name}: {some_of(shown, _NAMED)}{where}")
    return found


@torch.no_grad()
def sampled_hash(tensors: Sequence[Tensor], turn: int) -> Tensor:
    """Hash the bits of a few elements of each tensor.

    Args:
        tensors: of 2- or 4-byte floating-point numbers.
        turn: selects other elements each time; in the end all have been compared.

    Returns:
        int64 scalar on their device.
    """
    kinds = {2: torch.int16, 4: torch.int32}
    samples = []
    for tensor in tensors:
        flat = tensor.reshape(-1)
        stride = max(flat.numel() // _SAMPLED, 1)
        sample = flat[turn % stride :: stride]
        samples.append(sample.view(kinds[sample.element_size()]).long())
    bits = torch.cat(samples)
    places = torch.arange(len(bits), device=bits.device)
    # Odd multipliers lose no bit; overflow beyond 64 bits is dropped.
    return (bits * (places * 2654435762 + 1)).sum()
