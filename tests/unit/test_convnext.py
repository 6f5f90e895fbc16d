"""ConvNeXt is torchvision's, by names, weights and numbers."""

from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from moco_scale.commands.flops import count_flops
from moco_scale.config import command_line
from moco_scale.data.sampling.order import Samples
from moco_scale.engines.blocks import transform_blocks
from moco_scale.methods.moco import MoCo
from moco_scale.models.convnext import BACKBONE, Block
from moco_scale.models.encoder import Encoder, build_encoder
from moco_scale.models.registry import attends, blocks_of
from moco_scale.models.stochastic_depth import Crops, encoding
from moco_scale.planner.cluster import PRESETS
from moco_scale.planner.plan import make_plan
from moco_scale.utils.errors import UserError

SMALL = ("--dataset", "cifar10", "--model", "convnext_tiny", "--batch-size", "16", "--nce-k", "64")


def on_meta(model: str, **flags: int) -> Encoder:
    with torch.device("meta"):
        return build_encoder(model, **flags)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", BACKBONE.models)
def test_names_and_shapes_are_torchvisions(model: str) -> None:
    with torch.device("meta"):
        reference = torchvision.models.get_model(model)
    wanted = {n: t.shape for n, t in reference.state_dict().items() if "classifier.2" not in n}
    encoder = on_meta(model)
    assert {n: t.shape for n, t in encoder.backbone.state_dict().items()} == wanted
    assert encoder.feature_dim == reference.classifier[2].in_features
    rates = [m.p for m in reference.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
    assert [layer.p for layer in encoder.drawing] == [p for p in rates if p > 0]
    assert len(blocks_of(encoder)) == len(rates)
    assert not attends(encoder)


def test_initial_weights_and_features_are_torchvisions_for_the_seed() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        reference = torchvision.models.convnext_tiny(num_classes=16)
    encoder = build_encoder("convnext_tiny", dim=16, seed=5)
    theirs = reference.state_dict()
    for name, value in encoder.backbone.state_dict().items():
        assert torch.equal(theirs[name], value), name
    # In the branches, too, which as drawn are multiplied by 1e-6.
    for model in (reference, encoder):
        for name, p in model.named_parameters():
            if name.endswith("layer_scale"):
                p.data.fill_(0.5)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(encoder.eval()(images), reference.eval()(images))


def test_another_patch_is_drawn_after_the_rest() -> None:
    usual, fine = (build_encoder("convnext_tiny", seed=5, patch_size=n) for n in (0, 2))
    assert fine.get_parameter("backbone.features.0.0.weight").shape == (96, 3, 2, 2)
    assert fine.eval().features(torch.zeros(1, 3, 16, 16)).shape == (1, 768)
    states = usual.state_dict(), fine.state_dict()
    differing = {n for n in states[0] if not states[0][n].equal(states[1][n])}
    assert differing == {"backbone.features.0.0.weight"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"image_size": 31}, "--image-size 31 is too small .* patches of 4 pixels; choose 32"),
        ({"image_size": 63, "patch_size": 8}, "choose 64 or more, or a smaller --patch-size"),
        ({"width": 2}, "--model-width 2: for convnext_tiny, choose one of 1"),
    ],
)
def test_what_does_not_fit_is_named(flags: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        on_meta("convnext_tiny", **flags)


def test_flops_are_counted() -> None:
    """torchvision's documentation: 4.456 G multiply-adds, of which 0.768 M are the classifier's."""
    count = count_flops(build_encoder("convnext_tiny"), torch.zeros(1, 3, 224, 224))
    products = sum(count.by_operator.get(kind, 0) for kind in ("conv", "linear"))
    assert products - 768 * 128 == pytest.approx(4.456e9 - 0.768e6, abs=1e6)
    assert not count.uncounted


@pytest.mark.parametrize("flags", [(), ("--activation-checkpointing", "--symmetric")])
def test_a_run_is_planned(flags: tuple[str, ...]) -> None:
    config = command_line.parse([*SMALL, *flags])
    plan = make_plan(config, 1, 2, PRESETS["a100"])
    encoder = build_encoder("convnext_tiny", image_size=32)
    forward = count_flops(encoder, torch.zeros(1, 3, 32, 32)).by_operator
    # Query, twice that backward but for the first layer's input, key; the query's blocks again.
    first = 3 * 4 * 4 * 96 * 8 * 8
    step = 16 * 2 * (4 * (forward["conv"] + forward["linear"]) - first)
    if flags:
        again = products_of_blocks(encoder)
        step = 2 * (step + 16 * 2 * again)
    assert plan.flops == step
    gradients = next(c for c in plan.collectives if c.purpose == "gradients")
    assert gradients.payload == 4 * sum(p.numel() for p in encoder.parameters())


def products_of_blocks(encoder: nn.Module) -> int:
    """Multiply-adds of the blocks' matrix products for an image of 32 pixels."""
    seen: list[tuple[nn.Module, torch.Tensor]] = []
    hooks = [
        block.register_forward_hook(lambda block, args, out: seen.append((block, args[0].detach())))
        for block in blocks_of(encoder)
    ]
    encoder.eval()(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    counts = [count_flops(block, x).by_operator for block, x in seen]
    return sum(count["conv"] + count["linear"] for count in counts)


def named(index: np.ndarray, *views: int) -> AbstractContextManager[None]:
    return encoding(Crops(3, Samples(index, np.zeros_like(index)), views))


def residual_encoder() -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        blocks = (Block(4, 0.5, p) for p in (0.0, 0.5, 0.5))
        backbone = nn.Sequential(nn.Conv2d(3, 4, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return Encoder(backbone, nn.Linear(4, 4), 4)


def gradients(checkpointed: bool) -> list[Tensor]:
    """Of both views of a batch; the backward pass comes when keys have been drawn for, too."""
    moco = MoCo(residual_encoder())
    transform_blocks(moco, compiled=False, checkpointed=checkpointed)
    images = torch.randn(2, 16, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    generator = torch.get_rng_state()
    with named(np.arange(16), 0, 1):
        queries = moco(*images)
    with named(np.arange(16)[::-1], 1):
        keys = moco.keys(images[1].flip(0))
    assert torch.equal(torch.get_rng_state(), generator)
    assert not torch.allclose(keys.flip(0), queries[0], atol=1e-3)
    torch.testing.assert_close(keys.flip(0), queries[1])  # as yet the same weights
    (queries[0] * queries[1].roll(1, 0)).sum().backward()
    return [p.grad for p in moco.query.parameters() if p.grad is not None]


def test_blocks_computed_again_decide_as_before() -> None:
    again, once = gradients(checkpointed=True), gradients(checkpointed=False)
    assert len(once) > 20
    assert all(torch.equal(a, b) for a, b in zip(again, once, strict=True))
