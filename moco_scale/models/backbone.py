"""What a family of backbones is to everything that builds, shards, compiles or plans one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Wanted:
    """Properties of a backbone that flags choose.

    Attributes:
        dim: width of the projection.
        width: multiplies channel counts.
        stem: the first layers' kind.
        image_size: pixels a side of the images it takes.
        patch_size: pixels a side of a patch; 0: the model's own.
        train_patch_embedding: whether a transformer's first layer is trained.
    """

    dim: int = 128
    width: int = 1
    stem: str = "imagenet"
    image_size: int = 224
    patch_size: int = 0
    train_patch_embedding: bool = False


@dataclass(frozen=True)
class Backbone:
    """A family of networks: an entry of the registry.

    Attributes:
        models: names of its members.
        build: makes a member from its name: the network, [B, 3, S, S] -> [B, F], and the linear
            layer that projects its features, [B, F] -> [B, dim]. It draws initial weights from
            torch's global generator, which is seeded.
        blocks: classes of the blocks that engines shard, compile and compute again as a whole.
        attends: whether blocks have attention, which repeats on a GPU only when torch is told so.
        widths: factors of its channel counts.
        stems: first layers to choose from; empty: it has its own, whatever ``--stem`` says.
        patches: whether the size of its patches can be chosen.
    """

    models: tuple[str, ...]
    build: Callable[[str, Wanted], tuple[nn.Module, nn.Linear]]
    blocks: tuple[type[nn.Module], ...]
    attends: bool = False
    widths: tuple[int, ...] = (1,)
    stems: tuple[str, ...] = ()
    patches: bool = False
