"""How right and wrong of two audits go together on their common evaluation pairs: what a comparison of them can detect."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from safer_engine.errors import InputRefused
from safer_engine.gate.documents import Audit, EvaluationPair, in_slice
from safer_engine.gate.paired import shared_pairs
from safer_engine.gate.power import Pairing, SliceSize

GUESS = 0.5
"""Correlation of right and wrong where none could be measured."""
FEWEST = 30
"""Common pairs of a slice below which those of the wider one are looked at."""


@dataclass(frozen=True)
class Together:
    """Two audits on the evaluation pairs of a slice that both have.

    Attributes:
        axis, subset: None for all axes, and for the whole axis.
        n_differ: pairs that one has right and the other wrong.
        correlation: of right and wrong (phi), in [-1, 1]; None where one of the two has all right or all wrong.
        design_effect: how many pairs are worth one independent pair where right less right is averaged, at least 1.
    """

    axis: str | None
    subset: str | None
    n: int
    n_groups: int
    n_differ: int
    correlation: float | None
    design_effect: float


def measured_together(new: Audit, old: Audit) -> tuple[Together, ...]:
    """Two audits compared overall, by axis and by subset.

    Raises:
        InputRefused: they have no common evaluation pairs.
    """
    shared = shared_pairs(new, old)
    if shared.reason or not shared.pairs:
        raise InputRefused(
            f"how the two go together cannot be measured: {shared.reason or 'they have no evaluation pair in common'}",
            "give two audits of the same evaluation data, with evaluation.jsonl beside each report.json, or --correlation alone",
        )
    before = {pair.pair_id: pair for _, (pair,) in shared.pairs}
    pairs = [pair for pair, _ in shared.pairs]
    axes = sorted({pair.axis for pair in pairs})
    scopes = [(None, None), *((axis, None) for axis in axes), *sorted({(pair.axis, pair.subset) for pair in pairs})]
    return tuple(_together(place, in_slice(pairs, *place), before) for place in scopes)


def with_pairing(
    sizes: Sequence[SliceSize], found: Sequence[Together], correlation: float | None = None, effect: float | None = None
) -> list[SliceSize]:
    """Slices with what was measured of them, or of the axis or all pairs around them where they have too few common pairs.

    Args:
        correlation, effect: given by hand, in place of what was measured.
    """
    by_place = {(one.axis, one.subset): one for one in found}
    made = []
    for size in sizes:
        own = by_place.get((size.axis, size.subset))
        around = [by_place.get(place) for place in ((size.axis, size.subset), (size.axis, None), (None, None))]
        enough = [one for one in around if one is not None and one.n >= FEWEST]
        known = next((one.correlation for one in enough if one.correlation is not None), GUESS)
        clustered = enough[0].design_effect if enough else size.design_effect
        n, groups = (own.n, own.n_groups) if own is not None else (0, 0)
        pairing = Pairing(n, groups, known if correlation is None else correlation, effect or clustered)
        made.append(replace(size, pairing=pairing))
    return made


def _together(
    place: tuple[str | None, str | None], pairs: Sequence[EvaluationPair], before: dict[str, EvaluationPair]
) -> Together:
    new = [pair.right for pair in pairs]
    old = [before[pair.pair_id].right for pair in pairs]
    groups = [pair.group for pair in pairs]
    differences = [float(a) - float(b) for a, b in zip(new, old, strict=True)]
    differ = sum(a != b for a, b in zip(new, old, strict=True))
    return Together(*place, len(pairs), len(set(groups)), differ, phi(new, old), design_effect(differences, groups))


def phi(one: Sequence[bool], other: Sequence[bool]) -> float | None:
    """Pearson's correlation of two columns of right and wrong, in [-1, 1]; None where one of them is all alike."""
    counts = Counter(zip(one, other, strict=True))
    both, first, second, neither = (counts[cell] for cell in ((True, True), (True, False), (False, True), (False, False)))
    below = (both + first) * (second + neither) * (both + second) * (first + neither)
    return (both * neither - first * second) / math.sqrt(below) if below else None


def design_effect(values: Sequence[float], groups: Sequence[str]) -> float:
    """Cluster-robust variance (CR1) of a mean over that of independent values, at least 1; 1 where the values are all alike."""
    n = len(values)
    mean = math.fsum(values) / n
    squares = math.fsum((value - mean) ** 2 for value in values)
    sums: dict[str, float] = defaultdict(float)
    for value, group in zip(values, groups, strict=True):
        sums[group] += value - mean
    if len(sums) < 2 or squares == 0:
        return 1.0
    clustered = len(sums) / (len(sums) - 1) * math.fsum(value * value for value in sums.values()) / n**2
    return max(1.0, clustered / (squares / (n * (n - 1))))
