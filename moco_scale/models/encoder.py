"""Backbones and heads: what turns an image into a feature."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from moco_scale.models.batchnorm import GroupedBatchNorm2d
from moco_scale.models.vit import VITS, build_vit
from moco_scale.models.vit import Block as ViTBlock
from moco_scale.utils.errors import UserError

Block = type[BasicBlock] | type[Bottleneck]

RESNETS: dict[str, tuple[Block, list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}
MODELS = (*RESNETS, *VITS)
BLOCKS = (BasicBlock, Bottleneck, ViTBlock)
"""Parts of a backbone that engines shard, recompute or compile as a whole."""
WIDTHS = (1, 2, 4)
STEMS = ("imagenet", "cifar")
HEADS = ("linear", "mlp")


class Encoder(nn.Module):
    """A backbone and the head that projects its features for the contrastive loss.

    Attributes:
        backbone: [B, 3, S, S] -> [B, feature_dim], average-pooled or a class token.
        head: [B, feature_dim] -> [B, dim].
        feature_dim: width of the backbone's output.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.feature_dim = feature_dim

    def features(self, x: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, feature_dim]: what linear evaluation and other tasks use."""
        return self.backbone(x)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, dim], not normalised."""
        return self.head(self.backbone(x))


def build_encoder(
    model: str,
    *,
    width: int = 1,
    stem: str = "imagenet",
    head: str = "linear",
    dim: int = 128,
    image_size: int = 224,
    patch_size: int = 0,
    train_patch_embedding: bool = False,
    seed: int = 0,
) -> Encoder:
    """Build an encoder whose initial weights are a function of the seed alone.

    A ResNet has the weights that torchvision's ``resnetNN(num_classes=dim)`` has after
    ``torch.manual_seed(seed)``. What that has not (the ``mlp`` head's first layer, a 3x3 or a wider
    stem) is drawn after it, as the official code does: a run of ours and one of another code base
    can begin at the same weights. The global random generator is left as it was.

    Args:
        model: one of :data:`MODELS`.
        width: of a ResNet: multiplies every channel count (ResNet-50 "4x" of the MoCo paper has
            8192 features).
        stem: of a ResNet: ``"imagenet"`` (7x7 stride 2, max-pool) or ``"cifar"`` (3x3, no pooling).
        head: ``"linear"`` (MoCo v1) or ``"mlp"`` (MoCo v2: two layers, ReLU, no BatchNorm).
        dim: width of the projected output.
        image_size: of a transformer: pixels a side of the images it takes.
        patch_size: of a transformer: pixels a side of a patch; 0: the model's own.
        train_patch_embedding: of a transformer: its first layer is trained too.
        seed: of the initial weights.

    Raises:
        UserError: an unknown name or width, or images that are no whole number of patches.
    """
    if model not in MODELS:
        raise UserError(f"--model {model}: unknown; choose one of {', '.join(MODELS)}")
    if stem not in STEMS:
        raise UserError(f"--stem {stem}: choose one of {', '.join(STEMS)}")
    if width not in WIDTHS:
        raise UserError(f"--model-width {width}: choose one of {', '.join(map(str, WIDTHS))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone: nn.Module
        if model in VITS:
            if width != 1:
                raise UserError(f"--model-width {width} is for ResNets, not for {model}")
            backbone, feature_dim = build_vit(
                model,
                image_size=image_size,
                patch_size=patch_size,
                train_patch_embedding=train_patch_embedding,
            )
        else:
            block, layers = RESNETS[model]
            backbone = _WideResNet(block, layers, width, stem, dim)
            feature_dim = 512 * block.expansion * width
            return Encoder(backbone, _head(head, backbone.take_projection()), feature_dim)
        return Encoder(backbone, _head(head, nn.Linear(feature_dim, dim)), feature_dim)


class _WideResNet(ResNet):
    """torchvision's ResNet with every channel count multiplied, the stem's included."""

    def __init__(
        self, block: Block, layers: list[int], width: int, stem: str, num_classes: int
    ) -> None:
        self.channel_multiplier = width
        super().__init__(block, layers, num_classes=num_classes, norm_layer=GroupedBatchNorm2d)
        channels = 64 * width
        if stem == "cifar":
            # Initialised as any nn.Conv2d, not as torchvision's ResNet: so is the official demo's.
            self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()  # type: ignore[assignment]
        elif width > 1:
            self.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        if width > 1:
            self.bn1 = GroupedBatchNorm2d(channels)
            self.fc = nn.Linear(512 * block.expansion * width, num_classes)

    def take_projection(self) -> nn.Linear:
        """Its last layer, [B, feature_dim] -> [B, num_classes], which it no longer has then."""
        projection = self.fc
        self.fc = nn.Identity()  # type: ignore[assignment]
        return projection

    def _make_layer(
        self, block: Block, planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        if planes == 64:  # the first stage: its input is the widened stem
            self.inplanes = 64 * self.channel_multiplier
        return super()._make_layer(block, planes * self.channel_multiplier, blocks, stride, dilate)


def _head(kind: str, last: nn.Linear) -> nn.Module:
    """The head that ends in ``last``, [B, feature_dim] -> [B, dim]."""
    if kind == "linear":
        return last
    if kind == "mlp":
        return nn.Sequential(nn.Linear(last.in_features, last.in_features), nn.ReLU(), last)
    raise UserError(f"--head {kind}: choose one of {', '.join(HEADS)}")
