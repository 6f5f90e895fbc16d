"""Costs of models and training steps, attention included."""

import argparse
import json

import pytest
import torch
import torchvision
from torch import Tensor, nn

from moco_scale.commands import flops
from moco_scale.models.encoder import build_encoder
from moco_scale.utils.errors import UserError

IMAGE = torch.zeros(1, 3, 224, 224)


def arguments(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    flops.add_arguments(parser)
    return parser.parse_args(flags)


@pytest.mark.parametrize(("name", "giga"), [("resnet18", 1.819), ("resnet50", 4.112)])
def test_resnets_have_their_known_cost(name: str, giga: float) -> None:
    count = flops.count_flops(build_encoder(name), IMAGE)
    assert count.total == pytest.approx(giga * 1e9, rel=1e-3)
    assert count.uncounted == {}
    reference = flops.count_flops(torchvision.models.get_model(name), IMAGE)
    assert reference.total == pytest.approx(giga * 1e9, abs=0.5e6)


@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no_grad"])
def test_attention_of_a_transformer_is_counted(gradients: bool) -> None:
    # Without gradients PyTorch takes its fused path, which fvcore does not see at all.
    model = torchvision.models.vit_b_16().eval()
    with torch.set_grad_enabled(gradients):
        count = flops.count_flops(model, IMAGE)
    assert count.total == pytest.approx(17.582e9, rel=1e-3)
    assert count.by_operator["attention"] == 12 * 2 * 197 * 197 * 768
    assert count.uncounted == {}


def test_a_fused_encoder_layer_costs_what_its_parts_cost() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    tokens = 2 * 10
    with torch.no_grad():
        count = flops.count_flops(layer, torch.zeros(2, 10, 32))
    assert count.by_operator["linear"] == tokens * (4 * 32 * 32 + 2 * 32 * 64)
    assert count.by_operator["attention"] == 2 * tokens * 10 * 32
    assert count.uncounted == {}


def test_the_fused_operator_itself_is_counted() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            inner = self.inner
            return torch._native_multi_head_attention(
                *(x, x, x, 32, 4, inner.in_proj_weight, inner.in_proj_bias),
                *(inner.out_proj.weight, inner.out_proj.bias),
            )[0]

    with torch.no_grad():
        fused = flops.count_flops(Fused(), torch.zeros(2, 10, 32))
    plain = flops.count_flops(
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).self_attn,
        (torch.zeros(2, 10, 32),) * 3,
    )
    assert fused.total == plain.by_operator["linear"] + 2 * 2 * 10 * 10 * 32
    assert fused.by_operator["linear"] == plain.by_operator["linear"]


def test_grouped_queries_and_unequal_lengths() -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    inputs = (torch.zeros(2, 8, 5, 16), torch.zeros(2, 4, 7, 16), torch.zeros(2, 4, 7, 12))
    assert flops.count_flops(Attention(), inputs).total == 2 * 8 * 5 * 7 * (16 + 12)


def test_an_operator_that_matters_is_named_and_a_harmless_one_is_not() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.baddbmm(x, x, x).mul(2).add_(1)

    assert flops.count_flops(Odd(), torch.zeros(2, 4, 4)).uncounted == {"aten::baddbmm": 1}


def test_counting_leaves_the_model_and_the_fast_path_as_they_were() -> None:
    model = build_encoder("resnet18", stem="cifar")
    model.head.eval()
    flops.count_flops(model, torch.zeros(1, 3, 32, 32))
    assert model.training and model.backbone.training and not model.head.training
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_training_step_is_four_forward_passes(capsys: pytest.CaptureFixture[str]) -> None:
    flops.run(arguments("--batch-size", "256", "--json"))
    report = json.loads(capsys.readouterr().out)
    forward = report["macs"]["forward"]
    assert forward == pytest.approx(4.112e9, rel=1e-3)
    assert report["flops"]["image"] == pytest.approx(32.9e9, rel=1e-3)
    assert report["macs"]["image"] == 4 * forward
    assert report["macs"]["image_symmetric"] == 8 * forward
    assert report["macs"]["step"] == 256 * 4 * forward
    assert report["macs"]["epoch"] == (1281167 // 256) * 256 * 4 * forward
    assert report["flops"] == {name: 2 * macs for name, macs in report["macs"].items()}


def test_the_printed_report(capsys: pytest.CaptureFixture[str]) -> None:
    flops.run(
        arguments("--model", "resnet18", "--stem", "cifar", "--image-size", "32", "--depth", "2")
    )
    printed = capsys.readouterr()
    assert "backbone.layer4" in printed.out and "#flops" in printed.out
    assert "twice the multiply-adds" in printed.out
    assert "NOT COUNTED" not in printed.out
    assert printed.err == ""


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "resnet5"], "resnet50"),
        (["--images-per-epoch", "10"], "does not fill one batch"),
        (["--image-size", "1000000"], "not enough memory .*1\\.2e\\+04 GB"),
    ],
)
def test_what_cannot_be_counted_is_refused(flags: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        flops.run(arguments(*flags))


@pytest.mark.parametrize(
    "flag", ["--image-size", "--dim", "--batch-size", "--images-per-epoch", "--depth"]
)
def test_numbers_are_whole_and_from_one_on(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(flag, "0")
    assert f"{flag}: 0 is not positive" in capsys.readouterr().err
