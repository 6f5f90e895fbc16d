"""Steps that are not finite are found, named once, and counted in a row."""

import pytest
import torch

from moco_scale.observe.finite import FiniteWatch

FINE, BAD = (1.0, True, False), (float("nan"), True, False)


def watching(limit: int, rank: int) -> FiniteWatch:
    return FiniteWatch(limit, rank, lambda: "runs/a/checkpoints/step-00000001")


def codes(watch: FiniteWatch, *steps: tuple[float, bool, bool]) -> list[int]:
    """What it says after each step; of a step it speaks after the next."""
    said = []
    for number, (loss, finite, skipped) in enumerate(steps, 1):
        watch.record(number, torch.tensor(loss), torch.tensor(finite), skipped)
        said.append(watch.code())
    return said


def test_each_kind_is_named_on_its_rank(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {
        "its loss": BAD,
        "the weights after it": (1.0, False, False),
        "its gradients": (1.0, True, True),
    }
    for words, step in kinds.items():
        watch = watching(1, rank=5)
        _, _, code = codes(watch, FINE, step, FINE)
        assert code > 0
        assert watch.judge(code) == f"not finite in a step (on rank 5: {words})"
        said = (
            f"step 2 is not finite: {words}; last good checkpoint: runs/a/checkpoints/step-00000001"
        )
        assert f"{said}\n" in capsys.readouterr().err


def test_a_loss_counts_before_what_follows_from_it() -> None:
    at_rank_2, at_rank_9 = watching(1, rank=2), watching(1, rank=9)
    *_, loss = codes(at_rank_2, BAD, FINE)
    *_, weights = codes(at_rank_9, (1.0, False, False), FINE)
    assert at_rank_2.judge(max(loss, weights)) == "not finite in a step (on rank 2: its loss)"


def test_only_steps_in_a_row_end_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    watch = watching(2, rank=0)
    verdicts = [watch.judge(code) for code in codes(watch, BAD, FINE, BAD, BAD, BAD, FINE)]
    assert [v is not None for v in verdicts] == [False, False, False, False, True, True]
    assert verdicts[4] == "not finite in 2 steps in a row (on rank 0: its loss)"
    assert capsys.readouterr().err.count("is not finite") == 2  # once for each row
