"""An encoder: a backbone and a head, what turns an image into a feature."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moco_scale.models import stochastic_depth
from moco_scale.models.adopt import adopt
from moco_scale.models.backbone import Wanted
from moco_scale.models.batchnorm import set_part
from moco_scale.models.registry import build_backbone
from moco_scale.models.stochastic_depth import StochasticDepth
from moco_scale.utils.errors import UserError

HEADS = ("linear", "mlp")


class Encoder(nn.Module):
    """A backbone and the head that projects its features for the contrastive loss.

    BatchNorm1d, BatchNorm2d and stochastic depth in them become ours.

    Attributes:
        backbone: [B, 3, S, S] -> [B, feature_dim], average-pooled or a class token.
        head: [B, feature_dim] -> [B, dim].
        feature_dim: width of the backbone's output.

    Raises:
        UserError: a module normalises over a batch, or draws, and cannot become ours.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.feature_dim = feature_dim
        adopt(self)
        self.drawing = [m for m in self.modules() if isinstance(m, StochasticDepth)]

    def start_pass(
        self, micro_batch: int = 0, micro_batches: int = 1, view: int = 0, views: int = 1
    ) -> None:
        """Start a forward pass of a step, for running statistics and draws.

        Args:
            micro_batch: of the step, from 0.
            micro_batches: of a step; they are equally large.
            view: of the micro-batch, from 0.
            views: of a micro-batch.
        """
        if micro_batches > 1:
            set_part(self, micro_batch, micro_batches, view, views)
        if self.drawing and self.training:
            device = next(self.parameters()).device
            stochastic_depth.draw(self.drawing, device, micro_batch, micro_batches, view)

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

    A network of torchvision's has the weights that ``network(num_classes=dim)`` has there after
    ``torch.manual_seed(seed)``. What that has not (the ``mlp`` head's first layer, another
    stem) is drawn after it, as the official code does: a run of ours and one of another code base
    can begin at the same weights. The global random generator is left as it was.

    Args:
        model: one of :data:`registry.MODELS`.
        width: multiplies every channel count (ResNet-50 "4x" of the MoCo paper has 8192 features).
        stem: ``"imagenet"`` (7x7 stride 2, max-pool) or ``"cifar"`` (3x3, no pooling); of models
            that have a choice.
        head: ``"linear"`` (MoCo v1) or ``"mlp"`` (MoCo v2: two layers, ReLU, no BatchNorm).
        dim: width of the projected output.
        image_size: pixels a side of the images it takes.
        patch_size: pixels a side of a patch, of models that have them; 0: the model's own.
        train_patch_embedding: of a transformer: its first layer is trained too.
        seed: of the initial weights.

    Raises:
        UserError: an unknown name, or what the model cannot be.
    """
    wanted = Wanted(
        dim=dim,
        width=width,
        stem=stem,
        image_size=image_size,
        patch_size=patch_size,
        train_patch_embedding=train_patch_embedding,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone, projection = build_backbone(model, wanted)
        return Encoder(backbone, _head(head, projection), projection.in_features)


def _head(kind: str, last: nn.Linear) -> nn.Module:
    """The head that ends in ``last``, [B, feature_dim] -> [B, dim]."""
    if kind == "linear":
        return last
    if kind == "mlp":
        return nn.Sequential(nn.Linear(last.in_features, last.in_features), nn.ReLU(), last)
    raise UserError(f"--head {kind}: choose one of {', '.join(HEADS)}")
