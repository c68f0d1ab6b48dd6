"""The gate on length bias: judged on an interval that holds, and compared with a baseline pair by pair."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from typing import Any

import numpy as np
import pytest

from safer_engine.errors import InputRefused
from safer_engine.gate.documents import Audit, read_audit
from safer_engine.gate.facts import find_facts
from safer_engine.gate.intervals import paired_difference, paired_gap
from safer_engine.gate.judge import Check, judge
from safer_engine.gate.policy import Policy, load_policy
from tests.helpers import gate_reports as made

TODAY = date(2026, 5, 1)
GAP = "evaluation.length[].gap"


def audit(rows: list[made.Pair], *, beside: bool = True, digest: str = "eval") -> Audit:
    return read_audit(json.dumps(made.report(rows, digest)).encode(), made.lines(rows) if beside else None, "the report")


def biased(longer: float, shorter: float, n: int = 400, **more: Any) -> list[made.Pair]:
    """Pairs, half of either kind, right as often as told where the chosen response is the longer one, and the shorter."""
    rows = made.pairs(longer, n // 2, **more) + made.pairs(shorter, n // 2, **{"seed": 1, **more})
    names = [f"{rows[0]['axis']}-{rows[0]['subset']}-{place}" for place in range(n)]
    return [
        {**row, "pair_id": name, "group": f"g{name}", "longer_by": 5 if place < n // 2 else -5}
        for place, (row, name) in enumerate(zip(rows, names, strict=True))
    ]


def check(rule: dict[str, Any], new: Audit, old: Audit | None = None) -> Check:
    rules = Policy.model_validate({"version": 1, "rules": [{"name": "length-bias", "fact": GAP, **rule}]})
    (found,) = judge(rules, new, old, TODAY).checks
    return found


@pytest.mark.parametrize(
    ("longer", "shorter", "outcome"), [(0.9, 0.88, "pass"), (0.95, 0.45, "fail"), (0.9, 0.62, "inconclusive"), (0.6, 0.9, "pass")]
)
def test_a_gap_is_judged_on_its_interval(longer: float, shorter: float, outcome: str) -> None:
    found = check({"max": 0.3}, audit(biased(longer, shorter)))
    assert found.outcome == outcome
    assert found.value == pytest.approx(longer - shorter)
    assert found.n == 400


def test_the_built_in_rules_are_about_it() -> None:
    rules = {name: next(rule for rule in load_policy(name).rules if rule.name == "length-bias") for name in ("default", "strict")}
    assert {name: (rule.fact, rule.max, rule.max_rise) for name, rule in rules.items()} == {
        "default": (GAP, 0.3, None),
        "strict": (GAP, None, 0.1),
    }
    long_only = audit([{**row, "longer_by": 3} for row in made.pairs(0.9)])
    for name in ("default", "strict"):
        found = {c.rule: c for c in judge(load_policy(name), long_only, None, TODAY).checks}
        assert found["length-bias"].outcome == "skipped"


def test_a_side_without_an_error_does_not_make_the_gap_certain() -> None:
    rows = biased(1.0, 1.0, 60)
    (figure,) = find_facts(made.report(rows), GAP)  # type: ignore[misc]
    told = made.report(rows)["evaluation"]["length"][0]["gap"]
    assert (told["lo"], told["hi"]) == (0.0, 0.0)
    assert figure.spread is not None
    bounds = figure.spread(0.025)
    assert bounds.lo < -0.1
    assert bounds.hi > 0.1
    assert check({"max": 0.05}, audit(rows)).outcome == "inconclusive"


def test_a_baseline_is_compared_pair_by_pair() -> None:
    old = biased(0.9, 0.8, 600)
    new = [{**row, "margin": -1.0} if row["longer_by"] < 0 and place % 4 == 0 else row for place, row in enumerate(old)]
    paired = check({"max_rise": 0.15}, audit(new), audit(old))
    apart = check({"max_rise": 0.15}, audit(new, beside=False), audit(old))
    assert paired.note == "paired by pair_id"
    assert apart.note.startswith("not paired: the report has no evaluation.jsonl")
    assert paired.value == pytest.approx(apart.value)
    assert paired.bounds is not None
    assert apart.bounds is not None
    assert paired.bounds.hi - paired.bounds.lo < 0.7 * (apart.bounds.hi - apart.bounds.lo)
    assert (paired.outcome, apart.outcome) == ("fail", "inconclusive")


def test_worse_altogether_is_not_more_biased() -> None:
    old = biased(0.95, 0.85, 600)
    new = [{**row, "margin": -1.0} if place % 5 == 0 else row for place, row in enumerate(old)]
    assert check({"max_rise": 0.1}, audit(new), audit(old)).outcome == "pass"
    assert check({"max": 0.3}, audit(new)).outcome == "pass"


def test_pairs_that_tokenizers_see_differently_are_left_out_and_counted() -> None:
    old, new = biased(0.9, 0.8), biased(0.9, 0.8)
    new[3] = {**new[3], "longer_by": -1}
    new[4] = {**new[4], "longer_by": 0}
    found = check({"max_rise": 0.1}, audit(new), audit(old))
    assert found.note == "paired by pair_id; 2 pairs whose longer response is not the same to both models left out"
    assert found.n == 398


def test_lengths_that_an_older_file_lacks_are_not_guessed() -> None:
    rows = biased(0.9, 0.8)
    plain = [{name: value for name, value in row.items() if name != "longer_by"} for row in rows]
    older = Audit(audit(rows).report, read_audit(json.dumps(made.report(rows)).encode(), made.lines(plain), "it").pairs)
    assert check({"max_rise": 0.3}, audit(rows), older).note.startswith("not paired")
    assert check({"max_rise": 0.3}, audit(rows), older).outcome == "pass"


@pytest.mark.parametrize(
    "change", [{"longer_by": 4}, {"longer_by": 0}, {"longer_by": 1.5}, {"longer_by": True}, {"longer_by": None}]
)
def test_lengths_of_another_audit_are_refused(change: dict[str, Any]) -> None:
    rows = biased(0.9, 0.8, 60)
    others = [*rows[:-1], {**rows[-1], **change}]
    with pytest.raises(InputRefused):
        read_audit(json.dumps(made.report(rows)).encode(), made.lines(others), "the report")


def test_one_stratum_is_a_difference_of_two_paired_differences() -> None:
    rng = np.random.default_rng(2)
    differences = rng.choice([-1.0, 0.0, 1.0], 300, p=[0.1, 0.8, 0.1]).tolist()
    first = [place < 180 for place in range(300)]
    groups = [f"g{place}" for place in range(300)]
    found = paired_gap(differences, first, ["s"] * 300, groups)
    parts = [paired_difference(differences[a:b], groups[a:b], shares=True) for a, b in ((0, 180), (180, 300))]
    assert found.mean == pytest.approx(parts[0].mean - parts[1].mean)
    assert found.spread is not None
    halves = [(s.spread(0.025).hi - s.spread(0.025).lo) / 2 for s in parts if s.spread is not None]
    assert (found.spread(0.025).hi - found.spread(0.025).lo) / 2 == pytest.approx(float(np.linalg.norm(halves)), rel=0.05)
    assert (found.n, found.n_groups) == (300, 300)


def test_strata_without_both_kinds_and_single_groups_give_no_interval() -> None:
    assert paired_gap([1.0, 0.0], [True, False], ["a", "b"], ["g", "h"]).spread is None
    assert paired_gap([1.0, 0.0, 1.0], [True, False, False], ["a"] * 3, ["g", "h", "i"]).spread is None


def test_the_paired_interval_covers_the_change_of_the_gap() -> None:
    held = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        first = rng.random(240) < 0.7
        strata = np.repeat(rng.integers(0, 2, 80), 3)
        worse = np.where(first, 0.05, 0.2)
        differences = np.where(rng.random(240) < worse, -1.0, 0.0)
        found = paired_gap(
            differences.tolist(), first.tolist(), strata.tolist(), np.repeat(np.arange(80), 3).astype(str).tolist()
        )
        assert found.spread is not None
        held += found.spread(0.025).lo <= 0.15 <= found.spread(0.025).hi
    assert 0.93 <= held / 400 <= 0.995


def test_a_policy_has_one_check_more() -> None:
    rows = biased(0.95, 0.85)
    with_gap = judge(load_policy("default"), audit(rows), None, TODAY)
    without = load_policy("default").model_copy(
        update={"rules": tuple(rule for rule in load_policy("default").rules if rule.name != "length-bias")}
    )
    assert with_gap.n_random == judge(without, audit(rows), None, TODAY).n_random + 1
    assert sum(c.tail or 0 for c in with_gap.checks) <= 0.05 + 1e-12
    assert replace(with_gap, checks=()).verdict == with_gap.verdict
