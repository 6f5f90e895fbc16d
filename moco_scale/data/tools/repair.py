"""``python -m moco_scale shard --repair DIR``: keep readable images, list the lost ones.

A tar with an intact structure stays as it is: images in it that cannot be decoded are dropped from
the index. A tar with a damaged structure is written anew from its readable members. Replaced files
stay beside the new ones under another name.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moco_scale.data.shards import index_file
from moco_scale.data.shards.scanned_index import find_classes, index_rows, save_rows
from moco_scale.data.shards.tar_scan import ShardScan
from moco_scale.data.tools.examine import (
    Examined,
    Expected,
    Folder,
    examine,
    examine_all,
    list_folder,
)
from moco_scale.data.tools.layout import Skipped
from moco_scale.data.tools.output_folder import LEFT_OUT
from moco_scale.data.tools.salvage import salvage
from moco_scale.data.tools.shard_file import write_errors
from moco_scale.observe.side_files import json_line, json_text
from moco_scale.untrusted.names import relative_problem
from moco_scale.utils.errors import UserError
from moco_scale.utils.files import sync, write_atomically
from moco_scale.utils.log import tell
from moco_scale.utils.text import printable, some_of

_TEMPORARY = ".repaired-"
_MOST_NAMED = 6


class _Shard(NamedTuple):
    """Shard after the repair."""

    name: str  # below the folder
    examined: Examined
    scan: ShardScan
    keep: np.ndarray  # bool, of the scan's images
    new: Path | None  # a tar to put in its place


def repair(path: Path, workers: int) -> int:
    """Repair a folder of shards, if necessary. Returns 0.

    Raises:
        UserError: There are no shards, one cannot be read, nothing of a split can be kept, or
            something cannot be written; the folder is then as it was.
    """
    folder = list_folder(path)
    found = list(examine_all(folder, workers, f"examining {path}"))
    if not folder.problems and not any(examined.findings for _, examined in found):
        tell(f"{path} is whole: nothing to repair")
        if not folder.indexed:
            tell("it has no index of its own and needs none: --data-dir makes one on first use")
        return 0
    for _, examined in found:
        if examined.unreadable:
            raise UserError(
                f"{examined.findings[-1]}. Its images would be lost, so nothing was changed: see "
                "that it can be read, or move it away if it is to be given up."
            )
    lost: list[Skipped] = []
    splits: dict[str, list[_Shard]] = {split: [] for split in folder.splits}
    try:
        with write_errors(path / index_file.INDEX_JSON):
            for split, examined in found:
                shard = _repaired(split, examined, lost)
                if shard is not None:
                    splits[split].append(shard)
            for split, shards in splits.items():
                if not any(shard.keep.any() for shard in shards):
                    raise UserError(f"Nothing of the {split} images in {path} can be kept.")
            header, rows = _index(folder, splits)
            backups = _put_in_place(folder, splits, header, rows, lost)
    finally:
        for place in {examined.expected.path.parent for _, examined in found}:
            for left in place.glob(f"*{_TEMPORARY}*"):
                left.unlink()
    _conclude(folder, header, lost, backups)
    return 0


def _repaired(split: str, examined: Examined, lost: list[Skipped]) -> _Shard | None:
    """Repair a shard; None when nothing of it is left."""
    expected = examined.expected
    name = printable(expected.name)
    before = len(lost)

    def lose(place: str, reason: str) -> None:
        # The name as it is: who examines the repaired folder looks for it.
        lost.append(Skipped(split, f"{expected.name}:{place}", printable(reason)))

    if examined.scan is not None:
        keep = np.array([o not in examined.bad for o in examined.scan.offset.tolist()], dtype=bool)
        keys = {f.offset: f for f in examined.findings if f.offset in examined.bad}
        for offset in examined.scan.offset[~keep].tolist():
            lose(keys[offset].key, keys[offset].problem)
        if len(lost) > before:
            tell(
                f"{name}: dropped from the index, because they cannot be decoded: "
                f"{len(lost) - before} of {len(keep)} images; the tar stays as it is"
            )
        return _Shard(expected.name, examined, examined.scan, keep, None)
    wanted = 0 if expected.rows is None else len(expected.rows)
    reason = examined.findings[0].problem
    if examined.bytes < 0:
        for offset in [] if expected.rows is None else expected.rows["offset"].tolist():
            lose(f"byte {offset}", "the shard is not there")
        tell(f"{name} {reason}: {wanted} images are lost; copy it again to have them")
        return None
    new = expected.path.with_name(f"{expected.path.name}{_TEMPORARY}{os.getpid()}")
    kept = salvage(expected.path, new, expected.rows)
    for place, why in kept.lost:
        lose(place, why)
    of = f" of {wanted}" if wanted else ""
    what = reason.partition(". ")[0].rstrip(".")
    tell(f"{name} {what}: {kept.kept}{of} images are kept in a new tar")
    if not kept.kept:
        return None
    after = examine(Expected(new, expected.name))
    if after.scan is None or after.bad:
        raise UserError(f"{new} was not written as it should be: {after.findings[0]}")
    return _Shard(
        expected.name, after, after.scan, np.ones(len(after.scan.offset), dtype=bool), new
    )


def _index(
    folder: Folder, splits: dict[str, list[_Shard]]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Make index.json and the rows of each split."""
    everything = [(shard.name, shard.scan) for shards in splits.values() for shard in shards]
    for name, _ in everything:
        if problem := relative_problem(name):
            raise UserError(
                f"{folder.path / index_file.INDEX_JSON} cannot name {printable(name)!r}, which "
                f"{problem}: give the tar another name first"
            )
    classes, why_none = find_classes(everything)
    place = {name: i for i, name in enumerate(classes)}
    if why_none:
        tell(f"the labels are not used: {why_none}")
    names = folder.classes if folder.classes is not None and not why_none else classes
    if len(names) < len(classes):
        raise UserError(
            f"{folder.path / index_file.INDEX_JSON} names {len(names)} classes, and the tars have "
            f"labels up to {len(classes) - 1}: they belong to different sets"
        )
    header: dict[str, Any] = {
        "format": index_file.FORMAT,
        "version": index_file.VERSION,
        "classes": names,
        "splits": {},
        "made": {**folder.made, "repaired": True, "unlabelled": why_none},
    }
    rows = {}
    for split, shards in splits.items():
        shards = [shard for shard in shards if shard.keep.any()]
        parts = [
            index_rows(number, shard.scan, place)[shard.keep] for number, shard in enumerate(shards)
        ]
        rows[split] = np.concatenate(parts)
        listed = [(shard.name, shard.examined.bytes, int(shard.keep.sum())) for shard in shards]
        checksums = [shard.examined.checksum for shard in shards]
        header["splits"][split] = index_file.split_entry(split, rows[split], listed, checksums)
    return header, rows


