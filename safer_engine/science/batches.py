"""Putting sequences of different lengths into padded batches at the least cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int32]


@dataclass(frozen=True)
class BatchPlan:
    """How sequences are put into batches.

    Attributes:
        tokens: at most this many tokens in a batch, padding included (one longer sequence makes its own batch).
        overhead: what starting a batch costs, in tokens: the larger, the fewer and the more padded the batches.
    """

    tokens: int = 8192
    overhead: int = 64


def plan_batches(lengths: Sequence[int], plan: BatchPlan) -> list[list[int]]:
    """Batches of indices into `lengths`: sorted by length, longest first, of least total cost.

    The cost of a batch is rows × longest + overhead. Among all cuts of the sorted sequences into batches within the
    token budget, the cheapest is found by dynamic programming. Deterministic; every index occurs once.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    best = [0.0] * (len(order) + 1)
    cut = [0] * (len(order) + 1)
    for start in range(len(order) - 1, -1, -1):
        longest = max(1, lengths[order[start]])
        room = max(1, plan.tokens // longest)
        ends = range(start + 1, min(start + room, len(order)) + 1)
        costs = [(end - start) * longest + plan.overhead + best[end] for end in ends]
        best[start] = min(costs)
        cut[start] = ends[costs.index(best[start])]
    batches = []
    start = 0
    while start < len(order):
        batches.append(order[start : cut[start]])
        start = cut[start]
    return batches


def pad(sequences: Sequence[IntArray], pad_id: int, extra: int = 0) -> tuple[Tensor, Tensor | None]:
    """Token ids int64 [B, T] padded on the right, and their mask (None where nothing is padded).

    Args:
        extra: columns of padding beyond the longest sequence.
    """
    lengths = [len(ids) for ids in sequences]
    width = max(lengths) + extra
    ids_BT = np.full((len(sequences), width), pad_id, dtype=np.int64)
    for row, ids in enumerate(sequences):
        ids_BT[row, : len(ids)] = ids
    if min(lengths) == width:
        return torch.from_numpy(ids_BT), None
    mask_BT = np.arange(width)[None, :] < np.array(lengths)[:, None]
    return torch.from_numpy(ids_BT), torch.from_numpy(mask_BT).long()
