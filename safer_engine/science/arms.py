"""What each retraining arm does to the pairs: our edits, and as many edits chosen in other ways.

Every control drops and flips as many pairs of each axis as our edits do, so that arms differ in which pairs are edited and in
nothing else. Arrays in, arrays out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from safer_engine.errors import NumericalError

Arm = Literal["as given", "edits", "margin", "random"]
ARMS: tuple[Arm, ...] = get_args(Arm)
KEEP, DROP, FLIP = 0, 1, 2
Codes = NDArray[np.int8]


def edited(edits_P: Codes, axes_P: NDArray[np.str_], order_P: NDArray[np.float64]) -> Codes:
    """As many edits of each axis as `edits_P` has, on the pairs that come first.

    Args:
        edits_P: KEEP, DROP or FLIP of each pair.
        order_P: who comes first within an axis: small ones; ties by row. The very first are flipped, those after them dropped.

    Raises NumericalError where an order is not finite: no pair may be chosen by a figure that is missing.
    """
    if not np.isfinite(order_P).all():
        raise NumericalError("the order that a control arm edits in is not finite")
    found_P = np.zeros(len(edits_P), dtype=np.int8)
    for axis in np.unique(axes_P):
        at = np.flatnonzero(axes_P == axis)
        n_flip, n_drop = (int((edits_P[at] == code).sum()) for code in (FLIP, DROP))
        first = at[np.argsort(order_P[at], kind="stable")]
        found_P[first[:n_flip]] = FLIP
        found_P[first[n_flip : n_flip + n_drop]] = DROP
    return found_P


def random_order(pair_ids: Sequence[str], seed: int) -> NDArray[np.float64]:
    """A number in [0, 1) for each pair that depends on its id and the seed alone: another order for every seed."""
    digests = (hashlib.sha256(f"{seed}/random edits/{name}".encode()).digest()[:7] for name in pair_ids)
    return np.array([int.from_bytes(raw, "big") / 2.0**56 for raw in digests], dtype=np.float64)


def arm_edits(
    arm: Arm, edits_P: Codes, axes_P: NDArray[np.str_], margin_P: NDArray[np.float64], pair_ids: Sequence[str], seed: int
) -> Codes:
    """What an arm does to each pair.

    Args:
        edits_P: our edits. margin_P: r(chosen) − r(rejected) of the reward model under audit; small means doubtful.
        seed: of the training: random edits are drawn anew for every seed.
    """
    if arm == "as given":
        return np.zeros(len(edits_P), dtype=np.int8)
    if arm == "edits":
        return edits_P
    return edited(edits_P, axes_P, margin_P if arm == "margin" else random_order(pair_ids, seed))
