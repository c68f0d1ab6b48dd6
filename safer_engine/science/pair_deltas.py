"""What differs between the two responses of a pair: per-response means, chosen − rejected.

Source: METHOD §1 (sums over positions) and §2.1 (means per response, so that length does not move every latent).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from safer_engine.errors import NumericalError

Delta = Any
"""A matrix with one row per pair: `scipy.sparse.csr_array` or a dense array, floating point."""


@dataclass(frozen=True)
class LatentSums:
    """Activations of all latents, summed over the covered positions of each response.

    Attributes:
        chosen_PS, rejected_PS: CSR, sums of positive activations, ≥ 0.
        n_positions_P2: covered positions of the chosen and the rejected side, ≥ 0.
    """

    chosen_PS: Any
    rejected_PS: Any
    n_positions_P2: NDArray[np.int64]

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
    """Build `LatentSums` from the CSR parts (indptr, indices, sums) of both sides.

    Raises:
        NumericalError: a sum is negative or not finite.
        ValueError: the parts do not fit together.
    """
    matrices = []
    for indptr, indices, sums in (chosen, rejected):
        if not np.isfinite(sums).all() or (sums < 0).any():
            raise NumericalError("sums of positive activations must be finite and not negative")
        matrix = sparse.csr_array((sums, indices, indptr), shape=(len(n_positions_P2), n_latents))
        matrix.check_format(full_check=True)
        matrices.append(matrix)
    return LatentSums(matrices[0], matrices[1], np.asarray(n_positions_P2, dtype=np.int64))


def latent_delta(sums: LatentSums, *, root: bool = False) -> Any:
    """Δ [P, S] CSR float32: mean activation over the chosen response − over the rejected one.

    Args:
        root: take the square root of each mean first, which tames latents that fire rarely and hard.

    A response without a covered position has all means 0.
    """
    sides = []
    for matrix, n in ((sums.chosen_PS, sums.n_positions_P2[:, 0]), (sums.rejected_PS, sums.n_positions_P2[:, 1])):
        mean = matrix.astype(np.float64)
        mean.data /= np.repeat(np.maximum(n, 1), np.diff(mean.indptr))
        if root:
            mean.data = np.sqrt(mean.data)
        sides.append(mean)
    delta = sparse.csr_array(sides[0] - sides[1], dtype=np.float32)
    delta.eliminate_zeros()
    delta.sort_indices()
    return delta


def require_finite(delta: Delta, name: str) -> None:
    """Raise NumericalError when a matrix or vector holds NaN or infinity."""
    values = delta.data if sparse.issparse(delta) else delta
    if not np.isfinite(values).all():
        raise NumericalError(f"{name}: a value is not finite", "check the model's precision and the activations stage")
