"""Bad images of a run, which cannot be decoded: counted, listed, logged, and limited."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moco_scale.data.loading.bad_samples import BadSample
from moco_scale.data.loading.loader import ViewBatch
from moco_scale.distributed import collectives, consensus
from moco_scale.observe.side_files import SideFile, json_line, keep_lines
from moco_scale.untrusted.bad_sample import BadSampleLine
from moco_scale.untrusted.documents import DocumentError, parse_document
from moco_scale.utils.errors import UserError
from moco_scale.utils.log import log
from moco_scale.utils.text import printable

FILE = "bad_samples.jsonl"
FEWEST = 10
"""Number of bad images that never ends a run: too few to estimate their share."""

_LOGGED = 10  # of the bad images found between two reports, one line each
_SHARDS_LOGGED = 5


class BadImages:
    """Bad images of one run, on all ranks together.

    Each is listed once, at the first step that would have seen it, in the order of the steps: the
    list does not depend on ranks, workers or interruptions.

    Args:
        folder: of the run.
        advice: how to find out more when too many are bad.
        batch: global.
        num_samples: in the data set.
        max_share: upper bound of bad images among those read so far.
    """

    def __init__(
        self, folder: Path, advice: str, batch: int, num_samples: int, max_share: float
    ) -> None:
        self.path = folder / FILE
        self._advice, self._batch, self._total, self._max = advice, batch, num_samples, max_share
        self._known: set[int] = set()
        self._found: list[tuple[int, int, BadSample]] = []
        self._by_shard: Counter[str] = Counter()

    def begin(self, step: int, file: SideFile) -> None:
        """Continue the list of a run that resumes after a step; all ranks call it.

        Args:
            step: the last that was run.
            file: the list, which rank 0 appends to.
        """
        self._file = file
        self._known, self._by_shard = consensus.broadcast_from_main(lambda: self._up_to(step))

    def _up_to(self, step: int) -> tuple[set[int], Counter[str]]:
        """Read samples and counts by shard from the list, and drop entries of later steps."""
        known, by_shard, foreign = set[int](), Counter[str](), 0

        def wanted(line: bytes) -> bool:
            nonlocal foreign
            entry = _entry(line)
            foreign += entry is None and line.endswith(b"\n")
            if entry is None or entry.step > step:
                return False
            known.add(entry.sample)
            by_shard[printable(entry.shard)] += 1
            return True

        try:
            keep_lines(self.path, wanted)
        except OSError as error:
            log.warning(f"{self.path}: {error.strerror or error}; training continues")
        if foreign:
            log.warning(f"{self.path}: dropped {foreign} lines that are no entries of this list")
        return known, by_shard

    def add(self, batch: ViewBatch) -> None:
        """Add this rank's bad images of a batch."""
        self._found += [
            (batch.step + 1, batch.epoch, bad) for bad in batch.bad if bad.sample not in self._known
        ]

    def collect(self, step: int) -> list[str]:
        """Gather the bad images of all ranks up to a step; all ranks call it.

        Returns:
            Lines for the log.

        Raises:
            UserError: Too many images are bad; on every rank.
        """
        count = torch.tensor([len(self._found)])
        if not int(collectives.sum_(count)):
            return []
        found = collectives.gather_objects(self._found)
        self._found = []
        new: dict[int, dict[str, Any]] = {}
        for when, epoch, bad in sorted(item for each in found for item in each):
            if bad.sample not in self._known | new.keys():
                new[bad.sample] = {**bad._asdict(), "step": when, "epoch": epoch}
        self._known |= new.keys()
        self._by_shard.update(printable(record["shard"]) for record in new.values())
        if collectives.is_main():
            for record in new.values():
                self._file.add(json_line(record))
        self._check(step)
        return self._lines(list(new.values()))

    def _check(self, step: int) -> None:
        bad, read = len(self._known), min(step * self._batch, self._total)
        if bad <= max(self._max * read, FEWEST):
            return
        raise UserError(
            f"{bad} of the {read} images read so far cannot be decoded, more than "
            f"--max-bad-share {self._max:g} allows ({self._shards()}); {self.path} lists them. "
            f"{self._advice}; if you expect so many bad images, start again with a higher "
            "--max-bad-share"
        )

    def _lines(self, new: Sequence[dict[str, Any]]) -> list[str]:
        lines = [
            f"cannot decode sample {r['sample']} in {printable(r['shard'])}"
            + (f" (key {printable(r['key'])})" if r["key"] else "")
            + f": {r['reason']}; replaced by sample {r['replacement']}"
            for r in new[:_LOGGED]
        ]
        more = f", {len(new) - _LOGGED} more than are named here" if len(new) > _LOGGED else ""
        lines.append(
            f"bad images so far: {len(self._known)} ({self._shards()}){more}; listed in {FILE}"
        )
        return lines

    def _shards(self) -> str:
        """Count bad images of each shard, the worst first."""
        ranked = sorted(self._by_shard.items(), key=lambda item: (-item[1], item[0]))
        text = ", ".join(f"{shard}: {count}" for shard, count in ranked[:_SHARDS_LOGGED])
        rest = len(ranked) - _SHARDS_LOGGED
        return text + (f", and {rest} more shards" if rest > 0 else "")


def _entry(line: bytes) -> BadSampleLine | None:
    """Read a line of the list; None for one cut short by a kill, or no entry."""
    if not line.endswith(b"\n"):
        return None
    try:
        return parse_document(line, BadSampleLine, "a line")
    except DocumentError:
        return None
