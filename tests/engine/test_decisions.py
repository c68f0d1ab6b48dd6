"""Decisions of people: files, digests, what they do to scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.special import expit, logit

from safer_engine.decisions import decision_digests, decisions_digest, load_decisions
from safer_engine.errors import SpecError
from safer_engine.pair_verdicts import apply_decisions, standing
from safer_engine.science.evidence import no_evidence
from safer_engine.science.pair_scoring import PairScoring
from safer_engine.science.suspicion import AxisDoubt
from safer_engine.spec import AuditSpec, SuspicionSpec
from safer_engine.spec_suspicion import PairDecision


def name(number: int) -> str:
    return f"{number:064x}"


def written(path: Path, *lines: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_an_exported_file_counts_what_was_decided_and_nothing_else(tmp_path: Path) -> None:
    edits = [
        {"content_digest": name(i), "action": action, "decision": decision}
        for i, (action, decision) in enumerate(
            [("drop", None), ("keep", {"reviewer": "mara"}), ("flip", {}), ("drop", {}), ("review", {})]
        )
    ]
    found = load_decisions(written(tmp_path / "decisions.jsonl", *edits))
    assert [(one.content_digest, one.wrong, one.by) for one in found] == [
        (name(1), False, "mara"), (name(2), True, ""), (name(3), True, ""), (name(4), None, ""),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        {"content_digest": "d", "wrong": True},
        {"content_digest": name(1), "wrong": "perhaps"},
        {"content_digest": name(1)},
        {"content_digest": name(1), "wrong": True, "more": 1},
        {"content_digest": name(1), "action": "burn", "decision": {}},
        {"content_digest": name(1), "action": "drop"},
    ],
)
def test_what_is_no_decision_is_refused(tmp_path: Path, line: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        load_decisions(written(tmp_path / "decisions.jsonl", line))


def test_a_row_decided_on_twice_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    line = {"content_digest": name(1), "wrong": True}
    with pytest.raises(SpecError, match="twice"):
        load_decisions(written(tmp_path / "decisions.jsonl", line, line))
    with pytest.raises(SpecError, match="no file"):
        load_decisions(str(tmp_path / "nowhere.jsonl"))


def test_the_digest_follows_the_decisions_wherever_they_stand(tmp_path: Path) -> None:
    lines = [{"content_digest": name(2), "wrong": True, "by": "a"}, {"content_digest": name(1), "wrong": None}]
    entries = [{"content_digest": name(1), "wrong": None, "by": "b"}, {"content_digest": name(2), "wrong": True}]
    base = {"model": {"path": "m"}, "dataset": {"source": {"kind": "memory"}}}
    path = written(tmp_path / "decisions.jsonl", *lines)
    inside, outside = (AuditSpec.model_validate({**base, "suspicion": {"decisions": given}}) for given in (entries, path))
    assert decision_digests(inside) == decision_digests(outside)
    assert decision_digests(AuditSpec.model_validate(base)) == {}
    other = load_decisions((PairDecision(content_digest=name(2), wrong=True),))
    assert decisions_digest(other) != decision_digests(inside)["suspicion"]


def scored(n: int, kind: str) -> tuple[PairScoring, pa.Table]:
    told = np.linspace(0.02, 0.98, n)
    doubt = AxisDoubt("probability", None, 0.3, 0.25, 0.35, 0.99) if kind == "probability" else AxisDoubt("rank", "why")
    base = np.full(n, 0.3 if kind == "probability" else np.nan)
    pairs = pa.table(
        {
            "content_digest": [name(i) for i in range(n)],
            "axis": ["safety"] * n,
            "group": [f"g{i}" for i in range(n)],
            "strength": pa.nulls(n, pa.float64()),
            "annotators": pa.array([[1, -1] if i == n - 1 else None for i in range(n)], pa.list_(pa.int8())),
        }
    )
    return PairScoring(told, base, np.full(n, 1.0), {}, None, no_evidence(n), doubts={"safety": doubt}), pairs


def test_decisions_recalibrate_probabilities_bases_and_shares() -> None:
    scoring, pairs = scored(400, "probability")
    rng = np.random.default_rng(0)
    truth = rng.random(400) < expit(-1.5 + 0.6 * logit(scoring.suspicion_P))
    decisions = [PairDecision(content_digest=name(i), wrong=bool(truth[i])) for i in range(0, 400, 2)]
    decisions += [PairDecision(content_digest=name(1), wrong=None), PairDecision(content_digest=name(9999), wrong=True)]
    made = apply_decisions(scoring, pairs, decisions, 0)
    learnt = made.meta["axes"]["safety"]
    assert (made.meta["n"], made.meta["n_open"], made.meta["n_unknown"], learnt["n"], learnt["used"]) == (202, 1, 1, 200, True)
    new = made.scoring.suspicion_P
    assert (np.diff(new) > 0).all()
    assert np.abs(new - expit(-1.5 + 0.6 * logit(scoring.suspicion_P))).max() < 0.12
    assert made.scoring.doubts["safety"].share == pytest.approx(float(new.mean()), abs=1e-9)
    assert ((new > made.scoring.base_P) == (scoring.suspicion_P > scoring.base_P)).all()


def test_ranks_and_few_decisions_leave_everything_as_it_was() -> None:
    for kind, said in (("rank", "rank"), ("probability", "fewer than")):
        scoring, pairs = scored(50, kind)
        made = apply_decisions(scoring, pairs, [PairDecision(content_digest=name(3), wrong=True)], 0)
        assert said in made.meta["axes"]["safety"]["reason"]
        np.testing.assert_array_equal(made.scoring.suspicion_P, scoring.suspicion_P)
        assert made.scoring.doubts == scoring.doubts


def test_contested_pairs_are_counted_by_reason_and_unknown_to_the_paper() -> None:
    scoring, pairs = scored(10, "probability")
    found = standing(scoring, pairs, "trl", SuspicionSpec())
    assert found.statuses[-1] == "contested"
    counted = found.counts(["safety"] * 10)["safety"]
    assert (counted["contested"], counted["reasons"]) == (1, {"annotators": 1})
    assert counted["suspicious"] == int((scoring.suspicion_P > 0.3).sum())
    paper = standing(scoring, pairs, "trl", SuspicionSpec(estimator="paper"))
    assert "contested" not in paper.statuses
    assert paper.reasons == [[]] * 10


def test_a_weak_preference_is_what_the_layout_calls_slight() -> None:
    scoring, pairs = scored(4, "probability")
    strong = pairs.set_column(3, "strength", pa.array([1.0, 2.0, 0.0, None], pa.float64()))
    told = [(layout, standing(scoring, strong, layout, SuspicionSpec()).reasons[:3]) for layout in ("helpsteer3", "trl")]
    weak = ["weak_preference"]
    assert told == [("helpsteer3", [weak, [], weak]), ("trl", [[], [], weak])]
