"""Features of images, extracted by all ranks together."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moco_scale.data.loading.bad_samples import BadSample
from moco_scale.data.loading.loader import evaluation_loader
from moco_scale.data.shards.protocols import Shards
from moco_scale.distributed import collectives, consensus
from moco_scale.distributed.collectives import main_log
from moco_scale.models.encoder import Encoder
from moco_scale.utils.errors import UserError
from moco_scale.utils.progress import progress as shown_progress
from moco_scale.utils.text import some_of

T = TypeVar("T")
Encode = Callable[[Tensor], Tensor]
WHICH = ("features", "projection")
"""The backbone's output, or the head's output, which the contrastive loss compares."""

_SHOWN = 3  # of the images that cannot be decoded


def fetched_here(shards: Shards) -> list[int]:
    """List the ranks for which this one fetches remote images ahead; every rank calls it."""
    if not shards.remote_parts():
        return []
    rank, hosts = collectives.rank(), collectives.hosts()
    here = [number for number, host in enumerate(hosts) if host == hosts[rank]]
    return here if here[0] == rank else []


def chosen_output(encoder: Encoder, which: str) -> Encode:
    """Return the function of an encoder that :data:`WHICH` names.

    Raises:
        UserError: The name is unknown.
    """
    if which not in WHICH:
        raise UserError(f"features {which!r}: choose one of {', '.join(WHICH)}")
    return encoder.features if which == "features" else encoder


@contextlib.contextmanager
def evaluating(encode: Encode) -> Iterator[None]:
    """Set evaluation mode and disable gradients within the block.

    Afterwards each submodule has its own mode again.

    Args:
        encode: a module, a method of one, or a plain function, which has no mode.
    """
    owner = encode if isinstance(encode, nn.Module) else getattr(encode, "__self__", None)
    modules = list(owner.modules()) if isinstance(owner, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


@dataclass(frozen=True)
class Pixels:
    """Crop and normalisation of an encoder's input.

    Attributes:
        image_size: side of the centre crop in pixels.
        resize_ratio: the short side is resized to this times the crop first.
        mean: per channel, of pixels in [0, 1].
        std: likewise.
    """

    image_size: int
    resize_ratio: float
    mean: Sequence[float]
    std: Sequence[float]

    def normalise(self, crops: Tensor) -> Tensor:
        """Convert uint8 [B, 3, S, S] to normalised float32, channels last."""
        mean = torch.tensor(self.mean, device=crops.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=crops.device).view(1, -1, 1, 1)
        return (
            crops.contiguous(memory_format=torch.channels_last)
            .float()
            .div_(255)
            .sub_(mean)
            .div_(std)
        )


class SkippedImages:
    """Images that an evaluation could not decode, the same on every rank; logs each once."""

    def __init__(self) -> None:
        self._bad: dict[tuple[str, str, str, str], BadSample] = {}
        self.counts: Counter[str] = Counter()
        """Different images so far, by split."""
        self.places: set[int] = set()
        """Their numbers in the last set of images."""

    def add(self, shards: Shards, mine: Sequence[BadSample]) -> None:
        """Add this rank's bad images of a set; all ranks call it."""
        met = [bad for found in collectives.gather_objects(list(mine)) for bad in found]
        # Subsets number their images anew; an image's shard and key do not change.
        new = {}
        for bad in sorted(met):
            name = (shards.name, shards.split, bad.shard, bad.key or str(bad.sample))
            if name not in self._bad:
                new[name] = bad
        self._bad |= new
        self.counts[shards.split] += len(new)
        if new:
            shown = [f"{bad.shard} (key {bad.key}): {bad.reason}" for bad in new.values()]
            main_log.warning(
                f"{len(new)} of the {len(shards)} {shards.split} images cannot be decoded and "
                f"{'is' if len(new) == 1 else 'are'} skipped: {some_of(shown, _SHOWN, '; ')}"
            )
        self.places = {bad.sample for bad in met}


def extract(
    encode: Encode,
    shards: Shards,
    *,
    image_size: int,
    resize_ratio: float,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 256,
    num_workers: int = 2,
    autocast: torch.dtype | None = None,
    gather: bool = True,
    label: str = "",
    skipped: SkippedImages | None = None,
    between: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode the centre crops of images, each rank a contiguous share; every rank calls it.

    Modules are in evaluation mode meanwhile, as in :func:`evaluating`.

    Args:
        encode: float32 [B, 3, S, S] -> [B, D], on this process's device.
        shards: the images, the same on every rank.
        image_size: see :class:`Pixels`, as the next three.
        resize_ratio: see there.
        mean: see there.
        std: see there.
        batch_size: images encoded at once on each rank.
        num_workers: decoding processes on each rank.
        autocast: half-precision type of the arithmetic; None computes in fp32.
        gather: False leaves each rank with its own share.
        label: name in progress reports; empty: no reports.
        skipped: collects images that cannot be decoded, which then have no features; None:
            such an image is an error.
        between: called after each batch, by every rank equally often; an error that it raises on
            all ranks ends the extraction.

    Returns:
        Features float32 [N, D] on this process's device and labels int64 [N] on the CPU (-1:
        none) of all images in order (of this rank's share without ``gather``).

    Raises:
        UserError: An image cannot be read on some rank; every rank raises it.
    """
    pixels = Pixels(image_size, resize_ratio, mean, std)
    device, rank, world = collectives.device(), collectives.rank(), collectives.world_size()
    fetches_for = fetched_here(shards)
    # A rank with one batch less, or that has failed, still joins the others' calls.
    rounds = -(-len(range(0, len(shards), world)) // batch_size) if between else 0
    features: list[Tensor] = []
    labels: list[Tensor] = []
    bad: list[BadSample] = []
    failure: UserError | None = None
    try:
        with (
            evaluating(encode),
            evaluation_loader(
                shards,
                image_size,
                resize_ratio,
                batch_size=batch_size,
                rank=rank,
                world=world,
                num_workers=num_workers,
                bad_samples="error" if skipped is None else "skip",
                fetches_for=fetches_for,
            ) as loader,
        ):
            for batch in progress(loader, len(loader), label):
                bad += batch.bad
                if len(batch.index):
                    crops = batch.views[0].to(device, non_blocking=True)
                    with autocasting(autocast):
                        features.append(encode(pixels.normalise(crops)).float())
                    labels.append(batch.labels)
                if between:
                    rounds -= 1
                    between()
    except UserError as error:
        failure = error
    for _ in range(rounds):
        assert between is not None
        between()
    failure = consensus.first_error(failure)
    if failure is not None:
        raise failure
    if skipped is not None:
        skipped.add(shards, bad)
    mine = _concatenated(features, labels, device)
    if not gather:
        return mine
    return collectives.all_gather_uneven_rows(mine[0]), collectives.all_gather_uneven_rows(mine[1])


def _concatenated(
    features: list[Tensor], labels: list[Tensor], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Concatenate batches; a rank without images gets the width from the others."""
    width = torch.tensor([features[0].shape[1] if features else 0])
    width = collectives.all_gather_rows(width).max()
    if not features:
        return torch.empty(0, int(width), device=device), torch.empty(0, dtype=torch.int64)
    return torch.cat(features), torch.cat(labels)


def autocasting(dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Return autocast on this process's device; for None a context that does nothing."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(collectives.device().type, dtype)


def progress(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Yield items; rank 0 shows how many are done, unless the label is empty."""
    shown = label and collectives.is_main()
    return shown_progress(items, label, total, "batches") if shown else iter(items)
