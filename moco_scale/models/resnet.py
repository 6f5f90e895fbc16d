"""torchvision's ResNets, wider ones, and a stem for small images (He et al. 2016)."""

from __future__ import annotations

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from moco_scale.models.backbone import Backbone, Wanted

Block = type[BasicBlock] | type[Bottleneck]

RESNETS: dict[str, tuple[Block, list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}


class WideResNet(ResNet):
    """torchvision's ResNet with every channel count multiplied, the stem's included.

    Its weights are those that torchvision's ``resnetNN(num_classes=dim)`` has after
    ``torch.manual_seed``. A 3x3 or a wider stem is drawn after them.
    """

    def __init__(self, model: str, wanted: Wanted) -> None:
        block, layers = RESNETS[model]
        width = self.channel_multiplier = wanted.width
        super().__init__(block, layers, num_classes=wanted.dim)
        channels = 64 * width
        if wanted.stem == "cifar":
            # Initialised as any nn.Conv2d, not as torchvision's ResNet: so is the official demo's.
            self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()  # type: ignore[assignment]
        elif width > 1:
            self.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        if width > 1:
            self.bn1 = nn.BatchNorm2d(channels)
            self.fc = nn.Linear(512 * block.expansion * width, wanted.dim)

    def take_projection(self) -> nn.Linear:
        """Its last layer, [B, feature_dim] -> [B, dim], which it no longer has then."""
        projection = self.fc
        self.fc = nn.Identity()  # type: ignore[assignment]
        return projection

    def _make_layer(
        self, block: Block, planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        if planes == 64:  # the first stage: its input is the widened stem
            self.inplanes = 64 * self.channel_multiplier
        return super()._make_layer(block, planes * self.channel_multiplier, blocks, stride, dilate)


def build(model: str, wanted: Wanted) -> tuple[nn.Module, nn.Linear]:
    """Build a member of :data:`RESNETS`; its projection is torchvision's last layer."""
    network = WideResNet(model, wanted)
    return network, network.take_projection()


BACKBONE = Backbone(
    models=tuple(RESNETS),
    build=build,
    blocks=(BasicBlock, Bottleneck),
    widths=(1, 2, 4),
    stems=("imagenet", "cifar"),
)
