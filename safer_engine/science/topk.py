"""Exact selection of the largest pre-activations, per row or per batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safer_engine.errors import NumericalError

_GROUP = 8
_MIN_GROUPED = 1024
_MAX_SWEEPS = 64
_BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
_LEAST_ROWS = 256
_SURPLUS = 2.0


@dataclass(frozen=True)
class Selected:
    """Chosen entries of a matrix, row by row (compressed rows).

    Attributes:
        values_N: the entries, in the matrix's dtype.
        columns_N: their columns, int64.
        offsets_B1: row b owns entries offsets[b] … offsets[b + 1] − 1; int64, B + 1 long.
    """

    values_N: Tensor
    columns_N: Tensor
    offsets_B1: Tensor

    @property
    def rows_N(self) -> Tensor:
        """Row of each entry, int64, ascending."""
        counts_B = self.offsets_B1.diff()
        rows_B = torch.arange(len(counts_B), device=counts_B.device)
        return torch.repeat_interleave(rows_B, counts_B, output_size=len(self.columns_N))


@dataclass(frozen=True)
class TopK:
    """The k largest entries of each row: values [B, K] and columns [B, K] int64, in no particular order."""

    values_BK: Tensor
    columns_BK: Tensor


def block_rows(n_columns: int, device: torch.device) -> int:
    """Rows of pre-activations that are best made and searched at a time: on a CPU what stays in its cache."""
    return max(_LEAST_ROWS, _BLOCK_ELEMENTS.get(device.type, 1 << 26) // n_columns)


def top_k(pre_BS: Tensor, k: int) -> TopK:
    """The k largest entries of each row, exactly.

    The k largest lie within the k strided column groups of largest maximum, so wide rows are first reduced to their
    group maxima, a cheap vectorised pass, and only those groups are searched.

    Args:
        pre_BS: pre-activations [B, S], any float dtype.
        k: 1 … S.
    """
    n_columns = pre_BS.shape[1]
    n_groups = n_columns // _GROUP
    if n_columns < _MIN_GROUPED or n_columns % _GROUP or k > n_groups or not pre_BS.is_contiguous():
        values_BK, columns_BK = pre_BS.topk(k, dim=1, sorted=False)
        return TopK(values_BK, columns_BK)
    grouped = pre_BS.view(-1, _GROUP, n_groups)
    groups_BK = grouped.amax(dim=1).topk(k, dim=1, sorted=False).indices
    candidates = grouped.gather(2, groups_BK[:, None, :].expand(-1, _GROUP, -1)).flatten(1)
    values_BK, found_BK = candidates.topk(k, dim=1, sorted=False)
    member_BK = torch.div(found_BK, k, rounding_mode="floor")
    return TopK(values_BK, member_BK * n_groups + groups_BK.gather(1, found_BK % k))


def batch_top_k(pre_BS: Tensor, n: int) -> Selected:
    """The n largest positive entries of the whole matrix, exactly (arXiv 2412.06410, eq. 5; n is k · batch there).

    A threshold that lets somewhat more than n entries through is found by counting sweeps; only those are then ordered.
    With fewer than n positive entries, all of them are taken. Raises NumericalError on an infinite or missing maximum.
    """
    return largest(above(pre_BS, _threshold_below(pre_BS, n)), n)


def joined(parts: Sequence[Selected]) -> Selected:
    """Blocks of rows put one after another."""
    if len(parts) == 1:
        return parts[0]
    offsets = [parts[0].offsets_B1]
    for part in parts[1:]:
        offsets.append(part.offsets_B1[1:] + offsets[-1][-1])
    values, columns = (torch.cat([getattr(part, name) for part in parts]) for name in ("values_N", "columns_N"))
    return Selected(values, columns, torch.cat(offsets))


def largest(found: Selected, n: int) -> Selected:
    """The n largest entries, or all where there are no more; rows and their order are kept."""
    if len(found.values_N) <= n:
        return found
    kept_N = found.values_N.topk(n, sorted=False).indices.sort().values
    return _by_row(found.rows_N[kept_N], found.columns_N[kept_N], found.values_N[kept_N], len(found.offsets_B1) - 1)


def above(pre_BS: Tensor, threshold: float | Tensor) -> Selected:
    """All entries above a threshold, row by row; within a row in a fixed order of no meaning."""
    n_rows, n_columns = pre_BS.shape
    n_groups = n_columns // _GROUP
    if n_columns < _MIN_GROUPED or n_columns % _GROUP or not pre_BS.is_contiguous():
        rows_N, columns_N = (pre_BS > threshold).nonzero(as_tuple=True)
        return _by_row(rows_N, columns_N, pre_BS[rows_N, columns_N], n_rows)
    grouped = pre_BS.view(n_rows, _GROUP, n_groups)
    rows_M, groups_M = (grouped.amax(dim=1) > threshold).nonzero(as_tuple=True)
    candidates = grouped[rows_M, :, groups_M]
    place_N, member_N = (candidates > threshold).nonzero(as_tuple=True)
    return _by_row(rows_M[place_N], member_N * n_groups + groups_M[place_N], candidates[place_N, member_N], n_rows)


def _by_row(rows_N: Tensor, columns_N: Tensor, values_N: Tensor, n_rows: int) -> Selected:
    counts_B = torch.bincount(rows_N, minlength=n_rows)
    return Selected(values_N, columns_N, torch.cat([counts_B.new_zeros(1), counts_B.cumsum(0)]))


def _threshold_below(pre_BS: Tensor, wanted: int) -> float:
    """A threshold ≥ 0 that at least `wanted` entries exceed, and not many more; 0 where fewer are positive."""
    high = float(pre_BS.max())
    if not high < float("inf"):
        raise NumericalError("a pre-activation is not finite", "lower the learning rate (sae.lr)")
    low = 0.0
    if int(torch.count_nonzero(pre_BS > low)) <= wanted * _SURPLUS:
        return low
    for _ in range(_MAX_SWEEPS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        count = int(torch.count_nonzero(pre_BS > middle))
        if count < wanted:
            high = middle
        else:
            low = middle
            if count <= wanted * _SURPLUS:
                break
    return low
