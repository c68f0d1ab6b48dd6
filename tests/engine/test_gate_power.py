"""Power: planned chances against the gate's own decisions."""

from __future__ import annotations

import gzip
import json
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from safer_engine.errors import DatasetRefused, SpecError
from safer_engine.gate.counts import dataset_sizes, report_sizes, told_sizes
from safer_engine.gate.documents import Audit, EvaluationPair
from safer_engine.gate.intervals import Bounds, prediction_spread, student_quantile
from safer_engine.gate.judge import judge
from safer_engine.gate.policy import Policy, load_policy
from safer_engine.gate.power import SliceSize, Trainings, plan
from tests.helpers import gate_reports as made

ANY = made.pairs(0.9, 40)
ACCURACY = "evaluation.groups[axis=safety].accuracy"


def policy(**rule: object) -> Policy:
    return Policy.model_validate({"version": 1, "rules": [{"name": "r", "fact": ACCURACY, **rule}]})


def test_450_pairs_at_ninety_percent_are_sure_to_within_2_8_points() -> None:
    (check,) = plan(policy(min=0.8), told_sizes(["safety=450"], 0.9, 1.0)).checks
    assert check.half_width == pytest.approx(0.028, abs=0.0005)
    assert check.p_pass > 0.99
    assert check.warning == ""


@pytest.mark.parametrize("accuracy", [0.75, 0.83, 0.86, 0.9])
def test_planned_chances_of_an_accuracy_are_those_of_the_gate(accuracy: float) -> None:
    (check,) = plan(policy(min=0.83), [SliceSize("safety", None, 300, None, accuracy)]).checks
    rng, outcomes = np.random.default_rng(1), []
    for right in rng.binomial(300, accuracy, 150):
        share = right / 300
        se = (share * (1 - share) / 300) ** 0.5
        estimate = {"estimate": share, "lo": share - 1.959964 * se, "hi": share + 1.959964 * se, "n": 300, "n_groups": 300}
        report = made.report(ANY)
        report["evaluation"]["groups"] = [{"axis": "safety", "subset": None, "accuracy": estimate}]
        outcomes.append(judge(policy(min=0.83), Audit(report, None), None, date(2026, 1, 1)).checks[0].outcome)
    assert check.p_pass == pytest.approx(outcomes.count("pass") / 150, abs=0.1)
    assert check.p_fail == pytest.approx(outcomes.count("fail") / 150, abs=0.1)


@pytest.mark.parametrize("drop", [0.0, 0.02, 0.1, 0.15])
def test_planned_chances_of_a_drop_are_those_of_the_gate(drop: float) -> None:
    rules, n, accuracy, correlation = policy(max_drop=0.05), 500, 0.9, 0.5
    after = accuracy - drop
    both = accuracy * after + correlation * (accuracy * (1 - accuracy) * after * (1 - after)) ** 0.5
    cells = [both, after - both, accuracy - both]
    draws, rng, outcomes = 150, np.random.default_rng(4), []
    for _ in range(draws):
        kind = rng.choice(4, n, p=[*cells, 1 - sum(cells)])
        outcomes.append(_judged(rules, np.isin(kind, [0, 1]), np.isin(kind, [0, 2])))
    (check,) = plan(rules, [SliceSize("safety", None, n, None, accuracy)], correlation, 0.8).checks
    if drop == 0:
        assert check.p_pass == pytest.approx(outcomes.count("pass") / draws, abs=0.1)
    assert check.fails_at is not None
    assert check.passes_at is not None
    if drop >= check.fails_at:
        assert outcomes.count("fail") / draws > 0.7
    if drop == 0.02:
        assert outcomes.count("fail") == 0


def _judged(rules: Policy, new: np.ndarray, old: np.ndarray) -> str:
    audits = []
    for right in (new, old):
        pairs = tuple(EvaluationPair(f"{i}", f"{i}", "safety", "s", 1.0 if r else -1.0) for i, r in enumerate(right))
        share = {"estimate": float(right.mean()), "lo": 0.0, "hi": 1.0, "n": len(right), "n_groups": len(right)}
        report = made.report(ANY)
        report["evaluation"]["groups"] = [{"axis": "safety", "subset": None, "accuracy": share}]
        audits.append(Audit(report, pairs))
    return judge(rules, audits[0], audits[1], date(2026, 1, 1)).checks[0].outcome


def test_a_rule_that_can_only_be_inconclusive_is_warned_of_and_says_what_it_needs() -> None:
    (check,) = plan(policy(max_drop=0.005), told_sizes(["safety=60"], 0.9, 1.0)).checks
    assert "can only be inconclusive" in check.warning
    assert check.needed is not None
    (enough,) = plan(policy(max_drop=0.005), told_sizes([f"safety={check.needed}"], 0.9, 1.0)).checks
    assert enough.p_pass >= 0.8
    assert enough.warning == ""
    (fewer,) = plan(policy(max_drop=0.005), told_sizes([f"safety={check.needed - 20}"], 0.9, 1.0)).checks
    assert fewer.p_pass < 0.8
    (small,) = plan(policy(min=0.5), told_sizes(["safety=20"], 0.9, 1.0)).checks
    assert small.warning.startswith("fewer than min_n 30")
    (exact,) = plan(policy(min=0.9), told_sizes(["safety=400"], 0.9, 1.0)).checks
    assert exact.needed is None
    assert exact.p_pass < 0.05


