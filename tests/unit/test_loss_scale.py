"""The factor that fp16's losses are multiplied by: when it moves, and that gradients lose it."""

import torch

from moco_scale.optim.loss_scale import LossScale, LossScaling


def test_the_loss_scale_grows_back_and_survives_a_checkpoint() -> None:
    scale = LossScale(LossScaling(initial=8.0, window=2, minimum=2.0))
    moves = []
    for applied in (True, False, False, False, True, True, True):
        scale.update(applied)
        moves.append(scale.value)
    assert moves == [8.0, 4.0, 2.0, 2.0, 2.0, 4.0, 4.0]
    assert scale.skipped == 3
    other = LossScale(LossScaling(window=2))
    other.load(scale.state())
    other.update(True)
    assert other.value == 8.0
    shorter = LossScale(LossScaling(window=1000))
    shorter.load(torch.tensor([8.0, 1500.0], dtype=torch.float64))  # of a run whose window was 2000
    shorter.update(True)
    assert shorter.value == 16.0


def test_gradients_are_unscaled_and_checked_in_every_element() -> None:
    scale = LossScale(LossScaling(initial=4.0))
    fine = [torch.tensor([4.0, -8.0]), torch.tensor([]), torch.tensor(1e38)]
    assert scale.unscale(fine)
    assert fine[0].tolist() == [1.0, -2.0]
    for bad in (float("inf"), float("-inf"), float("nan")):
        assert not scale.unscale([torch.ones(3), torch.tensor([0.0, bad])])
