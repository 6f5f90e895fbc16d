"""What normalises over a batch, or draws, becomes ours or is refused where an encoder is built."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchvision.ops import DropBlock2d, StochasticDepth

from moco_scale.models import stochastic_depth
from moco_scale.models.batchnorm import GroupedBatchNorm, GroupedBatchNorm1d, GroupedBatchNorm2d
from moco_scale.models.encoder import Encoder
from moco_scale.utils.errors import UserError


class DropPath(nn.Module):
    """As others have it."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob


class OwnBatchNorm(nn.BatchNorm2d):
    """Somebody's."""


def encoder_with(*layers: nn.Module) -> Encoder:
    return Encoder(nn.Sequential(nn.Identity(), nn.Sequential(*layers)), nn.Identity(), 4)


def test_batchnorm_becomes_ours_with_all_it_holds() -> None:
    layers = [nn.BatchNorm1d(4, momentum=0.3, eps=1e-3), nn.BatchNorm2d(4, affine=False)]
    layers[0].load_state_dict({"running_mean": torch.full((4,), 7.0)}, strict=False)
    before = copy.deepcopy(nn.Sequential(nn.Identity(), nn.Sequential(*layers)).state_dict())
    kept = [id(p) for layer in layers for p in layer.parameters()]
    encoder = encoder_with(*layers)
    assert [type(m) for m in encoder.modules() if isinstance(m, GroupedBatchNorm)] == [
        GroupedBatchNorm1d,
        GroupedBatchNorm2d,
    ]
    assert [id(p) for p in encoder.parameters()] == kept
    state = encoder.backbone.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert (layers[0].momentum, layers[0].eps) == (0.3, 1e-3)


def test_a_head_is_looked_at_too() -> None:
    head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    Encoder(nn.Identity(), head, 4)
    assert isinstance(head[1], GroupedBatchNorm1d)


def test_stochastic_depth_becomes_ours_where_it_drops() -> None:
    layers = [StochasticDepth(0.3, "row"), StochasticDepth(0.0, "batch")]
    encoder = encoder_with(*layers)
    assert [type(layer) for layer in layers] == [stochastic_depth.StochasticDepth, StochasticDepth]
    assert encoder.drawing == layers[:1]


HARMLESS: list[Callable[[], nn.Module]] = [
    lambda: nn.Dropout(0.0),
    lambda: nn.Dropout2d(0.0),
    lambda: nn.AlphaDropout(0.0),
    lambda: nn.MultiheadAttention(4, 1),
    lambda: nn.TransformerEncoderLayer(4, 1, dropout=0.0),
    lambda: nn.LSTM(4, 4),
    lambda: nn.InstanceNorm2d(4, affine=True),
    lambda: nn.LayerNorm(4),
    lambda: nn.GroupNorm(2, 4),
    lambda: DropPath(0.0),
]


@pytest.mark.parametrize("make", HARMLESS)
def test_what_does_neither_is_left_alone(make: Callable[[], nn.Module]) -> None:
    layer = make()
    kinds = [type(m) for m in layer.modules()]
    encoder_with(layer)
    assert [type(m) for m in layer.modules()] == kinds


NORMALISES = r"\) normalises over the images that a process holds; use torch\.nn\.BatchNorm1d"
DRAWS = r"\) draws from the global generator; "
REFUSED: list[tuple[Callable[[], nn.Module], str, str]] = [
    (lambda: nn.SyncBatchNorm(4), "torch.nn.modules.batchnorm.SyncBatchNorm", NORMALISES),
    (lambda: nn.BatchNorm3d(4), "torch.nn.modules.batchnorm.BatchNorm3d", NORMALISES),
    (lambda: nn.LazyBatchNorm1d(), "torch.nn.modules.batchnorm.LazyBatchNorm1d", NORMALISES),
    (lambda: OwnBatchNorm(4), f"{__name__}.OwnBatchNorm", NORMALISES),
    (
        lambda: nn.BatchNorm2d(4, track_running_stats=False),
        "torch.nn.modules.batchnorm.BatchNorm2d",
        r"\) must have running statistics",
    ),
    (
        lambda: nn.BatchNorm1d(4, momentum=None),
        "torch.nn.modules.batchnorm.BatchNorm1d",
        r"\) must have running statistics",
    ),
    (
        lambda: nn.InstanceNorm2d(4, track_running_stats=True),
        "torch.nn.modules.instancenorm.InstanceNorm2d",
        r"\) keeps statistics .* set track_running_stats=False",
    ),
    (lambda: nn.Dropout(0.1), "torch.nn.modules.dropout.Dropout", DRAWS + "set its probability"),
    (lambda: nn.Dropout3d(0.1), "torch.nn.modules.dropout.Dropout3d", DRAWS),
    (lambda: nn.AlphaDropout(0.1), "torch.nn.modules.dropout.AlphaDropout", DRAWS),
    (lambda: nn.FeatureAlphaDropout(), "torch.nn.modules.dropout.FeatureAlphaDropout", DRAWS),
    (lambda: nn.RReLU(), "torch.nn.modules.activation.RReLU", DRAWS + "use a module that"),
    (lambda: nn.FractionalMaxPool2d(2, 3), "torch.nn.modules.pooling.FractionalMaxPool2d", DRAWS),
    (
        lambda: nn.MultiheadAttention(4, 1, dropout=0.1),
        "torch.nn.modules.activation.MultiheadAttention",
        DRAWS,
    ),
    (lambda: nn.LSTM(4, 4, 2, dropout=0.1), "torch.nn.modules.rnn.LSTM", DRAWS),
    (
        lambda: StochasticDepth(0.1, "batch"),
        "torchvision.ops.stochastic_depth.StochasticDepth",
        DRAWS + '.*of mode "row"',
    ),
    (lambda: DropBlock2d(0.1, 3), "torchvision.ops.drop_block.DropBlock2d", DRAWS),
    (lambda: DropPath(0.1), f"{__name__}.DropPath", DRAWS),
]


@pytest.mark.parametrize(("make", "name", "words"), REFUSED, ids=[each[1] for each in REFUSED])
def test_what_does_either_is_refused_by_name(
    make: Callable[[], nn.Module], name: str, words: str
) -> None:
    with pytest.raises(UserError, match=words) as error:
        encoder_with(nn.Identity(), make())
    assert f"backbone.1.1 ({name})" in str(error.value)


def test_many_are_listed_with_their_number() -> None:
    with pytest.raises(UserError) as error:
        encoder_with(*(nn.Dropout() for _ in range(5)))
    assert str(error.value).count("torch.nn.modules.dropout.Dropout") == 3
    assert str(error.value).endswith("\n  and 2 more")
