"""Sharded tensors of a checkpoint: each rank writes, or reads, only some rows.

The files hold them as one tensor in chunks with their places, so that a tensor written whole can
be read in shards, and the other way round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

# Chunks are read whole, even for some of their rows.
_CHUNK_BYTES = 1 << 25


class Rows(NamedTuple):
    """Range of consecutive rows of a tensor."""

    first: int
    size: int
    total: int


class RowsSavePlanner(DefaultSavePlanner):
    """Writes tensors of which the state holds only some rows to their places."""

    def __init__(self, rows: Mapping[str, Rows]) -> None:
        super().__init__()
        self._rows = rows

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = [item for item in plan.items if item.index.fqn not in self._rows]
        for name in [name for name in self.state_dict if name in self._rows]:
            items += _write_items(name, self.state_dict[name], self._rows[name])
        self.plan = dataclasses.replace(plan, items=items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        if index.fqn not in self._rows or index.offset is None:
            return super().lookup_object(index)
        tensor, rows = self.state_dict[index.fqn], self._rows[index.fqn]
        start = index.offset[0] - rows.first
        return tensor[start : start + _rows_of_a_chunk(tensor)]


def _rows_of_a_chunk(tensor: Tensor) -> int:
    row = max(tensor[:1].numel(), 1) * tensor.element_size()
    return max(_CHUNK_BYTES // row, 1)


def _write_items(name: str, tensor: Tensor, rows: Rows) -> list[WriteItem]:
    step = _rows_of_a_chunk(tensor)
    items = []
    for start in range(0, rows.size, step):
        chunk = _chunk(tensor[start : start + step], rows.first + start)
        data = TensorWriteData(
            chunk=chunk,
            properties=TensorProperties.create_from_tensor(tensor),
            size=torch.Size((rows.total, *tensor.shape[1:])),
        )
        items.append(
            WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)
        )
    return items


def _chunk(rows: Tensor, first: int) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size((first, *([0] * (rows.dim() - 1)))), rows.shape)
