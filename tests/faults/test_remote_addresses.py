"""What `--data-dir` may say of a place elsewhere, and what of it is never said again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from http_folder import served
from remote_sets import HURRIED, batches, same, source_of

from moco_scale.config.command_line import parse
from moco_scale.config.resolve import build
from moco_scale.data.open import open_shards
from moco_scale.data.remote import addresses, fsspec_store, shard_source
from moco_scale.data.remote.shard_source import ShardSource
from moco_scale.data.shards.mixed_shards import split_mixture
from moco_scale.training import bad_images
from moco_scale.training.loop import train
from moco_scale.training.run import Run
from moco_scale.utils.errors import UserError


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_source, "RetryPolicy", HURRIED)


def test_addresses_that_are_none_say_what_they_should_be(tmp_path: Path) -> None:
    for spec, words in [
        ("blah://host/x", "https://, http://, s3:// or gs://"),
        ("s3://bucket/x", r"pip install 'moco_scale\[remote\]'"),
        ("http:///x", "there is no host"),
        ("pipe:aws s3 cp s3://b/f/{} -", "no commands are run .* --data-dir s3://b/f,"),
        ("pipe:gsutil cat gs://b/f/{}", "--data-dir gs://b/f,"),
        ("pipe:curl -s -L 'https://h/f/{}' || true", "--data-dir https://h/f,"),
        ("pipe:ssh -C host cat /d/{}", "--data-dir sftp://host/d,"),
        ("pipe:hdfs dfs -cat /d/{}", "--data-dir hdfs:///d,"),
        ("pipe:cat /d/{}", "--data-dir /d,"),
        ("pipe:TOKEN=secret magic {}", "pipe:…: no commands .* https://, s3:// or gs://"),
        ("s3://b/f:0.5,pipe:cat {}:0.5", "no commands are run"),
        ("", "--data-dir is empty"),
        (" ", "--data-dir is empty"),
        ("https://h/train-*.tar", r"\* stands for nothing there; name tars by braces"),
        ("https://h/train-00000?.tar", r"\? stands for nothing there"),
        ("https://h/train-[01].tar", r"\[ stands for nothing there"),
        ("https://h/a.tar::https://h/b.tar", "not joined by ::; name them as a mixture"),
        (f"{tmp_path}::https://h/b.tar", "not joined by ::"),
        ("https://h/{0..9}.tar.gz", "compressed"),
        ("https://h/{0,0}.tar", "names a tar twice"),
    ]:
        with pytest.raises(UserError, match=words):
            open_shards(ShardSource(spec, cache_dir=str(tmp_path)), "train")
    with served(tmp_path) as server, pytest.raises(UserError, match=r"HTTP 404.*Check the address"):
        open_shards(source_of(server, tmp_path), "train")


def test_passwords_and_signatures_are_written_nowhere(tmp_path: Path) -> None:
    config = build("v2", {"data_dir": "https://me:secret@host/set/?token=secret"})
    assert "secret" not in json.dumps(config.flat()) + str(config.source)
    assert config.flat()["data_dir"] == "https://host/set"
    with served(tmp_path) as server:
        spec = server.url.replace("//", "//me:secret@") + "?token=secret"
        with pytest.raises(UserError, match="404") as caught:
            open_shards(ShardSource(spec, str(tmp_path)), "train")
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        "https://me:secret@h/x?sig=secret,https://h2/y?sig=secret:2",
        "https://me:secret@h/x?sig=secret:0,b:1",
        "https://me:secret@h/x?sig=secret,",
    ],
)
def test_nor_by_what_is_wrong_with_a_mixture(spec: str) -> None:
    with pytest.raises(UserError, match="--data-dir https://h/x") as caught:
        split_mixture(spec)
    assert "secret" not in str(caught.value)


def test_nor_where_they_are_written_carelessly() -> None:
    for spec, said in [
        ("https://me:se@cret@host/x", "https://host/x"),
        ("https://host/x y?secret z", "https://host/x y"),
        ("pipe:curl -s 'https://me:secret@host/{}?secret' | cat", "pipe:…"),
    ]:
        assert addresses.shown(spec) == said
    with pytest.raises(UserError, match=r"//host:x/y: .* port that is none") as caught:
        fsspec_store.store_at("http://me:secret@host:x/y")
    assert "secret" not in str(caught.value)


def test_nor_by_a_whole_run_that_ends_at_bad_images(
    tiny_shards: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = shutil.copytree(tiny_shards, tmp_path / "bad")
    header = json.loads((bad / "index.json").read_text())
    for shard in header["splits"]["train"]["shards"]:
        del shard["checksum"]  # which would notice
    (bad / "index.json").write_text(json.dumps(header))
    for row in np.load(bad / "train-index.npy"):
        with open(bad / f"train-{row['shard']:06d}.tar", "r+b") as file:
            file.seek(int(row["offset"]) + int(row["size"]) // 2)
            file.write(bytes(int(row["size"]) // 2))
    monkeypatch.setattr(bad_images, "FEWEST", 0)
    out, kept = tmp_path / "out", tmp_path / "cache"
    with served(bad) as server:
        values = {
            "data_dir": server.url.replace("//", "//me:secret@") + "?signed=secret",
            **{"dataset": "images", "image_size": 16, "model": "resnet18", "dim": 32, "nce_k": 32},
            **{"batch_size": 8, "bn_group_size": 4, "epochs": 1, "num_workers": 0, "knn_freq": 0},
            **{"output_dir": str(out), "shard_cache": str(kept), "device": "cpu"},
            **{"bad_samples": "skip", "shuffle_window": 0},
        }
        with pytest.raises(UserError, match=r"(nor any of|cannot be decoded, more than)") as caught:
            train(Run(build("v2", values)))
        assert {r.authorization for r in server.requests} == {"Basic bWU6c2VjcmV0"}
        assert {r.query for r in server.requests} == {"signed=secret"}
    said = capfd.readouterr()
    written = [path.read_bytes() for path in (*out.rglob("*"), *kept.rglob("*")) if path.is_file()]
    names = str([*tmp_path.rglob("*")])
    assert any(b"/data" in content for content in written)
    assert "secret" not in str(caught.value) + said.out + said.err + names
    assert not any(b"secret" in content for content in written)


def test_a_password_does_not_follow_to_another_server(tiny_shards: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    shutil.copytree(tiny_shards, other)
    with served(other) as second:
        there = second.url.replace("127.0.0.1", "localhost")

        def fault(name: str, attempt: int) -> str:
            if name == "train-000001.tar":  # to the same server, where it may go
                return f"to {first.url}/./{name}" if attempt == 0 else ""
            return f"to {there}/{name}" if name[-4:] == ".tar" else ""

        with served(tiny_shards, fault) as first:
            spec = first.url.replace("//", "//me:secret@")
            same(
                batches(open_shards(source_of(spec, tmp_path / "cache"), "train"), 0),
                batches(open_shards(tiny_shards, "train"), 0),
            )
            assert all(request.authorization for request in first.requests)
            assert first.count("train-000001.tar") == 2
    assert len(second.requests) == 3
    assert not any(request.authorization for request in second.requests)


def test_an_address_is_read_in_windows_unless_told_otherwise() -> None:
    address = build("v2", {"data_dir": "s3://bucket/set"})
    assert (address.data.shuffle_window, build("v2", {}).data.shuffle_window) == (64, 0)
    chosen = build("v2", {"data_dir": "s3://bucket/set", "shuffle_window": 0})
    assert chosen.data.shuffle_window == 0


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_one_does_not_mean_the_usual_folder(empty: str) -> None:
    with pytest.raises(UserError, match="--data-dir is empty"):
        build("v2", {"data_dir": empty})


def test_the_flag_for_commands_says_that_there_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--allow-pipe", "--data-dir", "s3://bucket/set"])
    assert "--allow-pipe is here: nothing: no commands are run" in capsys.readouterr().err
