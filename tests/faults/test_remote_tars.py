"""Tars elsewhere that have no index: fetched once to make it, whatever interrupts that."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from http_folder import served
from remote_sets import batches, same

from moco_scale.data import shard_source
from moco_scale.data.download import Patience
from moco_scale.data.open_shards import has_split, open_shards
from moco_scale.data.shard_source import ShardSource
from moco_scale.errors import UserError


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patience = partial(Patience, first_wait=0.002, longest_wait=0.02)
    monkeypatch.setattr(shard_source, "Patience", patience)
    monkeypatch.setenv("MOCO_SCALE_CACHE", str(tmp_path / "home"))


def test_tars_without_an_index_are_fetched_once_to_make_it(
    tiny_shards: Path, tmp_path: Path
) -> None:
    near = open_shards(tiny_shards, "train")
    bad = ("drop 3000", "500", "")

    def fault(name: str, attempt: int) -> str:
        return "404" if name == "index.json" else bad[min(attempt, 2)]

    with served(tiny_shards, fault) as server:
        spec = f"{server.url}/train-{{000000,000001,000002,000003}}.tar?signed=secret"
        source = ShardSource(spec, str(tmp_path / "cache"))
        far = open_shards(source, "train")
        assert np.array_equal(far.labels, near.labels)
        same(batches(far, 1), batches(near, 0))
        same(batches(open_shards(source, "train"), 0), batches(near, 0))
        assert all(server.count(path.name) == 3 for path in tiny_shards.glob("train-*.tar"))
        assert not has_split(source, "val")
        with pytest.raises(UserError, match="no split 'val'"):
            open_shards(source, "val")
        assert str(source) == spec.partition("?")[0]
        assert all(request.query == "signed=secret" for request in server.requests)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_shards, broken)
    os.truncate(broken / "train-000001.tar", 5000)
    with (
        served(broken) as server,
        pytest.raises(UserError, match=rf"{server.url}/train-000001.tar.*trunc"),
    ):
        open_shards(f"{server.url}/train-{{000000..000003}}.tar", "train")


def test_samples_keep_their_keys_whatever_their_tars_are_called(
    tiny_shards: Path, tmp_path: Path
) -> None:
    near = open_shards(tiny_shards, "train")
    with served(tiny_shards) as server:
        spec = f"{server.url}/{{a b+c}}/train-{{000000..000003}}.tar"
        far = open_shards(ShardSource(spec, str(tmp_path / "cache")), "train")
        expected = [near.place(i) for i in range(len(near))]
        assert all(place.key for place in expected)
        expected = [place._replace(shard=f"a b+c/{place.shard}") for place in expected]
        assert [far.place(i) for i in range(len(far))] == expected
        far.read(0)
        for path in (tmp_path / "cache").rglob("*.tar"):
            path.unlink()
        assert far.place(0) == expected[0]  # what is mapped is still there
