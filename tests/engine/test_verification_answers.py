"""Accuracies of arms and their differences say the same thing, also where subsets differ in size."""

from __future__ import annotations

import numpy as np
import pytest

from safer_engine.science.arms import ARMS
from safer_engine.science.crossed import cell_name
from safer_engine.science.outcomes import OutcomeRules
from safer_engine.verification_answers import Answers, judged_of, slice_facts


def test_subsets_count_alike_in_accuracies_and_in_their_differences() -> None:
    rng = np.random.default_rng(0)
    subsets = np.asarray(["large"] * 90 + ["small"] * 10 + ["large"] * 20)
    axes = np.asarray(["safety"] * 100 + ["chat"] * 20)
    right = {arm: (rng.random((3, 120)) < 0.3 + 0.1 * at).astype(np.float64) for at, arm in enumerate(ARMS)}
    facts = slice_facts(Answers(right, np.arange(120).astype(np.str_), axes, subsets))
    found = {(row["arm"], row["axis"], row["subset"]): row for row in facts["accuracy"]}
    own = right["edits"]
    parts = [own[:, :90].mean(axis=1), own[:, 90:100].mean(axis=1), own[:, 100:].mean(axis=1)]
    assert found["edits", "safety", None]["by_seed"] == pytest.approx(np.mean(parts[:2], axis=0))
    assert found["edits", None, None]["by_seed"] == pytest.approx(np.mean(parts, axis=0))
    assert found["edits", "safety", "small"]["by_seed"] == pytest.approx(parts[1])
    assert len(facts["effects"]) == 5 * 6
    for row in facts["effects"]:
        scope = row["axis"], row["subset"]
        apart = found[row["arm"], *scope]["accuracy"] - found[row["reference"], *scope]["accuracy"]
        assert row["estimate"] == pytest.approx(apart, abs=1e-12)


def test_harm_on_a_subset_is_not_lost_where_names_with_slashes_would_be_alike() -> None:
    rng = np.random.default_rng(0)
    n = 400
    axes, subsets = np.asarray(["a/b"] * n + ["a"] * n), np.asarray(["c"] * n + ["b/c"] * n)
    given = (rng.random((5, 2 * n)) < 0.7).astype(np.float64)
    harmed = given.copy()
    harmed[:, : n // 2] = 0  # half of a/b, c; what is called last, a, b/c, is as it was
    right = {arm: harmed if arm == "edits" else given for arm in ARMS}
    answers = Answers(right, np.arange(2 * n).astype(np.str_), axes, subsets)
    judged = judged_of(answers, ("a",), OutcomeRules())
    assert judged.outcome == "harm shown"
    assert judged.harmed == (cell_name("a/b", "c"),) == ('"a/b"/c',)
    assert set(judged.p_harm) == {'"a/b"/c', "a/b/c"}
    assert len(np.unique(answers.cell_N)) == 2
