"""What the data and people add to the scores: decisions recalibrate probabilities, and disputed pairs are contested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from safer_engine.science.contested import CONTESTED, WEAKEST, ContestRules, Reason, disputes, statuses
from safer_engine.science.recalibration import AxisDecisions, Share, learn_from, recalibrated_share

if TYPE_CHECKING:
    import pyarrow as pa

    from safer_engine.science.pair_scoring import PairScoring
    from safer_engine.spec import SuspicionSpec
    from safer_engine.spec_suspicion import PairDecision


@dataclass(frozen=True)
class Decided:
    """Scores after people's decisions.

    Attributes:
        scoring: with recalibrated probabilities, bases and shares where an axis's decisions allow it.
        meta: {n, n_open (left undecided), n_unknown (of rows that are not among the pairs), axes {axis: `AxisDecisions`}}.
    """

    scoring: PairScoring
    meta: dict[str, Any]


def apply_decisions(scoring: PairScoring, pairs: pa.Table, decisions: Sequence[PairDecision], seed: int) -> Decided:
    """Check the probabilities of each axis by what people decided, and recalibrate them; ranks stay as they are.

    Args:
        pairs: `PairSet.pairs`; decisions are joined to it by the content digest.
    """
    place = {digest: row for row, digest in enumerate(pairs["content_digest"].to_pylist())}
    told = [(place[one.content_digest], one.wrong) for one in decisions if one.content_digest in place and one.wrong is not None]
    rows_N = np.array([row for row, _ in told], dtype=np.int64)
    wrong_N = np.array([bool(wrong) for _, wrong in told], dtype=bool)
    axes, groups = (np.asarray(pairs[name].to_pylist(), dtype=object) for name in ("axis", "group"))
    suspicion, base = scoring.suspicion_P.copy(), scoring.base_P.copy()
    doubts, found = dict(scoring.doubts), {}
    for number, (axis, doubt) in enumerate(scoring.doubts.items()):
        mine = axes[rows_N] == axis if len(rows_N) else np.zeros(0, dtype=bool)
        rows, wrong = rows_N[mine], wrong_N[mine]
        if doubt.kind != "probability":
            counted = (len(rows), int(wrong.sum()), len(set(groups[rows])))
            found[axis] = AxisDecisions(*counted, used=False, reason="suspicion is a rank, which has no calibration")
            continue
        learnt = learn_from(suspicion[rows], wrong, groups[rows].astype(str), seed)
        found[axis] = learnt
        if learnt.used and doubt.share is not None and doubt.lo is not None and doubt.hi is not None:
            every = np.flatnonzero(axes == axis)
            decided = (suspicion[rows], wrong, groups[rows].astype(str))
            rng = np.random.default_rng([seed, number])
            share = recalibrated_share(suspicion[every], Share(doubt.share, doubt.lo, doubt.hi), decided, rng)
            doubts[axis] = replace(doubt, share=share.value, lo=share.lo, hi=share.hi)
            suspicion[every], base[every] = learnt.map.apply(suspicion[every]), learnt.map.apply(base[every])
    meta = {
        "n": len(decisions),
        "n_open": sum(one.wrong is None for one in decisions),
        "n_unknown": sum(one.content_digest not in place for one in decisions),
        "axes": {axis: asdict(one) for axis, one in found.items()},
    }
    return Decided(replace(scoring, suspicion_P=suspicion, base_P=base, doubts=doubts), meta)


@dataclass(frozen=True)
class Standing:
    """Of each pair: `suspicious`, `contested` or None; and why its label is open to dispute, suspicious or not."""

    statuses: list[str | None]
    reasons: list[list[Reason]]

    def counts(self, axes: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Axis → {suspicious (contested ones too), contested, reasons {reason: contested pairs that have it}}."""
        found: dict[str, dict[str, Any]] = {axis: {"suspicious": 0, "contested": 0, "reasons": {}} for axis in sorted(set(axes))}
        for axis, status, reasons in zip(axes, self.statuses, self.reasons, strict=True):
            found[axis]["suspicious"] += status is not None
            if status == CONTESTED:
                found[axis]["contested"] += 1
                for reason in reasons:
                    found[axis]["reasons"][reason] = found[axis]["reasons"].get(reason, 0) + 1
        return found


def standing(scoring: PairScoring, pairs: pa.Table, layout: str, spec: SuspicionSpec) -> Standing:
    """Which pairs are suspicious, and which of them contested; the paper's estimator knows no contested ones.

    Args:
        layout: of the rows, which says what a weak preference is.
    """
    if spec.estimator == "paper":
        undisputed: list[list[Reason]] = [[] for _ in scoring.suspicion_P]
        return Standing(statuses(scoring.suspicion_P, scoring.base_P, undisputed), undisputed)
    given = spec.contested
    weak = WEAKEST.get(layout, 0.0) if given.weak is None else given.weak
    strength = np.array([np.nan if value is None else value for value in pairs["strength"].to_pylist()], dtype=np.float64)
    rules = ContestRules(given.dissent, weak, given.evidence)
    reasons = disputes(pairs["annotators"].to_pylist(), strength, scoring.evidence_P, rules)
    return Standing(statuses(scoring.suspicion_P, scoring.base_P, reasons), reasons)
