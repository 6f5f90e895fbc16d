"""torchvision's ConvNeXt (Liu et al. 2022)."""

from __future__ import annotations

import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock

from moco_scale.models.backbone import Backbone, Wanted
from moco_scale.utils.errors import UserError

_PATCH, _HALVINGS = 4, 3


class Block(CNBlock):
    """Block of torchvision's, with the same rounding under every engine.

    Where one gathers weights in half precision the scale is among them, and torchvision's sum, in
    place of the branch, would be rounded too.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        branch = self.block(x)
        return x + self.stochastic_depth(self.layer_scale.to(branch.dtype) * branch)


def build(model: str, wanted: Wanted) -> tuple[nn.Module, nn.Linear]:
    """Build torchvision's ``convnext_SIZE(num_classes=dim)`` and take its last layer off.

    Another patch than its own is drawn after it.

    Raises:
        UserError: the image is too small to be halved three times.
    """
    patch = wanted.patch_size or _PATCH
    if wanted.image_size < (smallest := patch * 2**_HALVINGS):
        raise UserError(
            f"--image-size {wanted.image_size} is too small for {model}'s patches of {patch} "
            f"pixels; choose {smallest} or more, or a smaller --patch-size"
        )
    network = torchvision.models.get_model(model, num_classes=wanted.dim, block=Block)
    if patch != _PATCH:
        stem = network.features[0]
        stem[0] = nn.Conv2d(3, stem[0].out_channels, patch, stride=patch)
        nn.init.trunc_normal_(stem[0].weight, std=0.02)
        nn.init.zeros_(stem[0].bias)
    projection = network.classifier[-1]
    network.classifier[-1] = nn.Identity()
    return network, projection


BACKBONE = Backbone(
    models=("convnext_tiny", "convnext_small", "convnext_base"),
    build=build,
    blocks=(Block,),
    patches=True,
)
