"""Which groups are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

_LEAST = 2
"""Groups held out at least, where there are twice as many."""


def held_out_groups(groups: Iterable[str], share: float, seed: int) -> frozenset[str]:
    """The groups kept from SAE training: the one definition, by hash, so that it needs no stored list.

    A group is held out where its hash falls below the share. In small data that may be none or all: then the ones of lowest
    hash, at least two, or half of fewer than four, and at most half of all.

    Args:
        groups: all groups of the data, in any order, each any number of times.
        share: in (0, 0.5).
    """
    keyed = sorted((hashlib.sha256(f"{seed}/held-out/{group}".encode()).digest()[:8], group) for group in set(groups))
    below = sum(int.from_bytes(key, "big") < share * 2.0**64 for key, _ in keyed)
    half = len(keyed) // 2
    n = min(half, max(below, min(_LEAST, half)))
    return frozenset(group for _, group in keyed[:n])


def selection_groups(groups: Iterable[str], seed: int) -> frozenset[str]:
    """The half of the groups by which latents are chosen and tested; what is shown of them is estimated on the other half.

    By hash, like the held-out groups, and independent of those: of n groups the n // 2 of lowest hash.
    """
    return _half(groups, f"{seed}/selection")


def choosing_groups(groups: Iterable[str], seed: int) -> frozenset[str]:
    """The half of the evaluation groups by which a budget is chosen; it is judged on the other half."""
    return _half(groups, f"{seed}/budget")


def _half(groups: Iterable[str], name: str) -> frozenset[str]:
    keyed = sorted((hashlib.sha256(f"{name}/{group}".encode()).digest()[:8], group) for group in set(groups))
    return frozenset(group for _, group in keyed[: len(keyed) // 2])
