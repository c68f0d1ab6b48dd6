"""Activations of all latents, summed per response: one shard of positions in, sparse rows out.

Which positions count is decided once, by `counted_positions`: salience, contexts and pair scores all rest on the same
ones. Negative values of an SAE that keeps them take part in its reconstruction but are not activations, and are not
counted (arXiv 2507.00665).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safer_engine.errors import NumericalError
from safer_engine.science.sae import SparseActs

_BLOCK_CELLS = 1 << 22
_LOW_BITS = np.int64(0xFFFFFFFF)

Encode = Callable[[Tensor], SparseActs]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class FlagBits:
    """What the bits of a position's flags mean (see `Activations`)."""

    special: int
    high_norm: int
    head: int
    sentence_end: int


@dataclass(frozen=True)
class ShardRows:
    """Positions of consecutive pairs; pairs ascending, within a pair chosen first, positions ascending.

    Attributes:
        x_BD: residual stream at the hook, any float dtype.
        response_B: 2 × pair + side (0 chosen, 1 rejected), int64.
        position_B: token index in its sequence.
        counted_B: whether the position counts.
    """

    x_BD: Tensor
    response_B: Ints
    position_B: NDArray[np.int32]
    counted_B: NDArray[np.bool_]

    def __post_init__(self) -> None:
        if len(self.response_B) == 0:
            raise NumericalError("a shard of activations has no position")
        if (np.diff(self.response_B) < 0).any():
            raise NumericalError("the positions of a shard are not in the order of pairs and sides")


@dataclass(frozen=True)
class LatentTotals:
    """Sums over counted positions, per latent.

    Attributes:
        firings_S: positions with activation > 0, int64.
        responses_S: responses with any such position, int64.
        energy_S: Σ z², float64, in squared units of the SAE's scaled input.
        n_positions: counted positions.
    """

    firings_S: Ints
    responses_S: Ints
    energy_S: NDArray[np.float64]
    n_positions: int


@dataclass(frozen=True)
class ShardActs:
    """Latents that fired in the responses of consecutive pairs, as compressed rows.

    Attributes:
        first_pair: pair of the first two rows; row r is side r % 2 of pair first_pair + r // 2.
        positions_R: counted positions per row, int32.
        indptr_R1: row r owns entries indptr[r] … indptr[r + 1] − 1, int64.
        latents_N: latent ids, ascending within a row, int32.
        sums_N: sum of positive activations over the row's counted positions, float32 (summed in float64).
        peaks_N: largest activation in the row, float32.
        peak_positions_N: its token index (the first, among equals), int32.
        totals: over the shard.
    """

    first_pair: int
    positions_R: NDArray[np.int32]
    indptr_R1: Ints
    latents_N: NDArray[np.int32]
    sums_N: NDArray[np.float32]
    peaks_N: NDArray[np.float32]
    peak_positions_N: NDArray[np.int32]
    totals: LatentTotals

    @property
    def responses_N(self) -> Ints:
        """2 × pair + side of each entry."""
        rows = np.repeat(np.arange(len(self.positions_R), dtype=np.int64), np.diff(self.indptr_R1))
        return rows + 2 * self.first_pair


@dataclass(frozen=True)
class SideActs:
    """Per-response sums of one side: compressed rows over pairs (fields as in `ShardActs`)."""

    indptr: Ints
    indices: NDArray[np.int32]
    sums: NDArray[np.float32]


@dataclass(frozen=True)
class ResponseActs:
    """Per-response sums of both sides; arrays may be memory maps.

    Attributes:
        chosen, rejected: rows are pairs.
        n_positions_P2: counted positions, chosen and rejected.
        d_sae: number of latents.
    """

    chosen: SideActs
    rejected: SideActs
    n_positions_P2: NDArray[np.int32]
    d_sae: int


def counted_positions(
    flags_B: NDArray[np.uint8],
    bits: FlagBits,
    estimator: Literal["paired_mean", "paper"],
    positions: Literal["all", "sentence_ends"],
) -> NDArray[np.bool_]:
    """Which stored positions count.

    `paired_mean`: all but special tokens and high-norm positions, as in SAE training; the position the head reads
    always counts. `paper`: sentence ends alone where those were asked for (the position the head reads is stored too,
    but is no sentence end), everything otherwise: the paper leaves nothing out.

    Args:
        flags_B: sums of flag bits.
    """
    everything = np.ones(len(flags_B), dtype=np.bool_)
    if estimator == "paper":
        return _has(flags_B, bits.sentence_end) if positions == "sentence_ends" else everything
    return ~_has(flags_B, bits.special | bits.high_norm) | _has(flags_B, bits.head)


def _has(flags_B: NDArray[np.uint8], bits: int) -> NDArray[np.bool_]:
    return np.asarray((flags_B & bits) != 0, dtype=np.bool_)


