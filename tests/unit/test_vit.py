"""Vision transformers have the published shapes, positions and initial weights."""

import math

import pytest
import torch
import torchvision
from torch import nn

from moco_scale.models.encoder import Encoder, build_encoder
from moco_scale.models.vit import VITS, MoCoViT, sincos_positions
from moco_scale.utils.errors import UserError

# Multiply-adds and parameters are those of the usual architecture: torchvision has three of them.
TORCHVISION = {"vit_base": "vit_b_16", "vit_large": "vit_l_16", "vit_huge": "vit_h_14"}


def on_meta(model: str) -> Encoder:
    with torch.device("meta"):
        return build_encoder(model)


@pytest.mark.parametrize("model", TORCHVISION)
def test_shapes_are_torchvisions(model: str) -> None:
    with torch.device("meta"):
        reference = torchvision.models.get_model(TORCHVISION[model])
    wanted = {n: t.shape for n, t in reference.state_dict().items() if not n.startswith("heads.")}
    encoder = on_meta(model)
    assert {n: t.shape for n, t in encoder.backbone.state_dict().items()} == wanted
    assert encoder.feature_dim == reference.hidden_dim


def test_the_small_one_has_twelve_heads() -> None:
    assert (VITS["vit_small"].heads, VITS["vit_small"].width) == (12, 384)
    assert sum(p.numel() for p in on_meta("vit_small").backbone.parameters()) == 21_665_664


def test_positions_are_sines_and_cosines_of_column_and_row() -> None:
    side, width = 3, 16
    table = sincos_positions(side, width)[0]
    assert table.shape == (1 + side * side, width)
    assert torch.equal(table[0], torch.zeros(width))
    for row in range(side):
        for column in range(side):
            for k in range(width // 4):
                rate = 10000 ** (-k / (width // 4))
                wanted = [f(place * rate) for place in (column, row) for f in (math.sin, math.cos)]
                got = table[1 + row * side + column, [k, k + 4, k + 8, k + 12]]
                assert got.tolist() == pytest.approx(wanted, abs=1e-6)


def test_initial_weights_follow_the_paper() -> None:
    encoder = build_encoder("vit_small", image_size=32, seed=1)
    backbone = encoder.backbone
    assert isinstance(backbone, MoCoViT)
    bound = math.sqrt(6 / (3 * 16 * 16 + 384))
    assert bound * 0.99 < backbone.conv_proj.weight.abs().max() <= bound
    assert backbone.class_token.abs().max() < 1e-5
    for name, module in backbone.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            bound = math.sqrt(6 / (384 + 384))
            assert bound * 0.99 < module.in_proj_weight.abs().max() <= bound, name
        elif isinstance(module, nn.Linear):
            bound = math.sqrt(6 / sum(module.weight.shape))
            assert bound * 0.99 < module.weight.abs().max() <= bound, name
            assert not module.bias.any(), name


def test_patches_and_positions_stay_as_drawn_unless_asked() -> None:
    frozen = {n for n, p in build_encoder("vit_small", image_size=32).named_parameters()
              if not p.requires_grad}  # fmt: skip
    positions = "backbone.encoder.pos_embedding"
    assert frozen == {"backbone.conv_proj.weight", "backbone.conv_proj.bias", positions}
    trained = build_encoder("vit_small", image_size=32, train_patch_embedding=True)
    assert {n for n, p in trained.named_parameters() if not p.requires_grad} == {positions}


def test_features_are_the_class_token() -> None:
    encoder = build_encoder("vit_small", image_size=16, patch_size=4, head="mlp", dim=8).eval()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    features = encoder.features(images)
    assert features.shape == (2, 384)
    assert encoder(images).shape == (2, 8)
    # After a layer normalisation with its initial weights.
    assert features.mean(1).abs().max() < 1e-5
    assert features.var(1, correction=0).tolist() == pytest.approx([1, 1], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image_size": 50}, "--image-size 50 is not a multiple of vit_small's patches of 16"),
        ({"image_size": 224, "patch_size": 15}, "patches of 15"),
        ({"width": 2}, "--model-width 2: for vit_small, choose one of 1"),
    ],
)
def test_what_does_not_fit_is_named(arguments: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_encoder("vit_small", **arguments)