def test_pairs_that_go_together_detect_less() -> None:
    alone, together = (plan(policy(max_drop=0.05), [SliceSize("safety", None, 600, 200, 0.9, e)]).checks[0] for e in (1.0, 3.0))
    assert alone.fails_at is not None
    assert together.fails_at is not None
    assert together.fails_at > alone.fails_at
    assert together.p_pass < alone.p_pass


@pytest.mark.parametrize("count", [2, 3, 30, 900])
def test_spreads_that_trainings_show_are_chi_squares(count: int) -> None:
    seen = Trainings(count, 0.02).seen()
    assert sum(part for _, part in seen) == pytest.approx(1)
    assert sum(sd**2 * part for sd, part in seen) == pytest.approx(0.02**2, rel=1e-3)
    middle = 0.02 * (scipy_stats.chi2.ppf(0.3, count - 1) / (count - 1)) ** 0.5
    assert sum(part for sd, part in seen if sd < middle) == pytest.approx(0.3, abs=0.04)
    assert Trainings(count, 0.0).seen() == Trainings().seen() == [(0.0, 1.0)]


@pytest.mark.parametrize(("count", "drop"), [(2, 0.0), (3, 0.0), (3, 0.2), (10, 0.0), (10, 0.1)])
def test_planned_chances_against_several_trainings_are_those_of_their_interval(count: int, drop: float) -> None:
    size = SliceSize("safety", None, 2000, None, 0.9, trainings=Trainings(count, 0.02))
    rng, draws, fails, passes = np.random.default_rng(count), 3000, 0, 0
    values = 0.9 - rng.normal(0, 0.02, (draws, count + 1)) - np.array([drop] + [0.0] * count)
    both = 0.9 * (0.9 - drop) + 0.5 * (0.9 * 0.1 * (0.9 - drop) * (0.1 + drop)) ** 0.5
    pair = (0.9 + 0.9 - drop - 2 * both - drop**2) * (1 + 1 / count) / 2
    se = (pair / 2000) ** 0.5
    changes = values[:, 0] - values[:, 1:].mean(axis=1) + rng.normal(0, se, draws)
    for at, sd in zip(changes.tolist(), values[:, 1:].std(axis=1, ddof=1).tolist(), strict=True):
        spread = prediction_spread(
            0.0, lambda tail: Bounds(-se * student_quantile(tail, 1999), se * student_quantile(tail, 1999)), sd, count
        )
        bounds = spread(0.025)
        fails += at + bounds.hi < -0.05
        passes += at + bounds.lo >= -0.05
    (check,) = plan(policy(max_drop=0.05), [size]).checks
    if drop == 0:
        assert check.p_pass == pytest.approx(passes / draws, abs=0.04)
        assert check.p_fail == pytest.approx(fails / draws, abs=0.02)
    else:
        assert check.fails_at is not None
        assert (fails / draws > 0.77) == (drop >= check.fails_at)


def test_rules_that_counts_say_nothing_about_are_named() -> None:
    made_plan = plan(load_policy("default"), told_sizes(["safety=450", "chat=300"], 0.9, 1.0))
    assert {check.rule for check in made_plan.checks} == {"better-than-chance", "no-regression"}
    assert made_plan.not_planned == (
        "over-refusal",
        "style-over-substance",
        "length-bias",
        "longer-chosen",
        "safety-features",
        "doubtful-pairs",
    )


def test_counts_are_those_of_the_data(tmp_path: Path) -> None:
    rows = [
        {"axis": "safety", "subset": "a", "group": "g1"},
        {"axis": "safety", "subset": "b", "group": "g1"},
        {"axis": "chat", "group": "g2"},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "d.jsonl").write_text(text)
    (tmp_path / "d.json").write_text(json.dumps(rows))
    (tmp_path / "d.csv").write_text("axis,subset,group\nsafety,a,g1\nsafety,b,g1\nchat,,g2\n")
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as handle:
        handle.write(text)
    for name in ("d.jsonl", "d.json", "d.csv", "d.jsonl.gz"):
        sizes = {(s.axis, s.subset): (s.n, s.n_groups) for s in dataset_sizes(tmp_path / name, 0.9, 1.0)}
        assert sizes[None, None] == (3, 2)
        assert sizes["safety", None] == (2, 1)
        assert sizes["chat", "all"] == (1, 1)
    found = report_sizes(Audit(made.report(made.pairs(0.8, 90, per_group=3)), None), None)
    assert [(s.axis, s.n, s.n_groups, s.accuracy) for s in found[:2]] == [(None, 90, 30, 0.8), ("safety", 90, 30, 0.8)]


@pytest.mark.parametrize("text", ["", "safety=", "safety=-1", "=5x", "/s=3", "safety=0"])
def test_counts_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(SpecError):
        told_sizes([text], 0.9, 1.0)


@pytest.mark.parametrize(
    ("name", "content"), [("d.parquet", b"x"), ("d.jsonl", b""), ("d.jsonl", b"[]"), ("d.json", b"{"), ("d.jsonl.gz", b"x")]
)
def test_files_that_cannot_be_counted_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetRefused):
        dataset_sizes(tmp_path / name, 0.9, 1.0)
