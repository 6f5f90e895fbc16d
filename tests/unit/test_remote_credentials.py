"""Passwords and signatures that stand on no command line: who is sent them, and who is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from http_folder import served
from remote_sets import HURRIED, batches, same, source_of

from moco_scale.config.command_line import parse
from moco_scale.data.open import open_shards
from moco_scale.data.remote import credentials, shard_source
from moco_scale.utils.errors import UserError

ME = "Basic bWU6c2VjcmV0"  # me:secret


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shard_source, "RetryPolicy", HURRIED)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("USER", "PASSWORD", "TOKEN", "SIGNATURE"):
        monkeypatch.delenv(f"MOCO_SCALE_HTTP_{name}", raising=False)
    monkeypatch.delenv("NETRC", raising=False)


@pytest.mark.parametrize("named", [True, False])
def test_netrc_is_for_its_host_alone(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    path = tmp_path / ("credentials" if named else ".netrc")
    path.write_text("machine 127.0.0.1 login me password secret\n")
    if named:
        monkeypatch.setenv("NETRC", str(path))
    with served(tiny_shards) as server:
        assert len(open_shards(source_of(server, tmp_path / "cache"), "train")) == 32
        open_shards(server.url.replace("127.0.0.1", "localhost"), "train")
        assert [r.authorization for r in server.requests] == [ME, ME, "", ""]


def test_variables_reach_readers_and_no_other_server(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOCO_SCALE_HTTP_USER", "me")
    monkeypatch.setenv("MOCO_SCALE_HTTP_PASSWORD", "secret")
    monkeypatch.setenv("MOCO_SCALE_HTTP_SIGNATURE", "?signed=x")
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login other password other\n")
    other = shutil.copytree(tiny_shards, tmp_path / "elsewhere")
    with served(other) as second:
        there = second.url.replace("127.0.0.1", "localhost")

        def fault(name: str, attempt: int) -> str:
            return f"to {there}/{name}" if name == "train-000001.tar" else ""

        with served(tiny_shards, fault) as first:
            near = batches(open_shards(tiny_shards, "train"), 0)
            same(batches(open_shards(source_of(first, tmp_path / "cache"), "train"), 2), near)
            asked = {(r.authorization, r.query) for r in first.requests}
            assert asked == {(ME, "signed=x")} and len(first.requests) > 4
            assert {(r.authorization, r.query) for r in second.requests} == {("", "")}
            # What stands in the address comes first.
            spec = first.url.replace("//", "//you:x@") + "?own=y"
            open_shards(source_of(spec, tmp_path / "other"), "train")
            assert first.requests[-1].authorization == "Basic eW91Ong="
            assert first.requests[-1].query == "own=y"


def test_a_token(tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOCO_SCALE_HTTP_TOKEN", "secret\n")
    with served(tiny_shards) as server:
        open_shards(source_of(server, tmp_path / "cache"), "train")
        assert {r.authorization for r in server.requests} == {"Bearer secret"}
        monkeypatch.setenv("MOCO_SCALE_HTTP_PASSWORD", "secret")
        with pytest.raises(UserError, match="are both set"):
            open_shards(source_of(server, tmp_path / "cache"), "train")
        monkeypatch.delenv("MOCO_SCALE_HTTP_PASSWORD")
        monkeypatch.setenv("MOCO_SCALE_HTTP_TOKEN", "secret\r\nX: y")
        with pytest.raises(UserError, match="hold a line feed") as caught:
            open_shards(source_of(server, tmp_path / "cache"), "train")
        assert "secret" not in str(caught.value)


def test_a_netrc_that_is_none_is_named_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "no"))
    with pytest.raises(UserError, match=r"NETRC=.*/no cannot be read: No such file"):
        open_shards("https://h/set", "train")
    for content in ("machine h login x secret", "\0secret", "secret"):
        (tmp_path / "no").write_text(content)
        with pytest.raises(UserError, match=r"no is no netrc: line .* cannot be") as caught:
            open_shards("https://h/set", "train")
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "environ", "warned"),
    [
        ("https://me:secret@h/x", {"CROSS_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}, True),
        ("a:1,https://h/x?secret:1", {"CROSS_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}, True),
        ("https://me:secret@h/x", {"CROSS_RANK": "0", "RANK": "1", "WORLD_SIZE": "2"}, False),
        ("https://me:secret@h/x", {"RANK": "0", "WORLD_SIZE": "2"}, False),
        ("https://h/x/", {"CROSS_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}, False),
        ("data/a?b", {"CROSS_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}, False),
    ],
)
def test_a_launcher_that_prints_them_is_said_once(
    spec: str,
    environ: dict[str, str],
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    parse(["--data-dir", spec])
    said = capsys.readouterr().err
    assert said.count("deepspeed prints its command line") == warned
    assert said.count("\n") == warned and "secret" not in said
    assert not warned or credentials.PASSWORD in said
