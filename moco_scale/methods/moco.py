"""Query and key encoders in one module, so that every engine treats them the same."""

from __future__ import annotations

import contextlib
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_scale.models.encoder import Encoder

VIEWS = 2
"""Random views of an image in each step."""


class MoCo(nn.Module):
    """Momentum contrast's two encoders (He et al. 2020).

    Attributes:
        query: trained by the optimizer.
        key: follows the query by an exponential moving average; never has a gradient.
        compute_dtype: of the encoders' computation, by autocast; None: fp32. The casts are made
            here, so that they are the same under every engine.
    """

    compute_dtype: torch.dtype | None = None

    def __init__(self, query: Encoder) -> None:
        super().__init__()
        self.query = query
        self.key = copy.deepcopy(query)
        self.key.requires_grad_(False)

    def forward(self, *views: Tensor, micro_batch: int = 0, micro_batches: int = 1) -> list[Tensor]:
        """Encode queries of each view: [B, 3, S, S] -> fp32 unit rows [B, dim].

        Args:
            views: of this micro-batch.
            micro_batch: index of the micro-batch, for :meth:`Encoder.start_pass`.
            micro_batches: micro-batches of a step.
        """
        features = []
        with self._autocast(views[0].device.type):
            for number, view in enumerate(views):
                self.query.start_pass(micro_batch, micro_batches, number, len(views))
                features.append(self.query(view))
        return [normalize(feature) for feature in features]

    @torch.no_grad()
    def keys(self, view: Tensor, micro_batches: int = 1) -> Tensor:
        """Encode keys of a view in micro-batches: [B, 3, S, S] -> fp32 unit rows [B, dim]."""
        features = []
        with self._autocast(view.device.type):
            for micro_batch, images in enumerate(view.chunk(micro_batches)):
                self.key.start_pass(micro_batch, micro_batches)
                features.append(self.key(images))
        return normalize(torch.cat(features) if micro_batches > 1 else features[0])

    def _autocast(self, device: str) -> contextlib.AbstractContextManager[object]:
        if self.compute_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device, dtype=self.compute_dtype)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the query's trained parameters by their names in this module."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def parameter_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return parameters of the query and, in the same order, of the key."""
        return list(self.query.parameters()), list(self.key.parameters())


def normalize(features: Tensor) -> Tensor:
    """L2-normalise rows in fp32."""
    return F.normalize(features.float(), dim=1)


@torch.no_grad()
def momentum_update(key: list[Tensor], query: list[Tensor], momentum: float) -> None:
    """Update key <- momentum * key + (1 - momentum) * query, in place, in fp32."""
    torch._foreach_lerp_(key, query, 1 - momentum)
