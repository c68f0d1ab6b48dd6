"""What differs between the two responses of a pair: per-response means, chosen − rejected.

Source: METHOD §1 (sums over positions) and §2.1 (means per response, so that length does not move every latent).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from safer_engine.errors import NumericalError

Ints = NDArray[np.int64]
Delta = Any
"""A matrix with one row per pair: `scipy.sparse.csr_array`, a dense array or a `LatentDelta`, floating point."""
_BLOCK_ROWS = 4096
"""Pairs whose entries are in memory at once."""
_BLOCK_ENTRIES = 1 << 22


def gather(starts: Ints, stops: Ints, parts: tuple[NDArray[Any], NDArray[Any]], n_columns: int) -> sparse.csr_array:
    """Sparse rows, copied from where they lie; of a memory map only these are read.

    Args:
        starts, stops: row r holds the entries starts[r] … stops[r] − 1.
        parts: column and value of every entry.
    """
    counts = stops - starts
    indptr = np.concatenate([[0], np.cumsum(counts)])
    entries = np.repeat(starts - indptr[:-1], counts) + np.arange(int(indptr[-1]))
    columns, values = parts
    return sparse.csr_array((np.asarray(values[entries]), np.asarray(columns[entries]), indptr), shape=(len(counts), n_columns))


@dataclass(frozen=True)
class MappedRows:
    """Sparse rows that stay where they are, usually in memory maps, until their matrix is asked for (fields: see `gather`)."""

    starts: Ints
    stops: Ints
    parts: tuple[NDArray[Any], NDArray[Any]]
    n_columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.starts), self.n_columns

    def __getitem__(self, rows: Ints) -> MappedRows:
        """Some rows, still where they are."""
        return MappedRows(self.starts[rows], self.stops[rows], self.parts, self.n_columns)

    def matrix(self) -> sparse.csr_array:
        """All rows, in memory."""
        return gather(self.starts, self.stops, self.parts, self.n_columns)


def matrix_of(rows: Any) -> Any:
    """A CSR matrix as it is, or that of `MappedRows`."""
    return rows.matrix() if isinstance(rows, MappedRows) else rows


@dataclass(frozen=True)
class LatentSums:
    """Activations of all latents, summed over the covered positions of each response.

    Attributes:
        chosen_PS, rejected_PS: CSR or `MappedRows`, sums of positive activations, ≥ 0.
        n_positions_P2: covered positions of the chosen and the rejected side, ≥ 0.
    """

    chosen_PS: Any
    rejected_PS: Any
    n_positions_P2: NDArray[np.int64]

    def blocks(self) -> Iterator[tuple[slice, LatentSums]]:
        """All pairs, a bounded number at a time, and their places."""
        for start in range(0, len(self.n_positions_P2), _BLOCK_ROWS):
            place = slice(start, min(start + _BLOCK_ROWS, len(self.n_positions_P2)))
            yield place, self.take(np.arange(place.start, place.stop))

    def take(self, rows: NDArray[np.int64]) -> LatentSums:
        """The same for some pairs."""
        return LatentSums(self.chosen_PS[rows], self.rejected_PS[rows], self.n_positions_P2[rows])

    @property
    def n_latents(self) -> int:
        """Number of latents S."""
        return int(self.chosen_PS.shape[1])


def latent_sums(
    chosen: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
    rejected: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
    n_positions_P2: NDArray[Any],
    n_latents: int,
) -> LatentSums:
    """Build `LatentSums` from the CSR parts (indptr, indices, sums) of both sides, which stay where they are.

    Raises:
        NumericalError: a sum is negative or not finite.
        ValueError: the parts do not fit together.
    """
    sides = []
    for indptr, indices, sums in (chosen, rejected):
        _check_rows(indptr, indices, sums, len(n_positions_P2), n_latents)
        bounds = np.asarray(indptr, dtype=np.int64)
        sides.append(MappedRows(bounds[:-1], bounds[1:], (indices, sums), n_latents))
    return LatentSums(sides[0], sides[1], np.asarray(n_positions_P2, dtype=np.int64))


def _check_rows(indptr: NDArray[Any], indices: NDArray[Any], sums: NDArray[Any], n_rows: int, n_columns: int) -> None:
    if len(indptr) != n_rows + 1 or indptr[0] != 0 or (np.diff(indptr) < 0).any():
        raise ValueError(f"the bounds of {n_rows} rows must rise from 0")
    if not len(indices) == len(sums) == indptr[-1]:
        raise ValueError(f"{len(indices)} indices and {len(sums)} sums for {indptr[-1]} entries")
    for start in range(0, len(sums), _BLOCK_ENTRIES):
        values, columns = (part[start : start + _BLOCK_ENTRIES] for part in (sums, indices))
        if not np.isfinite(values).all() or (values < 0).any():
            raise NumericalError("sums of positive activations must be finite and not negative")
        if columns.min() < 0 or columns.max() >= n_columns:
            raise ValueError(f"an index lies outside the {n_columns} latents")


def latent_delta(sums: LatentSums, *, root: bool = False) -> Any:
    """Δ [P, S] CSR float32: mean activation over the chosen response − over the rejected one.

    Args:
        root: take the square root of each mean first, which tames latents that fire rarely and hard.

    A response without a covered position has all means 0.
    """
    sides = []
    for matrix, n in ((sums.chosen_PS, sums.n_positions_P2[:, 0]), (sums.rejected_PS, sums.n_positions_P2[:, 1])):
        mean = matrix_of(matrix).astype(np.float64)
        mean.data /= np.repeat(np.maximum(n, 1), np.diff(mean.indptr))
        if root:
            mean.data = np.sqrt(mean.data)
        sides.append(mean)
    delta = sparse.csr_array(sides[0] - sides[1], dtype=np.float32)
    delta.eliminate_zeros()
    delta.sort_indices()
    return delta


@dataclass(frozen=True)
class LatentDelta:
    """`latent_delta` of the pairs that are asked for, so that memory is bounded by them."""

    sums: LatentSums
    root: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Pairs and latents."""
        return len(self.sums.n_positions_P2), self.sums.n_latents

    def __getitem__(self, rows: Ints | slice) -> Any:
        """CSR float32. Raises NumericalError where a value is not finite."""
        wanted = np.arange(*rows.indices(self.shape[0])) if isinstance(rows, slice) else rows
        found = latent_delta(self.sums.take(wanted), root=self.root)
        require_finite(found, "Δ")
        return found


def require_finite(delta: Delta, name: str) -> None:
    """Raise NumericalError when a matrix or vector holds NaN or infinity; a `LatentDelta` looks by itself, row by row."""
    if isinstance(delta, LatentDelta):
        return
    values = delta.data if sparse.issparse(delta) else delta
    if not np.isfinite(values).all():
        raise NumericalError(f"{name}: a value is not finite", "check the model's precision and the activations stage")
