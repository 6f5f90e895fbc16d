"""What the store holds, whoever has written it, is a message of a known form or passed over."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moco_scale.distributed import collectives
from moco_scale.observe.heartbeats import Heartbeat
from moco_scale.observe.phases import DATA, Phases
from moco_scale.observe.watchdog import Watch
from moco_scale.untrusted.documents import DocumentError
from moco_scale.untrusted.store_message import Verdict, parse_verdict

BEAT: dict[str, Any] = {
    **{"rank": 1, "host": "node0", "count": 7, "clock": "10:00:00", "step": 3, "entry": 2},
    **{"phase": "data", "idle_seconds": 1.5, "slow_phase": False, "device": [3, 1, "forward"]},
}
VERDICT: dict[str, Any] = {"text": "rank 1 is gone", "ended": False, "at": 1_700_000_000}

junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=400),
    st.lists(st.integers(), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_value_in_any_place_is_read_or_refused(data: st.DataObject) -> None:
    for whole, read in ((BEAT, Heartbeat.decode), (VERDICT, parse_verdict)):
        name = data.draw(st.sampled_from(sorted(whole)))
        content = json.dumps(whole | {name: data.draw(junk)}).encode()
        try:
            found = read(content)
        except DocumentError:
            continue
        assert isinstance(found, Heartbeat | Verdict)
        assert len(content) < 25_000


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    for read in (Heartbeat.decode, parse_verdict):
        with pytest.raises(DocumentError):
            read(content)


class Store:
    """A store to which a stranger writes."""

    def __init__(self, **values: str) -> None:
        self.values = values

    def set(self, key: str, value: str) -> None:
        if key not in self.values:
            self.values[key] = value

    def add(self, key: str, amount: int) -> int:
        return 0

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.values[key].encode()

    def compare_set(self, key: str, expected: str, wanted: str) -> bytes:
        return self.values.setdefault(key, wanted).encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.values[key].encode() for key in keys]


def watch_of(patch: pytest.MonkeyPatch, folder: Path, store: Store) -> Watch:
    patch.setattr(collectives, "world_size", lambda: 2)
    patch.setattr(collectives, "rank", lambda: 0)
    phases = Phases()
    phases.enter(DATA, 1)
    watch = Watch(phases, 100.0, folder, "train.py")
    watch._store, watch._read_all = store, True  # type: ignore[assignment]
    return watch


@pytest.mark.parametrize(
    "verdict",
    [
        '{"text": "\x1b[2Jx", "ended": false, "folder": "/elsewhere"}',
        '{"text": 1, "ended": false, "at": 0}',
        json.dumps(VERDICT | {"text": "x" * 30_000}),
        "[" * 100_000,
    ],
)
def test_what_no_rank_has_written_ends_nothing_and_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    verdict: str,
) -> None:
    store = Store(verdict=verdict, **{"beat/1": json.dumps(BEAT | {"rank": 0}), "beat/0": "\x1b"})
    watch = watch_of(monkeypatch, tmp_path, store)
    for _ in range(3):
        watch._talk()
        watch._look()
    assert watch._verdict is None and watch._last_seen == {}
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "ignores" in said and "\x1b" not in said
    # What this rank itself finds is not lost by it.
    watch._posting = Verdict(text="of our own", ended=False, at=0)
    watch._talk()
    assert watch._verdict is not None and watch._verdict.text == "of our own"


def test_nothing_in_the_store_chooses_where_ranks_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stranger = json.dumps(VERDICT | {"folder": "/elsewhere", "text": "a\x1b[2J"})
    watch = watch_of(monkeypatch, tmp_path / "out", Store(verdict=stranger))
    watch._talk()
    watch._write_down("a line\n")
    (report,) = (tmp_path / "out").glob("hangs/20*-*/rank-00000.txt")
    assert report.read_text().startswith("a line\n")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