def summarise_shard(rows: ShardRows, encode: Encode, d_sae: int) -> ShardActs:
    """Encode a shard's counted positions and sum them per response.

    Works in blocks of whole responses, so that memory is bounded by the shard whatever d_sae is.

    Args:
        encode: raw activations [B, D] to sparse latents; each position independent of the others.
        d_sae: number of latents.
    """
    first_pair, last_pair = int(rows.response_B[0]) // 2, int(rows.response_B[-1]) // 2
    n_rows = 2 * (last_pair - first_pair + 1)
    kept = np.flatnonzero(rows.counted_B)
    local = rows.response_B[kept] - 2 * first_pair
    totals = _Totals(d_sae)
    blocks = [_sum_block(rows, kept[part], local[part], encode, totals) for part in _blocks(local, n_rows, d_sae)]
    cells = np.concatenate([block.cells_N for block in blocks])
    counts = np.bincount(cells // d_sae, minlength=n_rows)
    latents = (cells % d_sae).astype(np.int32)
    return ShardActs(
        first_pair=first_pair,
        positions_R=np.bincount(local, minlength=n_rows).astype(np.int32),
        indptr_R1=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        latents_N=latents,
        sums_N=np.concatenate([block.sums_N for block in blocks]),
        peaks_N=np.concatenate([block.peaks_N for block in blocks]),
        peak_positions_N=np.concatenate([block.peak_positions_N for block in blocks]),
        totals=LatentTotals(totals.firings, np.bincount(latents, minlength=d_sae).astype(np.int64), totals.energy, len(kept)),
    )


def add_totals(parts: Sequence[LatentTotals]) -> LatentTotals:
    """Totals over several shards (at least one)."""
    return LatentTotals(
        np.sum([part.firings_S for part in parts], axis=0),
        np.sum([part.responses_S for part in parts], axis=0),
        np.sum([part.energy_S for part in parts], axis=0),
        sum(part.n_positions for part in parts),
    )


def one_side(shard: ShardActs, side: int) -> SideActs:
    """The rows of one side (0 chosen, 1 rejected) of a shard."""
    counts = np.diff(shard.indptr_R1)
    entries = (shard.responses_N % 2) == side
    indptr = np.concatenate([[0], np.cumsum(counts[side::2])]).astype(np.int64)
    return SideActs(indptr, shard.latents_N[entries], shard.sums_N[entries])


class _Totals:
    """Running firing counts and energies of one shard."""

    def __init__(self, d_sae: int) -> None:
        self.d_sae = d_sae
        self.firings = np.zeros(d_sae, dtype=np.int64)
        self.energy = np.zeros(d_sae, dtype=np.float64)

    def add(self, latents: Ints, values: NDArray[np.float64]) -> None:
        self.firings += np.bincount(latents, minlength=self.d_sae)
        self.energy += np.bincount(latents, values**2, self.d_sae)


@dataclass(frozen=True)
class _Block:
    """Non-zero cells (row × d_sae + latent, ascending) of a block of responses."""

    cells_N: Ints
    sums_N: NDArray[np.float32]
    peaks_N: NDArray[np.float32]
    peak_positions_N: NDArray[np.int32]


def _blocks(local: Ints, n_rows: int, d_sae: int) -> Iterator[slice]:
    """Slices of the counted positions that hold whole responses, a bounded number of (response, latent) cells each."""
    step = max(1, _BLOCK_CELLS // d_sae)
    for start in range(0, n_rows, step):
        yield slice(*np.searchsorted(local, [start, min(start + step, n_rows)]).tolist())


def _sum_block(rows: ShardRows, kept: Ints, local: Ints, encode: Encode, totals: _Totals) -> _Block:
    """Sums and peaks of the responses that `kept`, indices of counted positions, belong to."""
    if len(kept) == 0:
        empty = np.zeros(0)
        return _Block(empty.astype(np.int64), empty.astype(np.float32), empty.astype(np.float32), empty.astype(np.int32))
    first, d_sae = int(local[0]), totals.d_sae
    acts = encode(rows.x_BD[torch.from_numpy(kept)])
    values_BK, latents_BK = acts.values_BK.float().cpu().numpy(), acts.indices_BK.cpu().numpy()
    if not np.isfinite(values_BK).all():
        raise NumericalError("an activation of the SAE is not finite", "train the SAE again with a lower sae.lr")
    row_N, slot_N = np.nonzero(values_BK > 0)
    values, latents = values_BK[row_N, slot_N], latents_BK[row_N, slot_N].astype(np.int64)
    totals.add(latents, values.astype(np.float64))
    cells = (local[row_N] - first) * d_sae + latents
    n_cells = (int(local[-1]) - first + 1) * d_sae
    sums = np.bincount(cells, values.astype(np.float64), n_cells)
    found = np.flatnonzero(sums)
    peaks = _peaks(cells, values, row_N, n_cells)[found]
    at = (_LOW_BITS - (peaks & _LOW_BITS)).astype(np.int64)
    return _Block(
        cells_N=found + first * d_sae,
        sums_N=sums[found].astype(np.float32),
        peaks_N=(peaks >> 32).astype(np.int32).view(np.float32),
        peak_positions_N=rows.position_B[kept[at]].astype(np.int32),
    )


def _peaks(cells: Ints, values: NDArray[np.float32], row_N: Ints, n_cells: int) -> Ints:
    """Per cell, the largest (value, earliest row) as one integer: bits of positive floats sort like the floats."""
    keys = (values.view(np.int32).astype(np.int64) << 32) | (_LOW_BITS - row_N)
    peaks = np.zeros(n_cells, dtype=np.int64)
    np.maximum.at(peaks, cells, keys)
    return peaks
