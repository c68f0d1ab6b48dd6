"""How two audits go together: known answers, and plans that follow them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from safer_engine.errors import InputRefused
from safer_engine.gate.counts import report_sizes
from safer_engine.gate.documents import Audit, read_audit
from safer_engine.gate.intervals import paired_difference
from safer_engine.gate.policy import Policy
from safer_engine.gate.power import plan
from safer_engine.gate.together import design_effect, measured_together, phi, with_pairing
from tests.helpers import gate_reports as made

DROP = Policy.model_validate(
    {"version": 1, "rules": [{"name": "drop", "fact": "evaluation.groups[axis=*].accuracy", "max_drop": 0.05}]}
)


def audit(rows: list[made.Pair], digest: str = "eval") -> Audit:
    return read_audit(json.dumps(made.report(rows, digest)).encode(), made.lines(rows), "the report")


@pytest.mark.parametrize(
    ("counts", "known"),
    [
        ((50, 0, 0, 50), 1.0),
        ((0, 50, 50, 0), -1.0),
        ((25, 25, 25, 25), 0.0),
        ((80, 5, 5, 10), (80 * 10 - 25) / (85 * 15)),
        ((90, 0, 10, 0), None),
        ((100, 0, 0, 0), None),
    ],
)
def test_the_correlation_is_phi(counts: tuple[int, int, int, int], known: float | None) -> None:
    new, old = made.cells(counts)
    overall, axis, subset = measured_together(audit(new), audit(old))
    assert (overall.axis, axis.axis, subset.subset) == (None, "safety", "refusal")
    for one in (overall, axis, subset):
        assert one.correlation == (None if known is None else pytest.approx(known))
        assert (one.n, one.n_groups, one.n_differ) == (100, 100, counts[1] + counts[2])
    right = [[row["margin"] > 0 for row in rows] for rows in (new, old)]
    if known is not None:
        assert phi(*right) == pytest.approx(np.corrcoef(right[0], right[1])[0, 1])


def test_copies_of_a_pair_are_worth_one() -> None:
    values = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], 60)
    names = [str(place) for place in range(60)]
    assert design_effect(values.tolist(), names) == pytest.approx(1.0)
    copied = design_effect(np.repeat(values, 5).tolist(), np.repeat(names, 5).tolist())
    assert copied == pytest.approx(5 * (1 - 1 / 300) / (1 - 1 / 60))
    assert design_effect([0.0] * 9, list("abcabcabc")) == 1.0
    assert design_effect([0.0, 1.0], ["a", "a"]) == 1.0
    assert design_effect([1.0, -1.0] * 30, np.repeat(names[:30], 2).tolist()) == 1.0  # what cancels is worth no less


def test_axes_are_measured_apart() -> None:
    chat, safety = made.cells((40, 0, 0, 40), axis="chat"), made.cells((30, 30, 30, 30))
    found = {
        one.axis: one.correlation
        for one in measured_together(audit(chat[0] + safety[0]), audit(chat[1] + safety[1]))
        if not one.subset
    }
    assert found["chat"] == pytest.approx(1)
    assert found["safety"] == pytest.approx(0)
    assert found[None] == pytest.approx((70 * 70 - 30 * 30) / 100**2)


def test_the_plan_follows_what_was_measured_and_what_is_given_wins() -> None:
    new, old = made.cells((400, 10, 10, 30))
    one, other = audit(new), audit(old)
    sizes, measured = report_sizes(one, None, 1.0), measured_together(one, other)
    known = measured[0].correlation
    assert known is not None
    (planned,) = plan(DROP, with_pairing(sizes, measured)).checks
    (told,) = plan(DROP, sizes, known).checks
    assert planned == told
    (given,) = plan(DROP, with_pairing(sizes, measured, correlation=0.0)).checks
    assert given == plan(DROP, sizes, 0.0).checks[0]
    assert given.half_width > 1.5 * planned.half_width
    differences = [float(a["margin"] > 0) - float(b["margin"] > 0) for a, b in zip(new, old, strict=True)]
    spread = paired_difference(differences, [row["group"] for row in new], shares=True).spread
    assert spread is not None
    assert planned.half_width == pytest.approx((spread(0.025).hi - spread(0.025).lo) / 2, rel=0.02)


def test_few_common_pairs_borrow_from_what_is_around_them() -> None:
    chat, safety = made.cells((10, 0, 0, 10), axis="chat"), made.cells((60, 15, 15, 60))
    one, other = audit(chat[0] + safety[0]), audit(chat[1] + safety[1])
    measured = measured_together(one, other)
    pairings = {(s.axis, s.subset): s.pairing for s in with_pairing(report_sizes(one, None), measured)}
    assert {place: pairing.n for place, pairing in pairings.items() if pairing is not None}["chat", None] == 20
    assert pairings["chat", None].correlation == pairings[None, None].correlation == measured[0].correlation  # type: ignore[union-attr]
    few = made.cells((5, 1, 1, 5))
    alone = with_pairing(report_sizes(audit(few[0]), None), measured_together(audit(few[0]), audit(few[1])))
    assert {s.pairing.correlation for s in alone if s.pairing is not None} == {0.5}


def test_pairs_that_the_baseline_lacks_cannot_be_compared() -> None:
    chat, safety = made.cells((30, 5, 5, 10), axis="chat"), made.cells((60, 15, 15, 60))
    one, other = audit(chat[0] + safety[0]), audit(safety[1], digest="another")
    checks = {c.id: c for c in plan(DROP, with_pairing(report_sizes(one, None), measured_together(one, other))).checks}
    assert checks["drop[axis=chat]"].warning == "the baseline has none of these pairs: can only be inconclusive"
    assert checks["drop[axis=safety]"].n == 150


def test_audits_of_other_pairs_are_refused() -> None:
    with pytest.raises(InputRefused, match="in common"):
        measured_together(audit(made.pairs(0.9, 50)), audit(made.pairs(0.9, 50, axis="chat"), digest="another"))
    bare = Audit(made.report(made.pairs(0.9, 50)), None)
    with pytest.raises(InputRefused, match="the baseline has no evaluation.jsonl"):
        measured_together(audit(made.pairs(0.9, 50)), bare)
