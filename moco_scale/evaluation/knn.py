"""k-nearest-neighbour (kNN) classification of features, which needs no training.

The weighted vote of "Unsupervised Feature Learning via Non-Parametric Instance Discrimination"
(Wu et al., CVPR 2018, section 3.4): each of the k most similar images of the bank votes for its
class with weight exp(cosine similarity / temperature).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moco_scale.data.open import data_set
from moco_scale.data.remote.prefetch import NOWHERE
from moco_scale.data.remote.shard_source import ShardSource
from moco_scale.data.shards.protocols import Shards
from moco_scale.distributed import collectives
from moco_scale.evaluation.features import Encode, SkippedImages, chosen_output, extract
from moco_scale.models.encoder import Encoder
from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable

_SIMILARITIES_AT_ONCE = 1 << 24  # 64 MiB in fp32


def weighted_knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    num_classes: int,
    *,
    k: int = 200,
    temperature: float = 0.1,
) -> dict[str, float]:
    """Classify each query by its neighbours in the bank, on this process only.

    Args:
        bank: [N, D] in any floating dtype; normalised here.
        bank_labels: int64 [N], each in [0, num_classes).
        queries: [Q, D], on the bank's device.
        query_labels: int64 [Q].
        num_classes: C.
        k: neighbours that vote; all of a smaller bank.
        temperature: of the votes' weights.

    Returns:
        ``top1`` and ``top5`` in percent of the queries. Classes rank by their sum of votes, equal
        ones by number; a query counts for top-5 when its class is among the first 5.

    Raises:
        UserError: There are no images, images without labels, labels out of range, or k or
            temperature is not positive.
    """
    _check(bank_labels, query_labels, num_classes, k, temperature)
    if not len(bank) or not len(queries):
        raise UserError("kNN needs at least one image in the bank and one to classify")
    hits = _hits(bank, bank_labels, queries, query_labels, num_classes, k, temperature, False)
    return _percent(hits, len(queries))


def _check(
    bank_labels: Tensor, query_labels: Tensor, num_classes: int, k: int, temperature: float
) -> None:
    if k < 1:
        raise UserError(f"--knn-k {k}: at least one neighbour must vote")
    if not temperature > 0:
        raise UserError(f"--knn-t {temperature}: must be greater than 0")
    for labels, what in ((bank_labels, "bank"), (query_labels, "images to classify")):
        if len(labels) and int(labels.min()) < 0:
            raise UserError(
                f"kNN needs labels, and {int((labels < 0).sum())} of the {what} have none"
            )
        if len(labels) and int(labels.max()) >= num_classes:
            raise UserError(
                f"the {what} have a label {int(labels.max())} but there are {num_classes} classes"
            )


def _percent(hits: Tensor, queries: int) -> dict[str, float]:
    top1, top5 = (100.0 * hits.double() / queries).tolist()
    return {"top1": top1, "top5": top5}


def _hits(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    num_classes: int,
    k: int,
    temperature: float,
    spread: bool,
) -> Tensor:
    """Count queries right at top-1 and at top-5: int64 [2].

    With ``spread`` the bank is this rank's share; queries and result are the same on every rank.
    """
    device = bank.device
    bank = F.normalize(bank.float(), dim=1)
    queries = F.normalize(queries.float(), dim=1)
    bank_labels, query_labels = bank_labels.to(device), query_labels.to(device)
    share = torch.tensor([len(bank)])
    total, largest = len(bank), len(bank)
    if spread:
        shares = collectives.all_gather_rows(share)
        total, largest = int(shares.sum()), int(shares.max())
    if not total or not len(queries):
        raise UserError(f"kNN needs images: {total} in the bank, {len(queries)} to classify")
    hits = torch.zeros(2, dtype=torch.int64, device=device)
    k = min(k, total)
    rows = max(1, _SIMILARITIES_AT_ONCE // max(largest, num_classes, 1))
    for chunk, truth in zip(queries.split(rows), query_labels.split(rows), strict=True):
        similarity, voted = _nearest(chunk, bank, bank_labels, k, spread)
        # Relative to the nearest: a small temperature neither overflows nor rounds all to 0.
        weight = torch.exp((similarity - similarity[:, :1]) / temperature)
        votes = weight.new_zeros(len(chunk), num_classes).scatter_add_(1, voted, weight)
        ranking = votes.argsort(dim=1, descending=True, stable=True)[:, :5]
        right = ranking == truth[:, None]
        hits += torch.stack([right[:, 0].sum(), right.sum()])
    return hits.cpu()


def _nearest(
    chunk: Tensor, bank: Tensor, bank_labels: Tensor, k: int, spread: bool
) -> tuple[Tensor, Tensor]:
    """Find similarities and labels, each [q, k], of the k nearest in all ranks' banks."""
    mine = min(k, len(bank))
    similarity, place = (chunk @ bank.T).topk(mine, dim=1)
    labels = bank_labels[place]
    if not spread or collectives.world_size() == 1:
        return similarity, labels
    # A share smaller than k is padded with infinitely far neighbours.
    similarity = F.pad(similarity, (0, k - mine), value=-torch.inf)
    labels = F.pad(labels, (0, k - mine))
    by_rank = (collectives.world_size(), len(chunk), k)
    all_similarity = collectives.all_gather_rows(similarity).view(by_rank).transpose(0, 1)
    all_labels = collectives.all_gather_rows(labels).view(by_rank).transpose(0, 1)
    similarity, place = all_similarity.flatten(1).topk(k, dim=1)
    return similarity, all_labels.flatten(1).gather(1, place)


