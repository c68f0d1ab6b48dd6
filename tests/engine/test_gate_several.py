"""A gate against several trainings of one recipe: known answers, how often it is wrong, and what it refuses."""

from __future__ import annotations

import itertools
import json
import statistics
from datetime import date
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from safer_engine.errors import InputRefused
from safer_engine.gate.decisions import read_decision
from safer_engine.gate.documents import Audit, EvaluationPair, read_audit
from safer_engine.gate.intervals import Bounds, mean_spread, paired_difference, paired_gap, prediction_spread
from safer_engine.gate.judge import Check, Decision, judge
from safer_engine.gate.outputs import as_document, as_json, as_junit, as_markdown
from safer_engine.gate.policy import Policy
from tests.helpers import gate_reports as made

TODAY = date(2026, 5, 1)
ACCURACY, MARGIN, GAP = "evaluation.groups[axis=safety].accuracy", "evaluation.groups[].margin", "evaluation.length[].gap"


def audit(rows: list[made.Pair] | None, model: str, *, beside: bool = True, digest: str = "eval", **changes: Any) -> Audit:
    document = made.report(rows, digest, **changes)
    document["provenance"]["inputs"]["model"]["digest"] = model
    return read_audit(json.dumps(document).encode(), made.lines(rows) if rows is not None and beside else None, model)


def training(seed: int, accuracy: float, *, per_group: int = 2, **more: Any) -> Audit:
    """A training whose right pairs and margins are its own."""
    return audit(trained(seed, accuracy, per_group=per_group), f"model{seed}", **more)


def trained(seed: int, accuracy: float, per_group: int = 2) -> list[made.Pair]:
    rows, noise = made.pairs(accuracy, 240, seed=seed, per_group=per_group), np.random.default_rng(seed).uniform(0.5, 1.5, 240)
    return [{**row, "margin": row["margin"] * float(factor)} for row, factor in zip(rows, noise, strict=True)]


def policy(**rule: Any) -> Policy:
    return Policy.model_validate({"version": 1, "rules": [{"name": "r", "fact": ACCURACY, **rule}]})


def only(decision: Decision) -> Check:
    (check,) = decision.checks
    return check


OLD = [training(seed, accuracy) for seed, accuracy in ((1, 0.9), (2, 0.8), (3, 0.85))]
NEW = training(9, 0.7)


def reach(check: Check) -> tuple[float, float]:
    assert check.bounds is not None
    return check.bounds.lo, check.bounds.hi


@pytest.mark.parametrize("count", [2, 3, 10])
def test_without_other_chance_it_is_the_textbooks_prediction_interval(count: int) -> None:
    bounds = prediction_spread(0.1, lambda _: Bounds(0.1, 0.1), 0.04, count)(0.02)
    half = scipy_stats.t.isf(0.02, count - 1) * 0.04 * (1 + 1 / count) ** 0.5
    assert (bounds.lo, bounds.hi) == pytest.approx((0.1 - half, 0.1 + half))


def test_both_parts_add_as_squares_and_one_alone_stands() -> None:
    drawn = Bounds(-0.2, 0.5)
    alone = prediction_spread(0.1, lambda _: drawn, 0.0, 3)(0.025)
    assert (alone.lo, alone.hi) == pytest.approx((drawn.lo, drawn.hi))
    trained = scipy_stats.t.isf(0.025, 2) * 0.04 * (4 / 3) ** 0.5
    both = prediction_spread(0.1, lambda _: drawn, 0.04, 3)(0.025)
    assert (both.lo, both.hi) == pytest.approx((0.1 - np.hypot(0.3, trained), 0.1 + np.hypot(0.4, trained)))
    held = prediction_spread(0.1, lambda _: drawn, 4.0, 2, 1.0)(0.001)
    assert (held.lo, held.hi) == (-1.0, 1.0)
    mean = mean_spread([lambda _: Bounds(0.0, 1.0), lambda _: Bounds(0.5, 2.0)])(0.1)
    assert (mean.lo, mean.hi) == (0.25, 1.5)


