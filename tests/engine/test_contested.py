"""Pairs whose label is open to dispute, and what is recommended for them."""

from __future__ import annotations

import numpy as np
import pytest

from safer_engine.science.contested import ContestRules, disputes, dissent, statuses
from safer_engine.science.edits import Candidate, EditRules, recommend

NONE = float("nan")
RULES = ContestRules(dissent=0.25, weak=1.0, evidence=0.1)


@pytest.mark.parametrize(
    ("votes", "share"),
    [([], 0.0), ([-3], 0.0), ([2, 1], 0.0), ([2, -1], 0.5), ([2, 1, -1], 1 / 3), ([2, 0, 1], 1 / 6), ([-1, -2, 0], 5 / 6)],
)
def test_dissent_counts_those_against_and_half_of_those_undecided(votes: list[int], share: float) -> None:
    assert dissent(votes) == pytest.approx(share)


def test_each_reason_is_found_and_evidence_counts_only_alone() -> None:
    votes = [[2, 1, -1], [2, 1, 1], None, None, None, [1, -1]]
    strength = np.array([3.0, 1.0, 2.0, NONE, NONE, 0.5])
    evidence = np.array([5.0, 5.0, 0.1, 0.11, NONE, 0.0])
    assert disputes(votes, strength, evidence, RULES) == [
        ["annotators"], ["weak_preference"], ["no_evidence"], [], [], ["annotators", "weak_preference"],
    ]  # fmt: skip


def test_contested_is_suspicious_and_disputed() -> None:
    suspicion = np.array([0.2, 0.2, 0.1, 0.6, 0.4, NONE])
    base = np.array([0.1, 0.1, 0.1, NONE, NONE, NONE])
    reasons = [[], ["annotators"], ["annotators"], ["no_evidence"], [], ["annotators"]]
    assert statuses(suspicion, base, reasons) == ["suspicious", "contested", None, "contested", None, None]  # type: ignore[arg-type]


def test_disputed_rows_are_never_dropped_or_flipped_by_rank() -> None:
    rows = [Candidate(f"p{i:02d}", "x", True, i / 100, disputed=i >= 98) for i in range(100)]
    actions = recommend(rows, EditRules(0.04, allow_flip=True))
    assert actions[94:] == ["flip", "flip", "flip", "flip", "review", "review"]
    assert actions[92:94] == ["review", "review"]
    assert set(actions[:92]) == {"keep"}


def test_disputed_rows_are_reviewed_at_most_by_gain() -> None:
    chances = [0.95, 0.9, 0.2, 0.05]
    plain = [Candidate(f"p{i}", "x", True, p, base=0.1) for i, p in enumerate(chances)]
    disputed = [Candidate(f"p{i}", "x", True, p, base=0.1, disputed=i in (0, 3)) for i, p in enumerate(chances)]
    assert recommend(plain, EditRules()) == ["drop", "drop", "review", "keep"]
    assert recommend(disputed, EditRules(allow_flip=True)) == ["review", "flip", "review", "keep"]


def test_a_dataset_of_disputed_rows_is_not_edited() -> None:
    rows = [Candidate(f"p{i:02d}", "x", True, i / 100, disputed=True) for i in range(100)]
    actions = recommend(rows, EditRules(0.04))
    assert (actions.count("drop"), actions.count("review")) == (0, 4)
