"""The backbones that there are, and what the rest of the program asks of them."""

from __future__ import annotations

from torch import nn

from moco_scale.models import convnext, resnet, vit
from moco_scale.models.backbone import Backbone, Wanted
from moco_scale.models.batchnorm import GroupedBatchNorm
from moco_scale.utils.errors import UserError

BACKBONES: tuple[Backbone, ...] = (resnet.BACKBONE, vit.BACKBONE, convnext.BACKBONE)
MODELS = tuple(model for family in BACKBONES for model in family.models)
WIDTHS = tuple(sorted({width for family in BACKBONES for width in family.widths}))
STEMS = tuple(dict.fromkeys(stem for family in BACKBONES for stem in family.stems))
NORMS = (GroupedBatchNorm, nn.LayerNorm)
"""Normalisation in blocks, whose weights are gathered in fp32 whatever the precision."""


def build_backbone(model: str, wanted: Wanted) -> tuple[nn.Module, nn.Linear]:
    """Build what :attr:`Backbone.build` builds.

    Raises:
        UserError: an unknown name, or what such a model cannot be.
    """
    family = next((each for each in BACKBONES if model in each.models), None)
    if family is None:
        raise UserError(f"--model {model}: unknown; choose one of {', '.join(MODELS)}")
    stems = family.stems or STEMS
    if wanted.stem not in stems:
        raise UserError(f"--stem {wanted.stem}: for {model}, choose one of {', '.join(stems)}")
    if wanted.width not in family.widths:
        widths = ", ".join(map(str, family.widths))
        raise UserError(f"--model-width {wanted.width}: for {model}, choose one of {widths}")
    if wanted.patch_size and not family.patches:
        raise UserError(f"--patch-size {wanted.patch_size}: {model} has no patches; drop the flag")
    return family.build(model, wanted)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """List the blocks of a backbone in the order of the forward pass."""
    kinds = tuple(kind for family in BACKBONES for kind in family.blocks)
    return [part for part in module.modules() if isinstance(part, kinds)]


def attends(module: nn.Module) -> bool:
    """Tell whether some block of a module has attention."""
    kinds = tuple(kind for family in BACKBONES if family.attends for kind in family.blocks)
    return any(isinstance(part, kinds) for part in module.modules())
