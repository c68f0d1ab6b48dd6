"""Folds for cross-fitting: whole groups, by hash, the same whatever the order of the rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def group_folds(groups: Iterable[str], n_folds: int, seed: int) -> NDArray[np.int64]:
    """A fold for each pair, such that no group lies in two folds.

    Groups are taken in the order of a seeded hash, each into the fold that holds the fewest pairs so far: folds are balanced,
    and a pair's fold depends on the set of pairs and the seed, not on their order.

    Args:
        groups: the group of each pair.
        n_folds: number of folds, ≥ 2.
        seed: another seed gives other folds.

    Returns:
        Fold indices in [0, min(n_folds, number of groups)), one per pair.

    Raises:
        ValueError: `n_folds` < 2, or fewer than two groups (nothing can be held out).
    """
    names = list(groups)
    sizes = Counter(names)
    if n_folds < 2 or len(sizes) < 2:
        raise ValueError(f"cross-fitting needs two folds and two groups, not {n_folds} and {len(sizes)}")
    loads = np.zeros(min(n_folds, len(sizes)), dtype=np.int64)
    fold_of: dict[str, int] = {}
    for group in sorted(sizes, key=lambda name: (_hash(name, seed), name)):
        lightest = int(np.argmin(loads))
        fold_of[group] = lightest
        loads[lightest] += sizes[group]
    return np.asarray([fold_of[name] for name in names], dtype=np.int64)


def _hash(group: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/fold/{group}".encode()).digest()
