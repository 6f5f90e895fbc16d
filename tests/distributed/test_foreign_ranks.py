"""Ranks that meet shards without an index: one of them scans, and an error is everybody's."""

import shutil
from functools import partial
from pathlib import Path

import pytest
from harness import run_ranks

from moco_scale.data.open import open_shards
from moco_scale.data.shards import index_place, scanned_index, tar_scan
from moco_scale.data.shards.index_file import INDEX_JSON
from moco_scale.distributed import consensus
from moco_scale.utils.errors import UserError


@pytest.fixture
def foreign(tiny_shards: Path, tmp_path: Path) -> Path:
    """Tars of 32 training images, without an index."""
    folder = tmp_path / "foreign"
    shutil.copytree(tiny_shards, folder)
    (folder / INDEX_JSON).unlink()
    return folder


def scans(folder: Path) -> tuple[int, int, str, str]:
    """Images found, tars scanned by this rank, fingerprint, error."""
    scanned: list[Path] = []

    def counted(path: Path) -> tar_scan.ShardScan:
        scanned.append(path)
        return tar_scan.scan_tar(path)

    scanned_index.scan_tar = counted
    index_place.MOST_WORKERS = 1
    try:
        shards = consensus.rank0_first(partial(open_shards, folder, "train"))
    except UserError as error:
        return 0, len(scanned), "", str(error)
    return len(shards), len(scanned), shards.fingerprint, ""


def test_one_rank_scans_for_all(foreign: Path) -> None:
    tars = len(list(foreign.glob("*.tar")))
    (first, *others) = run_ranks(scans, 4, foreign)
    assert first == (32, tars, first[2], "")
    assert others == [(32, 0, first[2], "")] * 3


def test_a_bad_shard_is_named_on_every_rank(foreign: Path) -> None:
    bad = min(foreign.glob("val-*.tar"))
    bad.write_bytes(bad.read_bytes()[:700])
    found = run_ranks(scans, 2, foreign)
    assert [count for count, *_ in found] == [0, 0]
    assert all(f"Shard {bad} is truncated" in error for *_, error in found)
