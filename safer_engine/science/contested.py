"""Pairs whose label is open to dispute: the annotators disagree, the preference is weak, or the evidence says next to nothing.

A pair may contradict the evidence and not be wrong: annotators of public preference data disagree on 24–39 % of pairs. What is
suspicious and disputed for one of these reasons is `contested`; nobody says of it that its label is wrong, and no edit of it is
recommended beyond a review.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Reason = Literal["annotators", "weak_preference", "no_evidence"]
REASONS: tuple[Reason, ...] = ("annotators", "weak_preference", "no_evidence")
SUSPICIOUS, CONTESTED = "suspicious", "contested"
WEAKEST = {"helpsteer3": 1.0, "helpsteer2": 1.0}
"""Strength of a preference that counts as weak, by layout: "slightly better". Elsewhere 0: scores that do not differ, or that
contradict which response is the chosen one."""


@dataclass(frozen=True)
class ContestRules:
    """When a pair is disputed.

    Attributes:
        dissent: smallest share of annotators against the label, in (0, 1]; one who sees no difference counts half.
        weak: largest strength of a weak preference, in the dataset's units.
        evidence: largest evidence that is next to none, ≥ 0, in the units of `evidence_P` below.
    """

    dissent: float
    weak: float
    evidence: float


def disputes(
    annotators: Sequence[Sequence[int] | None], strength_P: Floats, evidence_P: Floats, rules: ContestRules
) -> list[list[Reason]]:
    """Why each pair is open to dispute; an empty list where nothing speaks for that.

    Args:
        annotators: individual preferences of each pair, positive for the chosen side; fewer than two say nothing.
        strength_P: size of the preference, NaN where the data do not say.
        evidence_P: how much the signals say, whichever way (≥ 0; NaN: there are none): the change of the log-odds that the
            label is wrong, or, where suspicion is a rank, the weighted mean of the signals in units of their root mean square.
            Next to none counts only where nothing else is known against the pair.
    """
    found: list[list[Reason]] = []
    for votes, strength, evidence in zip(annotators, strength_P.tolist(), evidence_P.tolist(), strict=True):
        reasons: list[Reason] = []
        if votes is not None and dissent(votes) >= rules.dissent:
            reasons.append("annotators")
        if strength <= rules.weak:
            reasons.append("weak_preference")
        if not reasons and evidence <= rules.evidence:
            reasons.append("no_evidence")
        found.append(reasons)
    return found


def dissent(votes: Sequence[int]) -> float:
    """Share of the annotators against the label, in [0, 1]; a 0 counts half; 0 for fewer than two annotators."""
    if len(votes) < 2:
        return 0.0
    return sum(1.0 if vote < 0 else 0.5 if vote == 0 else 0.0 for vote in votes) / len(votes)


def statuses(suspicion_P: Floats, base_P: Floats, reasons: Sequence[Sequence[Reason]]) -> list[str | None]:
    """`suspicious`, `contested` (suspicious and open to dispute), or None.

    Suspicious is what the evidence speaks against: a probability above the share of wrong labels that it starts from; where
    suspicion is a rank, a place in the more doubtful half of the axis.
    """
    bound_P = np.where(np.isnan(base_P), 0.5, base_P)
    with np.errstate(invalid="ignore"):
        doubted = (suspicion_P > bound_P).tolist()
    return [
        None if not is_doubted else CONTESTED if why else SUSPICIOUS for is_doubted, why in zip(doubted, reasons, strict=True)
    ]
