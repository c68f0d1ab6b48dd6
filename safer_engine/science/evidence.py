"""Which latents speak for and against the label of each pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

_CHUNK = 4096


@dataclass(frozen=True)
class Evidence:
    """A short list per pair, flattened.

    Attributes:
        offsets: int64 [P + 1]; the list of pair p is offsets[p]:offsets[p + 1].
        latent_ids: int32; the largest absolute contribution first.
        contributions: float64, Δ_i · w_i; positive speaks for the label. Never 0.
    """

    offsets: NDArray[np.int64]
    latent_ids: NDArray[np.int32]
    contributions: NDArray[np.float64]


def no_evidence(n_pairs: int) -> Evidence:
    """An empty list for each pair."""
    return Evidence(np.zeros(n_pairs + 1, np.int64), np.zeros(0, np.int32), np.zeros(0))


def top_contributions(delta_PS: Any, weights_CS: NDArray[np.float64], cell_P: NDArray[np.int64], keep: int) -> Evidence:
    """The strongest terms Δ_pi · weights[cell_p, i] of each pair for and against its label, largest absolute value first.

    Half of `keep` for (the larger half) and half against; where one side has fewer, the other fills up. So the side that the sum
    of all terms is on is shown, even where the few largest terms are on the other. Ties go to the smaller latent id.

    Args:
        delta_PS: CSR Δ of the pairs.
        weights_CS: directions.
        cell_P: which direction scored each pair.
    """
    counts, ids, values = [np.zeros(1, np.int64)], [], []
    for start in range(0, delta_PS.shape[0], _CHUNK):
        block = sparse.csr_array(delta_PS[start : start + _CHUNK])
        row = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))
        value = block.data.astype(np.float64) * weights_CS[cell_P[start + row], block.indices]
        live = value != 0
        row, latent, value = row[live], block.indices[live], value[live]
        order = np.lexsort((latent, -np.abs(value), row))
        row, latent, value = row[order], latent[order], value[order]
        kept = _strongest(row, value > 0, block.shape[0], keep)
        counts.append(np.bincount(row[kept], minlength=block.shape[0]))
        ids.append(latent[kept].astype(np.int32))
        values.append(value[kept])
    offsets = np.cumsum(np.concatenate(counts))
    return Evidence(
        offsets.astype(np.int64), np.concatenate([np.zeros(0, np.int32), *ids]), np.concatenate([np.zeros(0), *values])
    )


def _strongest(row: NDArray[np.int64], speaks_for: NDArray[np.bool_], n_rows: int, keep: int) -> NDArray[np.bool_]:
    """Which terms, sorted by row and falling size, are listed."""
    n_for, n_against = (np.bincount(row[side], minlength=n_rows) for side in (speaks_for, ~speaks_for))
    room_for = np.maximum(keep - keep // 2, keep - n_against)
    room_against = keep - np.minimum(n_for, room_for)
    kept = np.zeros(len(row), dtype=np.bool_)
    for side, n, room in ((speaks_for, n_for, room_for), (~speaks_for, n_against, room_against)):
        place = np.arange(int(n.sum())) - np.repeat(np.cumsum(n) - n, n)
        kept[side] = place < room[row[side]]
    return kept


def scatter(parts: list[tuple[NDArray[np.int64], Evidence]], n_pairs: int) -> Evidence:
    """Join evidence of disjoint sets of pairs (rows, evidence of those rows) into one for all; other pairs get none."""
    counts = np.zeros(n_pairs, np.int64)
    for rows, part in parts:
        counts[rows] = np.diff(part.offsets)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    ids, values = np.zeros(offsets[-1], np.int32), np.zeros(offsets[-1])
    for rows, part in parts:
        size = np.diff(part.offsets)
        target = np.repeat(offsets[rows] - part.offsets[:-1], size) + np.arange(len(part.latent_ids))
        ids[target], values[target] = part.latent_ids, part.contributions
    return Evidence(offsets, ids, values)