def test_an_accuracy_is_compared_with_the_mean_pair_by_pair() -> None:
    check = only(judge(policy(max_drop=0.05), NEW, OLD, TODAY))
    right = np.array([[pair.right for pair in each.pairs or ()] for each in (NEW, *OLD)], dtype=float)
    values = right[0] - right[1:].mean(axis=0)
    accuracies = right[1:].mean(axis=1)
    assert sorted(accuracies) == pytest.approx([0.8, 0.85, 0.9])
    found = paired_difference(values.tolist(), [pair.group for pair in NEW.pairs or ()], shares=True)
    assert found.spread is not None
    drawn, trained = found.spread(0.025), scipy_stats.t.isf(0.025, 2) * accuracies.std(ddof=1) * (4 / 3) ** 0.5
    down, up = values.mean() - drawn.lo, drawn.hi - values.mean()
    assert check.value == pytest.approx(-0.15)
    assert check.training_sd == pytest.approx(0.05)
    assert reach(check) == pytest.approx((-0.15 - np.hypot(down, trained), -0.15 + np.hypot(up, trained)))
    assert check.note == "paired by pair_id; against the mean of 3 baselines, spread between trainings SD 0.05"
    assert (check.n, check.n_groups, check.outcome) == (240, 120, "inconclusive")


@pytest.mark.parametrize("fact", [MARGIN, GAP])
def test_margins_and_gaps_of_length_likewise(fact: str) -> None:
    check = only(judge(policy(fact=fact, max_drop=0.05), NEW, OLD, TODAY))
    pairs = [each.pairs or () for each in (NEW, *OLD)]
    groups = [pair.group for pair in pairs[0]]
    if fact == MARGIN:
        figures = np.array([[pair.margin for pair in each] for each in pairs])
        found = paired_difference((figures[0] - figures[1:].mean(axis=0)).tolist(), groups, shares=False)
        own = figures.mean(axis=1)
    else:
        figures = np.array([[float(pair.right) for pair in each] for each in pairs])
        longer = [(pair.longer_by or 0) > 0 for pair in pairs[0]]
        found = paired_gap((figures[0] - figures[1:].mean(axis=0)).tolist(), longer, ["s"] * 240, groups)
        own = figures[:, longer].mean(axis=1) - figures[:, [not kind for kind in longer]].mean(axis=1)
    assert found.spread is not None
    assert check.value == pytest.approx(own[0] - own[1:].mean())
    assert check.training_sd == pytest.approx(own[1:].std(ddof=1))
    trained = scipy_stats.t.isf(0.025, 2) * own[1:].std(ddof=1) * (4 / 3) ** 0.5
    drawn = found.spread(0.025)
    expected = (found.mean - np.hypot(found.mean - drawn.lo, trained), found.mean + np.hypot(drawn.hi - found.mean, trained))
    assert reach(check) == pytest.approx(expected)


def test_without_pairs_the_figures_are_compared() -> None:
    bare = [Audit(each.report, None) for each in OLD]
    apart, paired = (only(judge(policy(max_drop=0.05), NEW, old, TODAY)) for old in (bare, OLD))
    assert apart.value == pytest.approx(paired.value)
    assert apart.training_sd == pytest.approx(0.05)
    assert apart.note.startswith("not paired: a baseline has no evaluation.jsonl beside it; against the mean of 3 baselines")
    assert reach(apart)[1] > reach(paired)[1]
    single = only(judge(policy(max_drop=0.05), NEW, bare[0], TODAY))
    assert reach(apart)[1] > reach(single)[1]


def test_a_figure_without_an_interval_gets_the_trainings() -> None:
    rule = {"fact": "dataset.longer_chosen", "max_rise": 0.05}
    shares = [0.5, 0.52, 0.54]

    def dataset(share: float) -> dict[str, Any]:
        return {"longer_chosen": share, "health": {"dropped": {}}}

    old = [audit(None, f"m{share}", dataset=dataset(share)) for share in shares]
    check = only(judge(policy(**rule), audit(None, "new", dataset=dataset(0.53)), old, TODAY))
    half = scipy_stats.t.isf(0.025, 2) * statistics.stdev(shares) * (4 / 3) ** 0.5
    assert reach(check) == pytest.approx((0.01 - half, 0.01 + half))
    alike = [audit(None, name, dataset=dataset(0.5)) for name in ("a", "b")]
    for each in alike:
        each.report["spec"] = {"seed": each.digest("model")}
    same = only(judge(policy(**rule), audit(None, "new", dataset=dataset(0.6)), alike, TODAY))
    assert (same.outcome, same.bounds, same.training_sd) == ("fail", None, 0.0)


def test_one_baseline_is_what_it_was_however_it_is_given() -> None:
    alone, listed = (judge(policy(max_drop=0.05), NEW, each, TODAY) for each in (OLD[0], [OLD[0]]))
    assert as_json(alone) == as_json(listed)
    assert set(as_document(alone)["checks"][0]).isdisjoint({"training_sd"})
    assert "baselines" not in as_document(alone)
    assert as_json(judge(policy(min=0.5), NEW, [], TODAY)) == as_json(judge(policy(min=0.5), NEW, None, TODAY))
    assert judge(policy(max_drop=0.05), OLD[0], OLD[0], TODAY).checks[0].value == 0  # itself, as ever


