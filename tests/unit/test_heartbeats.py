"""Messages about ranks of a run that hangs, made from their last heartbeats."""

from moco_scale.observe.heartbeats import Heartbeat, LastSeen, silent, standing, waited_for


def beat(
    rank: int, step: int = 7, entry: int = 3, phase: str = "shuffle", **more: object
) -> Heartbeat:
    values = {"idle_seconds": 9.0, "slow_phase": False, "count": 5, "clock": "10:00:00", **more}
    host = f"node{rank // 4}"
    return Heartbeat(rank=rank, host=host, step=step, entry=entry, phase=phase, **values)  # type: ignore[arg-type]


def last_seen(*beats: Heartbeat, changed: float = 0.0) -> dict[int, LastSeen]:
    return {each.rank: LastSeen(each, changed) for each in beats}


def test_a_beat_survives_the_journey() -> None:
    for device in (None, (6, 2, "forward")):
        sent = beat(3, device=device)
        assert Heartbeat.decode(sent.encode().encode()) == sent


def test_nobody_is_silent_who_was_heard_of_lately() -> None:
    assert silent(last_seen(beat(0), beat(1), changed=5.0), 2, now=7.9, after=3.0) is None


def test_a_silent_rank_is_named_with_its_last_place() -> None:
    known = last_seen(beat(0), changed=5.0) | last_seen(beat(1, phase="forward", clock="09:59:58"))
    assert silent(known, 2, now=5.5, after=3.0) == (
        "rank 1 on node0 was last seen at 09:59:58 (frozen, dead or cut off) "
        "in phase forward of step 7"
    )


def test_a_silent_host_is_named_in_one_breath() -> None:
    known = last_seen(*map(beat, range(4)), changed=5.0) | last_seen(*map(beat, range(4, 7)))
    assert silent(known, 9, now=5.5, after=3.0) == (
        "ranks 7-8 never sent a heartbeat; ranks 4-6 on node1 were last seen at 10:00:00 "
        "(frozen, dead or cut off) in phase shuffle of step 7"
    )


def test_a_thousand_silent_ranks_make_no_thousand_words() -> None:
    text = silent(last_seen(*map(beat, range(2048))), 2048, now=9.0, after=3.0)
    assert text is not None
    assert "ranks 20-23 on node5, 506 more were" in text
    assert len(text) < 400


def test_who_is_behind_is_waited_for() -> None:
    late = beat(2, entry=0, phase="data", idle_seconds=31.0)
    behind, waiting = waited_for([beat(0), beat(1), late, beat(3)])
    assert behind == [late]
    assert standing(behind, waiting) == (
        "rank 2 on node0 stands in phase data of step 7 for 31 s and is alive; "
        "the others wait for it in phase shuffle of step 7"
    )
    later = beat(0, step=8, entry=0, phase="data")
    assert waited_for([later, beat(1)]) == ([beat(1)], [later])


def test_nobody_is_waited_for_when_all_are_equally_far() -> None:
    behind, waiting = waited_for([beat(0), beat(1)])
    assert not waiting
    assert "all ranks are alive and stand in phase shuffle of step 7" in standing(behind, waiting)


def test_gpus_that_lag_behind_their_processes_are_looked_at() -> None:
    """Processes hand over work ahead of time and then wait at one place, whatever is stuck."""
    fine = [beat(rank, device=(7, 3, "shuffle")) for rank in (0, 1)]
    stuck = beat(2, device=(6, 5, "backward"))
    behind, waiting = waited_for([*fine, stuck])
    assert behind == [stuck]
    where = "phase shuffle of step 7 (its GPU: phase backward of step 6)"
    assert where in standing(behind, waiting)
    # One that is not known makes all of them useless to compare.
    unknown = fine[0].model_copy(update=dict(device=None, entry=1))
    assert waited_for([unknown, fine[1], stuck])[0] == [unknown]
