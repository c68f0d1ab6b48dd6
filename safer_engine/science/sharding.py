"""One training shared by several processes: weights in shards (FSDP), each step's pairs dealt out.

Every process calls the same methods in the same order: those marked *collective* wait for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Share:
    """Which part of a training this process does; alone it does all of it.

    Attributes:
        rank, of: this process among so many, 0-based.
        mesh: the processes, where there are several.
    """

    rank: int = 0
    of: int = 1
    mesh: DeviceMesh | None = None

    def shard(self, model: nn.Module, blocks: tuple[nn.Module, ...]) -> None:
        """Keep no more than this process's shard of each weight; blocks are gathered one at a time. Without a mesh, nothing."""
        if self.mesh is None:
            return
        from torch.distributed.fsdp import fully_shard

        for part in (*blocks, model):
            fully_shard(part, mesh=self.mesh)

    def total(self, *values: float) -> tuple[float, ...]:
        """Sums over the processes (collective)."""
        if self.mesh is None:
            return values
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return tuple(sums.tolist())

    def wait(self) -> None:
        """Until all processes are here (collective)."""
        self.total(0.0)


ALONE = Share()


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is without shards (collective where it has some)."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_out_as(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, of which every process has the same, in the shards and on the device of another."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    placed = full.to(like.device, copy=True)
    if not isinstance(like, DTensor):
        return placed
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)
