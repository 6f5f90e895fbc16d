"""Vision transformers as momentum contrast trains them (Chen et al. 2021, MoCo v3, section 4).

torchvision's VisionTransformer with that paper's fixed two-dimensional sin-cos positions, its
initial weights, and a patch embedding that stays as it was drawn: training it is what made the
authors' runs unstable.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from moco_scale.models.backbone import Backbone, Wanted
from moco_scale.utils.errors import UserError


@dataclass(frozen=True)
class ViTShape:
    """One size of transformer; the MLP of a block is four times as wide as the block."""

    patch: int
    width: int
    depth: int
    heads: int


VITS: dict[str, ViTShape] = {
    # 12 heads where DeiT's has 6: section 4 of the paper.
    "vit_small": ViTShape(16, 384, 12, 12),
    "vit_base": ViTShape(16, 768, 12, 12),
    "vit_large": ViTShape(16, 1024, 24, 16),
    "vit_huge": ViTShape(14, 1280, 32, 16),
}


class MoCoViT(VisionTransformer):
    """[B, 3, S, S] -> [B, width]: the class token after the last normalisation.

    Args:
        shape: of the transformer.
        image_size: S, a multiple of the patch.
        train_patch_embedding: whether the first layer is trained.
    """

    def __init__(self, shape: ViTShape, image_size: int, train_patch_embedding: bool) -> None:
        super().__init__(
            image_size=image_size,
            patch_size=shape.patch,
            num_layers=shape.depth,
            num_heads=shape.heads,
            hidden_dim=shape.width,
            mlp_dim=4 * shape.width,
            num_classes=1,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        self.heads = nn.Identity()  # type: ignore[assignment]
        positions = sincos_positions(image_size // shape.patch, shape.width)
        self.encoder.pos_embedding = nn.Parameter(positions, requires_grad=False)
        self._initialize()
        self.conv_proj.requires_grad_(train_patch_embedding)

    def _initialize(self) -> None:
        patch = self.conv_proj
        fan = 3 * self.patch_size**2 + self.hidden_dim
        nn.init.uniform_(patch.weight, -math.sqrt(6 / fan), math.sqrt(6 / fan))
        nn.init.zeros_(patch.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.class_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.MultiheadAttention):
                # Query, key and value are three square layers in one tensor.
                weight = module.in_proj_weight
                bound = math.sqrt(6 / (weight.shape[0] // 3 + weight.shape[1]))
                nn.init.uniform_(weight, -bound, bound)
                nn.init.zeros_(module.in_proj_bias)


def sincos_positions(side: int, width: int) -> Tensor:
    """fp32 [1, 1 + side^2, width]: zeros for the class token, then one row for each patch.

    Half of the channels tell the column and half the row, each as sines and cosines of
    ``width / 4`` frequencies from 1 down to 1/10000.
    """
    quarter = width // 4
    frequency = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    place = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    row = place.repeat_interleave(side, 0)  # of patch i: i // side
    column = place.repeat(side, 1)
    table = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], 1)
    return torch.cat([torch.zeros(1, 4 * quarter, dtype=torch.float64), table]).float()[None]


def build(model: str, wanted: Wanted) -> tuple[nn.Module, nn.Linear]:
    """Build a member of :data:`VITS`; its projection is drawn after it.

    Raises:
        UserError: the image is no whole number of patches.
    """
    shape = VITS[model]
    shape = dataclasses.replace(shape, patch=wanted.patch_size or shape.patch)
    if wanted.image_size % shape.patch:
        raise UserError(
            f"--image-size {wanted.image_size} is not a multiple of {model}'s patches of "
            f"{shape.patch} pixels; choose another, or --patch-size"
        )
    network = MoCoViT(shape, wanted.image_size, wanted.train_patch_embedding)
    return network, nn.Linear(shape.width, wanted.dim)


BACKBONE = Backbone(
    models=tuple(VITS), build=build, blocks=(EncoderBlock,), attends=True, patches=True
)
