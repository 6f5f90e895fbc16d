"""Backbones equal torchvision's, widths widen everything, weights are a function of the seed."""

import math

import pytest
import torch
import torchvision
from torch import nn

from moco_scale.models.batchnorm import GroupedBatchNorm2d
from moco_scale.models.encoder import Encoder, build_encoder
from moco_scale.models.resnet import RESNETS
from moco_scale.utils.errors import UserError


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def on_meta(model: str, width: int = 1, stem: str = "imagenet", head: str = "linear") -> Encoder:
    with torch.device("meta"):
        return build_encoder(model, width=width, stem=stem, head=head)


@pytest.mark.parametrize("model", RESNETS)
def test_names_and_shapes_are_torchvisions(model: str) -> None:
    with torch.device("meta"):
        reference = torchvision.models.get_model(model)
    expected = {name: s for name, s in shapes(reference).items() if not name.startswith("fc.")}
    encoder = on_meta(model)
    assert shapes(encoder.backbone) == expected
    assert encoder.feature_dim == reference.fc.in_features


def test_resnet50_has_the_known_number_of_parameters() -> None:
    # 25,557,032 with torchvision's classifier of 1000 classes.
    encoder = on_meta("resnet50")
    backbone = sum(p.numel() for p in encoder.backbone.parameters())
    assert backbone + 1000 * 2048 + 1000 == 25_557_032


@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_with_torchvisions_weights_features_are_torchvisions(model: str, training: bool) -> None:
    reference = torchvision.models.get_model(model)
    state = {name: t for name, t in reference.state_dict().items() if not name.startswith("fc.")}
    reference.fc = nn.Identity()
    encoder = build_encoder(model)
    encoder.backbone.load_state_dict(state)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    reference.train(training)
    encoder.train(training)
    with torch.no_grad():
        features = encoder.features(images)
        assert torch.equal(features, reference(images))
    assert features.shape == (3, encoder.feature_dim)


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
@pytest.mark.parametrize("width", [2, 4])
def test_width_multiplies_all_channels(model: str, stem: str, width: int) -> None:
    narrow, wide = on_meta(model, 1, stem), on_meta(model, width, stem)
    assert wide.feature_dim == width * narrow.feature_dim
    narrow_shapes, wide_shapes = shapes(narrow.backbone), shapes(wide.backbone)
    assert wide_shapes.keys() == narrow_shapes.keys()
    for name, shape in narrow_shapes.items():
        expected = list(shape)
        if len(shape) >= 1:
            expected[0] *= width
        if len(shape) == 4 and name != "conv1.weight":  # whose input stays RGB
            expected[1] *= width
        assert list(wide_shapes[name]) == expected, name
    assert wide.head.weight.shape == (128, wide.feature_dim)


def test_a_wide_encoder_runs() -> None:
    encoder = build_encoder("resnet18", width=2, stem="cifar", dim=16)
    assert encoder(torch.zeros(2, 3, 16, 16)).shape == (2, 16)


def test_the_cifar_stem_keeps_the_resolution() -> None:
    encoder = build_encoder("resnet18", stem="cifar")
    seen: list[torch.Size] = []
    for name in ("layer1", "layer4"):
        stage = encoder.backbone.get_submodule(name)
        stage.register_forward_hook(lambda *hook: seen.append(hook[2].shape))
    encoder(torch.zeros(2, 3, 32, 32))
    assert seen == [(2, 64, 32, 32), (2, 512, 4, 4)]


def test_heads() -> None:
    assert isinstance(on_meta("resnet50").head, nn.Linear)
    mlp = on_meta("resnet50", head="mlp").head
    assert [type(layer) for layer in mlp.children()] == [nn.Linear, nn.ReLU, nn.Linear]
    assert shapes(mlp) == {
        "0.weight": (2048, 2048),
        "0.bias": (2048,),
        "2.weight": (128, 2048),
        "2.bias": (128,),
    }


def test_every_batchnorm_is_grouped() -> None:
    kinds = {type(m) for m in on_meta("resnet50").modules() if isinstance(m, nn.BatchNorm2d)}
    assert kinds == {GroupedBatchNorm2d}


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_initial_weights_have_torchvisions_distribution(stem: str) -> None:
    encoder = build_encoder("resnet18", width=2, stem=stem)
    for name, module in encoder.backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            std = math.sqrt(2 / fan_out)
            if name == "conv1" and stem == "cifar":  # as in the official demo, torch's own
                std = math.sqrt(1 / (3 * 3 * 3 * module.in_channels))
            assert module.weight.std().item() == pytest.approx(std, rel=0.05), name
        elif isinstance(module, nn.BatchNorm2d):
            assert torch.all(module.weight == 1) and torch.all(module.bias == 0), name


def test_initial_weights_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = build_encoder("resnet18", stem="cifar", head="mlp", seed=7).state_dict()
    torch.manual_seed(2)
    second = build_encoder("resnet18", stem="cifar", head="mlp", seed=7).state_dict()
    other = build_encoder("resnet18", stem="cifar", head="mlp", seed=8).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    drawn = [n for n in first if n.endswith("weight") and first[n].ndim > 1]
    assert drawn and all(not torch.equal(first[name], other[name]) for name in drawn)


@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
def test_initial_weights_are_torchvisions_own_for_the_seed(model: str) -> None:
    torch.manual_seed(5)
    theirs = torchvision.models.get_model(model, weights=None, num_classes=16).state_dict()
    projection = {"weight": theirs.pop("fc.weight"), "bias": theirs.pop("fc.bias")}
    for head, last in (("linear", "head."), ("mlp", "head.2.")):
        ours = build_encoder(model, head=head, dim=16, seed=5).state_dict()
        for name, value in theirs.items():
            assert torch.equal(ours["backbone." + name], value), name
        for name, value in projection.items():
            assert torch.equal(ours[last + name], value), name


def test_initial_weights_of_the_cifar_stem_are_the_official_demos() -> None:
    """There the first layer is replaced after the whole network has been drawn."""
    torch.manual_seed(5)
    theirs = torchvision.models.resnet18(num_classes=16)
    stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    ours = build_encoder("resnet18", stem="cifar", dim=16, seed=5).state_dict()
    assert torch.equal(ours["backbone.conv1.weight"], stem.weight)
    assert torch.equal(ours["backbone.layer4.1.conv2.weight"], theirs.layer4[1].conv2.weight)
    assert torch.equal(ours["head.weight"], theirs.fc.weight)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    build_encoder("resnet18", seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "resnet20"}, "resnet18"),
        ({"model": "resnet18", "width": 3}, "1, 2, 4"),
        ({"model": "resnet18", "stem": "none"}, "cifar"),
        ({"model": "resnet18", "head": "mlp3"}, "mlp"),
    ],
)
def test_unknown_names_are_refused_with_the_choices(arguments: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_encoder(**arguments)