def _put_in_place(
    folder: Folder,
    splits: dict[str, list[_Shard]],
    header: dict[str, Any],
    rows: dict[str, np.ndarray],
    lost: list[Skipped],
) -> list[Path]:
    """Replace the old files by the new ones, the index last.

    Returns the old files under their new names.
    """
    backups = []
    for shards in splits.values():
        for shard in shards:
            if shard.new is not None:
                sync(shard.new)
                target = folder.path / shard.name
                backup = _free_name(target, "damaged")
                try:
                    os.link(target, backup)
                except OSError:  # a file system without links
                    os.rename(target, backup)
                os.replace(shard.new, target)
                backups.append(backup)
    for name in [index_file.INDEX_JSON, *map(index_file.index_name, rows)]:
        if (folder.path / name).exists():
            backups.append(_free_name(folder.path / name, "before-repair"))
            shutil.copyfile(folder.path / name, backups[-1])  # with the mode of the umask
    if lost:
        file = folder.path / LEFT_OUT
        before = file.read_bytes() if file.exists() else b""
        write_atomically(file, before + b"".join(json_line(entry._asdict()) for entry in lost))
    for split, of_split in rows.items():
        save_rows(folder.path / index_file.index_name(split), of_split)
    write_atomically(folder.path / index_file.INDEX_JSON, json_text(header, indent=1))
    sync(folder.path)
    return backups


def _free_name(path: Path, suffix: str) -> Path:
    """Find a name for the old file: NAME.damaged, NAME.damaged-2 and so on."""
    for number in range(1, 1000):
        name = path.with_name(f"{path.name}.{suffix}" + (f"-{number}" if number > 1 else ""))
        if not name.exists():
            return name
    raise UserError(f"{path.with_name(f'{path.name}.{suffix}')}: too many files of this kind")


def _conclude(
    folder: Folder, header: dict[str, Any], lost: list[Skipped], backups: list[Path]
) -> None:
    for split, entry in header["splits"].items():
        count = len(entry["shards"])
        tell(f"{split}: {entry['samples']} images in {count} shard{'s' * (count != 1)} are kept")
    if folder.indexed and folder.classes is None and header["classes"]:
        tell(
            f"the names of the {len(header['classes'])} classes were in {index_file.INDEX_JSON}, "
            "which is lost: they are called by what the tars say"
        )
    if lost:
        tell(
            f"lost: {len(lost)} images, listed in {folder.path / LEFT_OUT}. A run that was "
            "started with all of them cannot be resumed with fewer: for that, copy the damaged "
            "files again, or use them as they were with --bad-samples skip"
        )
    else:
        tell("nothing is lost")
    if backups:
        names = [str(backup.relative_to(folder.path)) for backup in backups]
        tell(f"what was replaced is kept as {some_of(names, _MOST_NAMED)}")
