"""What poison does to accuracy, and how much of it a ranking finds. Arrays in, values out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from safer_engine.errors import NumericalError
from safer_engine.science.crossed import Difference, cell_names, crossed_mean, means_by_seed
from safer_engine.science.stats import auroc, average_precision, precision_at

Floats = NDArray[np.float64]
Names = NDArray[np.str_]


@dataclass(frozen=True)
class Harm:
    """Changes of pair accuracy by poison, in [-1, 1]; negative is harm.

    Attributes:
        axis: on the axis that was poisoned. rest: on all others; apart: the first less the second. None without another axis.
    """

    axis: Difference
    rest: Difference | None
    apart: Difference | None


def harm(change_SN: Floats, groups_N: Names, axes_N: Names, subsets_N: Names, axis: str) -> Harm:
    """The harm of one poison.

    Args:
        change_SN: 1, 0 or −1: right with the poison less right without it, of evaluation pair n and seed s. Subsets count alike.

    Raises NumericalError where no evaluation pair is of the axis.
    """
    ours_N = axes_N == axis
    if not ours_N.any():
        raise NumericalError(f"no evaluation pair is of axis {axis!r}")
    strata_N = cell_names(axes_N, subsets_N)
    own = crossed_mean(change_SN[:, ours_N], groups_N[ours_N], strata_N[ours_N])
    if ours_N.all():
        return Harm(own, None, None)
    rest = crossed_mean(change_SN[:, ~ours_N], groups_N[~ours_N], strata_N[~ours_N])
    n_ours, n_rest = len(set(strata_N[ours_N])), len(set(strata_N[~ours_N]))
    weight_N = np.where(ours_N, 1 / n_ours, -1 / n_rest) * (n_ours + n_rest)
    return Harm(own, rest, crossed_mean(change_SN * weight_N, groups_N, strata_N))


def accuracy(right_SN: Floats, axes_N: Names, subsets_N: Names, axis: str) -> tuple[float, float | None]:
    """Share of evaluation pairs that are right on the axis, and on all others if any; subsets count alike, as in `harm`.

    Raises NumericalError where no evaluation pair is of the axis.
    """
    ours_N, strata_N = axes_N == axis, cell_names(axes_N, subsets_N)
    if not ours_N.any():
        raise NumericalError(f"no evaluation pair is of axis {axis!r}")
    own, rest = (
        float(means_by_seed(right_SN[:, at_N], strata_N[at_N]).mean()) if at_N.any() else None for at_N in (ours_N, ~ours_N)
    )
    assert own is not None
    return own, rest


@dataclass(frozen=True)
class Found:
    """How a ranking finds poison among pairs.

    Attributes:
        average_precision, auroc: in [0, 1]; by chance `share` and 0.5.
        at: share of the pairs that is looked at → (recall, precision) of its highest ranks.
        at_number: recall, and so precision, when as many pairs are looked at as were poisoned.
    """

    share: float
    average_precision: float
    auroc: float
    at: dict[float, tuple[float, float]]
    at_number: float


def find(truth_P: NDArray[np.bool_], doubt_P: Floats, shares: tuple[float, ...]) -> Found:
    """Hold a ranking (higher = more doubtful) against the truth. Raises NumericalError without poison, or with nothing else."""
    n, total = int(truth_P.sum()), len(truth_P)
    if n in (0, total):
        raise NumericalError(f"{n} of {total} pairs are poisoned: there is nothing to be found")
    at = {}
    for share in shares:
        precision = precision_at(truth_P, doubt_P, share)
        at[share] = (precision * max(1, round(share * total)) / n, precision)
    number = precision_at(truth_P, doubt_P, n / total)
    return Found(n / total, average_precision(truth_P, doubt_P), auroc(truth_P, doubt_P), at, number)