class Splits(NamedTuple):
    """Open splits of a data set.

    Attributes:
        train: the train split.
        val: the val split, if there is one.
    """

    train: Shards
    val: Shards | None


def open_splits(data_dir: str | Path | ShardSource, train: Shards | None = None) -> Splits:
    """Open both splits of a set of shards, each once.

    Args:
        data_dir: folder of shards.
        train: its train split, if it is open already.

    Raises:
        UserError: The shards cannot be opened.
    """
    named = data_set(data_dir)
    train = named.open("train") if train is None else train
    return Splits(train, named.open("val") if "val" in named.splits else None)


def unlabelled_split(splits: Splits) -> Shards | None:
    """Find the first split with an image without a label; None: all have labels."""
    for shards in splits:
        if shards is not None and (not len(shards.labels) or int(shards.labels.min()) < 0):
            return shards
    return None


def bank_and_queries(
    splits: Splits, max_bank: int = 0, max_queries: int = 0, seed: int = 0
) -> tuple[Shards, Shards]:
    """Choose the bank, images to compare with, and the queries, images to classify.

    The bank is the train split, the queries the val split. Without a val split, a seeded tenth of
    the train split is held out of the bank as queries.

    Args:
        splits: of a set of shards.
        max_bank: size of a seeded choice; 0 takes all.
        max_queries: likewise.
        seed: of the choices.

    Raises:
        UserError: There is only one image.
    """
    bank, queries = splits
    if queries is not None:
        return _some(bank, max_bank, seed), _some(queries, max_queries, seed + 1)
    if len(bank) < 2:
        raise UserError(f"{bank.name} has one image: nothing to compare it with")
    order = _chosen_first(bank, seed)
    held_out = max(len(bank) // 10, 1)
    queries = bank.subset(np.sort(order[:held_out]))
    rest = bank.subset(np.sort(order[held_out:]))
    return _some(rest, max_bank, seed), _some(queries, max_queries, seed + 1)


def _some(shards: Shards, limit: int, seed: int) -> Shards:
    if not limit or len(shards) <= limit:
        return shards
    return shards.subset(np.sort(_chosen_first(shards, seed)[:limit]))


def _chosen_first(shards: Shards, seed: int) -> np.ndarray:
    """Seeded random order of the images, int64 [N], of which the first are chosen.

    Remote images stay together shard by shard: a few of each shard would cost a transfer of all.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    parts = shards.remote_parts()
    if not parts:
        return generator.permutation(len(shards))
    together = np.arange(len(shards))
    for number, part in enumerate(parts, start=1):
        places = part.first + np.flatnonzero(part.shard_of != NOWHERE)
        together[places] = (number << 32) + part.shard_of[places - part.first].astype(np.int64)
    groups, group_of = np.unique(together, return_inverse=True)
    return np.argsort(generator.permutation(len(groups))[group_of], kind="stable")


@dataclass(frozen=True)
class KnnMonitor:
    """kNN evaluation of an encoder on fixed images, repeatable during training.

    All ranks use it together: each encodes its share of the images and searches its share of
    the bank; only queries and nearest neighbours travel.

    Attributes:
        bank: images that vote.
        queries: images to classify.
        image_size: see :class:`~moco_scale.evaluation.features.Pixels`, as the next three.
        resize_ratio: see there.
        mean: see there.
        std: see there.
        k: neighbours that vote.
        temperature: of the votes' weights.
        batch_size: images encoded at once on each rank.
        num_workers: decoding processes on each rank.
        autocast: half-precision type; None is fp32.
        label: in progress reports; empty: no reports.
        skipped: as of :func:`~moco_scale.evaluation.features.extract`.
    """

    bank: Shards
    queries: Shards
    image_size: int
    resize_ratio: float
    mean: Sequence[float]
    std: Sequence[float]
    k: int = 200
    temperature: float = 0.1
    batch_size: int = 256
    num_workers: int = 2
    autocast: torch.dtype | None = None
    label: str = ""
    skipped: SkippedImages | None = None

    def __post_init__(self) -> None:
        # Refuse before hours of training, not after them.
        why = self.bank.why_unlabelled or self.queries.why_unlabelled
        if why:
            raise UserError(f"kNN needs labels, and those of {self.bank.name} are not used: {why}")
        bank, queries = (torch.tensor(s.labels) for s in (self.bank, self.queries))
        _check(bank, queries, self.num_classes, self.k, self.temperature)

    @property
    def hopeless(self) -> str:
        """Warning about queries whose classes the bank lacks; "" when there are none."""
        strangers = ~np.isin(self.queries.labels, self.bank.labels)
        if not strangers.any():
            return ""
        missing = np.unique(self.queries.labels[strangers])
        names = self.queries.classes
        first = names[missing[0]] if missing[0] < len(names) else missing[0]
        classes = f"{len(missing)} class{'es' * (len(missing) != 1)}"
        return (
            f"kNN: {int(strangers.sum())} of the {len(self.queries)} {self.queries.split} images "
            f"are of {classes} that the {len(self.bank)} {self.bank.split} images of the bank "
            f"lack (first: {printable(first, 60)}): they always count as wrong"
        )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        highest = max(int(self.bank.labels.max()), int(self.queries.labels.max()))
        return max(len(self.bank.classes), highest + 1)

    def measure(
        self,
        encoder: Encoder,
        which: str = "projection",
        between: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """Measure ``top1`` and ``top5`` of an encoder in percent, the same on every rank.

        Args:
            encoder: on this process's device; keeps its modes.
            which: ``"features"`` (the backbone's) or ``"projection"`` (the head's).
            between: as of :func:`~moco_scale.evaluation.features.extract`.

        Raises:
            UserError: An image cannot be read.
        """
        return self.measure_function(chosen_output(encoder, which), between)

    def measure_function(
        self, encode: Encode, between: Callable[[], None] | None = None
    ) -> dict[str, float]:
        """Measure any function float32 [B, 3, S, S] -> [B, D], such as flattened pixels."""
        bank, bank_labels = self._features(encode, self.bank, False, between)
        queries, query_labels = self._features(encode, self.queries, True, between)
        hits = _hits(
            bank,
            bank_labels,
            queries,
            query_labels,
            self.num_classes,
            self.k,
            self.temperature,
            spread=True,
        )
        return _percent(hits, len(queries))

    def _features(
        self, encode: Encode, shards: Shards, gather: bool, between: Callable[[], None] | None
    ) -> tuple[Tensor, Tensor]:
        return extract(
            encode,
            shards,
            image_size=self.image_size,
            resize_ratio=self.resize_ratio,
            mean=self.mean,
            std=self.std,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            autocast=self.autocast,
            gather=gather,
            label=self.label and f"{self.label}, {shards.split}",
            skipped=self.skipped,
            between=between,
        )