def test_the_order_of_baselines_changes_nothing() -> None:
    rules = Policy.model_validate(
        {
            "version": 1,
            "rules": [{"name": f"r{i}", "fact": fact, "max_drop": 0.05} for i, fact in enumerate((ACCURACY, MARGIN, GAP))],
        }
    )
    seen = set()
    for order in itertools.permutations(OLD):
        decision = judge(rules, NEW, order, TODAY)
        seen.add(as_json(decision) + as_markdown(decision) + as_junit(decision))
    assert len(seen) == 1


def test_the_document_lists_the_baselines_and_is_read_back() -> None:
    decision = judge(policy(max_drop=0.05), NEW, OLD, TODAY)
    document = as_document(decision)
    assert document["baseline"] is None
    assert [each["model"] for each in document["baselines"]] == ["model1", "model2", "model3"]
    assert document["checks"][0]["training_sd"] == pytest.approx(0.05)
    back = read_decision(document, decision.policy.model_dump(mode="json"))
    assert as_json(back) == as_json(decision)
    assert as_markdown(back) == as_markdown(decision)
    assert "against the mean of 3 trainings, model1, model2, model3" in as_markdown(decision)
    assert "for them this covers the seed of the training too" in as_junit(decision)
    assert "seed" not in as_junit(judge(policy(max_drop=0.05), NEW, OLD[0], TODAY))


def test_pairs_are_lost_that_every_baseline_had_right() -> None:
    decision = judge(policy(max_drop=0.05), NEW, OLD, TODAY)
    right = [{pair.pair_id for pair in each.pairs or () if pair.right} for each in (NEW, *OLD)]
    assert decision.lost == tuple(sorted((right[1] & right[2] & right[3]) - right[0]))
    assert f"{len(decision.lost)} evaluation pairs that each of 3 baselines had right are wrong now" in as_markdown(decision)


def test_the_same_training_twice_is_refused() -> None:
    again, renamed = audit(trained(1, 0.9), "model1", beside=False), audit(trained(1, 0.9)[:-20], "saved-anew", digest="part")
    unnamed = Audit(json.loads(json.dumps(OLD[1].report)), OLD[1].pairs)
    unnamed.report["provenance"]["inputs"]["model"] = {}
    for old in ([OLD[0], OLD[0]], [OLD[0], OLD[1], again], [OLD[0], renamed]):
        for order in (old, old[::-1]):
            with pytest.raises(InputRefused, match="two of the baselines are the same training") as refused:
                judge(policy(max_drop=0.05), NEW, order, TODAY)
            assert refused.value.hint
    for own in (OLD[2], audit(trained(3, 0.85), "saved-anew")):
        with pytest.raises(InputRefused, match="is one of the 3 baselines"):
            judge(policy(max_drop=0.05), own, OLD, TODAY)
    for new, old in ((NEW, [OLD[0], unnamed]), (unnamed, OLD)):
        with pytest.raises(InputRefused, match="told apart by their models' digests"):
            judge(policy(max_drop=0.05), new, old, TODAY)


def test_trainings_that_prefer_nothing_are_not_the_same() -> None:
    flat = [audit([{**row, "margin": 0.0} for row in trained(1, 0.9)], f"flat{n}") for n in range(2)]
    for each in flat:
        each.report["spec"] = {"name": each.digest("model")}
    assert only(judge(policy(max_drop=0.05), NEW, flat, TODAY)).outcome == "pass"


def test_one_baseline_without_the_figure_is_not_dropped() -> None:
    unmeasured = audit(None, "model4")
    few = made.report(made.pairs(0.9, 60, axis="chat"), "eval")
    few["provenance"]["inputs"]["model"]["digest"] = "model5"
    for optional in (False, True):
        rule = policy(max_drop=0.05, optional=optional)
        check = only(judge(rule, NEW, [*OLD, unmeasured], TODAY))
        assert check.outcome == "inconclusive"
        assert check.reason.startswith("of the baseline model4: evaluation is null in the report")
        check = only(judge(rule, NEW, [*OLD, Audit(few, None)], TODAY))
        assert (check.outcome, check.value) == ("inconclusive", None)
        assert "of the baseline model5: nothing in the report is meant by" in check.reason


def test_one_baseline_without_one_of_several_figures_is_not_dropped() -> None:
    chat = made.pairs(0.8, 100, axis="chat")
    whole = [audit(trained(seed, 0.8) + [{**row, "margin": row["margin"] + seed} for row in chat], f"m{seed}") for seed in (1, 2)]
    found = judge(policy(fact="evaluation.groups[axis=*].accuracy", max_drop=0.05), whole[0], [whole[1], OLD[2]], TODAY)
    assert {one.id: one.reason for one in found.checks}["r[axis=chat]"] == "the report of the baseline model3 has no such figure"
    assert {one.id: one.training_sd for one in found.checks}["r[axis=safety]"] is not None


def test_one_baseline_on_other_pairs_makes_it_inconclusive() -> None:
    other = audit(made.pairs(0.8, 240, subset="another"), "model4", digest="another")
    check = only(judge(policy(max_drop=0.05), NEW, [*OLD, other], TODAY))
    assert check.reason.startswith("a baseline was measured on other evaluation pairs")
    assert check.outcome == "inconclusive"
    rows = [made.pairs(0.8, 240, seed=seed) for seed in (1, 2)]
    thirds = [audit(part, f"m{n}", digest=f"d{n}") for n, part in enumerate((rows[0][:130], rows[1][110:]))]
    assert "20 pair ids in common" in only(judge(policy(max_drop=0.05), audit(made.pairs(0.7, 240), "m9"), thirds, TODAY)).reason


@pytest.mark.parametrize("count", [2, 3, 10])
@pytest.mark.parametrize("ratio", [0.0, 1.0, 10.0, 1000.0])
def test_false_alarms_stay_in_their_bound_whatever_the_spread(count: int, ratio: float) -> None:
    """Normal parts, the variance of training that many times that of drawing: 4000 draws, tolerance of three standard errors."""
    rng, tail, draws = np.random.default_rng(count), 0.02, 4000
    between = ratio / (1 + 1 / count)
    sds = np.sqrt(between * rng.chisquare(count - 1, draws) / (count - 1))
    drops = rng.normal(0, np.sqrt(1 + ratio), draws)
    half = float(scipy_stats.t.isf(tail, 1e7))
    failed = sum(
        drop + prediction_spread(0.0, lambda _: Bounds(-half, half), sd, count)(tail).hi < 0
        for drop, sd in zip(drops.tolist(), sds.tolist(), strict=True)
    )
    assert failed / draws <= tail + 3 * (tail * (1 - tail) / draws) ** 0.5
    if ratio in (0.0, 1000.0):
        assert failed / draws >= 0.6 * tail  # exact where one part is all there is


def simulated(rng: np.random.Generator, count: int, drop: float, between: float) -> list[Audit]:
    """A new training and so many of the recipe: 50 groups of 3 pairs, hard or easy for all models, abilities drawn for each."""
    ease = np.repeat(rng.normal(size=50), 3) + rng.normal(size=150)
    ability = 1.0 + between * rng.normal(size=count + 1)
    ability[0] -= drop
    margins = ease + ability[:, None] + 0.7 * rng.normal(size=(count + 1, 150))
    audits = []
    for number, own in enumerate(margins):
        pairs = tuple(EvaluationPair(f"{i}", f"{i // 3}", "safety", "s", float(margin)) for i, margin in enumerate(own))
        share = {"estimate": float((own > 0).mean()), "lo": 0.0, "hi": 1.0, "n": 150, "n_groups": 50}
        report = made.report(
            None, evaluation={"too_few": False, "groups": [{"axis": "safety", "subset": None, "accuracy": share}]}
        )
        report["provenance"]["inputs"]["model"]["digest"] = f"m{number}"
        audits.append(Audit(report, pairs))
    return audits


def failures(count: int, drop: float, between: float, draws: int) -> float:
    rng, rule = np.random.default_rng(7), policy(max_drop=0.0)
    found = (simulated(rng, count, drop, between) for _ in range(draws))
    return sum(judge(rule, new, old, TODAY).verdict == "fail" for new, *old in found) / draws


@pytest.mark.parametrize(("count", "draws"), [(2, 250), (3, 250), (10, 120)])
def test_a_training_of_the_recipe_is_not_failed_more_often_than_stated(count: int, draws: int) -> None:
    """The whole gate, at its own tail of 0.025, with trainings that differ by some 10 points; three standard errors."""
    assert failures(count, 0.0, 0.5, draws) <= 0.025 + 3 * (0.025 * 0.975 / draws) ** 0.5


def test_one_baseline_alone_fails_trainings_of_the_same_recipe() -> None:
    assert failures(1, 0.0, 0.5, 200) > 0.15


def test_a_worse_recipe_is_found_with_enough_trainings() -> None:
    assert failures(10, 2.5, 0.5, 60) > 0.9
    assert failures(2, 2.5, 0.5, 60) < 0.5  # two trainings say little of how far trainings differ
