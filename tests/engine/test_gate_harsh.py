"""Reports that no audit wrote: refused in words, or judged on what is there; never an error of the gate's own."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from safer_engine.errors import InputRefused, SaferError, SpecError
from safer_engine.gate import documents
from safer_engine.gate.counts import report_sizes
from safer_engine.gate.documents import Audit, load_audit, read_audit
from safer_engine.gate.judge import Check, judge
from safer_engine.gate.outputs import as_json, as_junit, as_markdown
from safer_engine.gate.paired import shared_pairs
from safer_engine.gate.policy import Policy, load_policy, parse_policy
from safer_engine.gate.power import plan
from tests.helpers import gate_reports as made

TODAY = date(2026, 5, 1)
ROWS = made.pairs(0.9, 12, per_group=2) + made.pairs(0.9, 12, axis="chat", subset="over-refusal", per_group=2)
GOOD = made.report(ROWS)
GONE = object()
WRONG: tuple[Any, ...] = (GONE, None, True, "x", -1, 0, 1e308, -1e300, 1 << 70, [], {}, [None], {"a": 1}, [[]])


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a document below its root."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inner:
        yield (*path, key)
        yield from places(value, (*path, key))


def damaged(path: tuple[Any, ...], value: object) -> dict[str, Any]:
    document = copy.deepcopy(GOOD)
    node: Any = document
    for key in path[:-1]:
        node = node[key]
    if value is GONE:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return document


@pytest.mark.parametrize("seed", range(4))
def test_a_report_with_anything_wrong_is_refused_or_judged(seed: int) -> None:
    every = [(path, value) for path in places(GOOD) for value in WRONG]
    whole, policy, refused = read_audit(json.dumps(GOOD).encode(), made.lines(ROWS), "it"), load_policy("default"), 0
    for path, value in random.Random(seed).sample(every, 150):
        try:
            audit = read_audit(json.dumps(damaged(path, value)).encode(), made.lines(ROWS), "it")
            for pair in ((audit, whole), (whole, audit)):
                decision = judge(policy, *pair, TODAY)
                json.loads(as_json(decision))
                assert as_junit(decision)
                assert as_markdown(decision)
            plan(policy, report_sizes(audit, None))
        except SaferError:
            refused += 1
    assert 20 < refused < 150


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("evaluation", "groups", 0), "x", r"evaluation.groups\[0\] is no slice"),
        (("evaluation", "groups", 1, "axis"), 3, "names no axis and subset"),
        (("evaluation", "groups", 0, "accuracy", "estimate"), 1.5, r"evaluation.groups\[0\].accuracy is no share"),
        (("evaluation", "groups", 0, "accuracy", "hi"), 0.01, "ends before it begins"),
        (("evaluation", "groups", 0, "accuracy", "n"), None, "counts that are no counts"),
        (("evaluation", "groups", 0, "margin", "hi"), "9", "not of numbers"),
        (("evaluation", "length"), {}, "evaluation.length is no list"),
        (("evaluation", "length", 0, "gap"), [], r"evaluation.length\[0\].gap has no estimate"),
        (("evaluation", "length", 0, "n_equal"), -1, "n_equal is no count"),
        (("evaluation",), 7, "evaluation is no section"),
        (("evaluation", "n_pairs"), 1 << 70, "finite numbers"),
    ],
)
def test_the_place_of_what_is_wrong_is_named(path: tuple[Any, ...], value: object, said: str) -> None:
    with pytest.raises(InputRefused, match=said):
        read_audit(json.dumps(damaged(path, value)).encode(), None, "it")


def check(rule: dict[str, Any], report: dict[str, Any], old: dict[str, Any] | None = None) -> tuple[Check, ...]:
    rules = Policy.model_validate({"version": 1, "rules": [{"name": "r", **rule}]})
    return judge(rules, Audit(report, None), None if old is None else Audit(old, None), TODAY).checks


def test_one_figure_that_is_null_hides_no_other() -> None:
    rows = made.pairs(0.9, 200) + [{**row, "longer_by": 3} for row in made.pairs(0.9, 200, axis="chat")]
    rows = [{**row, "margin": 1.0 if row["longer_by"] > 0 else -1.0} for row in rows]
    rule = {"fact": "evaluation.length[axis=*].gap", "max": 0.3}
    for optional, outcome in ((True, "skipped"), (False, "inconclusive")):
        found = {one.id: one.outcome for one in check({**rule, "optional": optional}, made.report(rows))}
        assert found == {"r[axis=safety]": "fail", "r[axis=chat]": outcome}
    risen = check({"fact": rule["fact"], "max_rise": 0.1, "optional": True}, made.report(rows), made.report(rows))
    assert {one.id: one.outcome for one in risen}["r[axis=chat]"] == "skipped"


def test_ids_that_were_given_to_other_pairs_are_not_paired() -> None:
    swapped = [{**row, "pair_id": other["pair_id"]} for row, other in zip(ROWS, reversed(ROWS), strict=True)]
    whole = read_audit(json.dumps(GOOD).encode(), made.lines(ROWS), "it")
    other = read_audit(json.dumps(GOOD).encode(), made.lines(swapped), "it")
    assert "24 common pair ids are of another group, axis or subset" in shared_pairs(whole, other).reason


@pytest.mark.parametrize("bound", ["true", "'0.5'", ".nan", ".inf", "2026-01-01", "[1]", "9" * 5000])
def test_a_bound_is_a_number(bound: str) -> None:
    with pytest.raises(SpecError):
        parse_policy(f"version: 1\nrules: [{{name: r, fact: a, max: {bound}}}]", "it")


@pytest.mark.parametrize(
    "text",
    [
        "version: 1\nrules: &r [*r]",
        "version: 1\nrules: [{name: r, fact: a, max: 1, needs: {" + ", ".join(
            ["a0: &a0 [x, x, x, x, x, x, x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))]
        ) + "}}]",
        "version: 1\nrules: !!python/object/apply:os.getcwd []",
        "version: 1\nrules: [{name: r, max: 1, fact: 'a[" + " " * 100_000 + "'}]",
        "version: 1\nrules: " + "[" * 5000,
        "version: 1\nrules: []\n---\nversion: 1",
    ],
)  # fmt: skip
def test_hostile_policies_are_refused_in_few_words(text: str) -> None:
    with pytest.raises(SpecError) as refused:
        parse_policy(text, "it")
    assert len(refused.value.message) < 10_000


def test_a_waiver_holds_through_its_last_day_and_not_an_hour_longer() -> None:
    waived = Policy.model_validate(
        {
            "version": 1,
            "rules": [{"name": "r", "fact": "dataset.longer_chosen", "max": 0}],
            "waivers": [{"rule": "r", "owner": "mara", "reason": "known", "expires": "2026-05-01"}],
        }
    )
    audit = Audit(GOOD, None)
    assert [one.effect for one in judge(waived, audit, None, date(2026, 5, 1)).checks] == ["waived"]
    late = judge(waived, audit, None, date(2026, 5, 2))
    assert [one.effect for one in late.checks] == ["fail", "fail"]
    assert "waived until" not in as_markdown(late)


def test_files_that_never_end_are_not_read_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_REPORT", 10_000)
    with pytest.raises(InputRefused, match="has more than 10,000 bytes"):
        load_audit(Path("/dev/zero"), "--report")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputRefused, match="cannot read"):
        load_audit(tmp_path / "loop", "--report")
    monkeypatch.setattr(documents, "MAX_REPORT", 1 << 20)
    folder = made.write(tmp_path / "a", GOOD, ROWS)
    (tmp_path / "link").symlink_to(folder)
    assert load_audit(tmp_path / "link", "--report").pairs is not None
    os.mkfifo(tmp_path / "evaluation.jsonl")  # beside a report of another folder: no file, so not waited for
    (tmp_path / "report.json").write_text(json.dumps(GOOD))
    assert load_audit(tmp_path, "--report").pairs is None


@pytest.mark.parametrize(
    ("rule", "report", "outcome"),
    [
        ({"fact": "edits.doubtful_share", "max": 0.1, "needs": {"edits.suspicion_kind": "probability"}}, "probability", "fail"),
        ({"fact": "edits.doubtful_share", "max": 0.3, "needs": {"edits.suspicion_kind": "probability"}}, "probability", "pass"),
        ({"fact": "edits.doubtful_share", "max": 0.3, "needs": {"edits.suspicion_kind": "probability"}}, "rank", "inconclusive"),
        ({"fact": "features[safety_feature=true,causal_effect!=null].causal_effect", "min": 0.1}, "causal", "fail"),
        ({"fact": "features[safety_feature=true,causal_effect<0]", "max": 0, "optional": True}, "causal", "fail"),
        ({"fact": "features[safety_feature=true].causal_effect", "min": -1}, "", "inconclusive"),
        ({"fact": "verification.arms[name=edited].accuracy", "min": 0.5}, "verification", "pass"),
        ({"fact": "verification.arms[name=edited].accuracy", "min": 0.99}, "verification", "fail"),
        ({"fact": "verification.arms[name=edited].accuracy", "min": 0.5}, "", "inconclusive"),
    ],
)
def test_facts_of_later_versions_become_rules(rule: dict[str, Any], report: str, outcome: str) -> None:
    """Reports as a later version might write them: the gate needs no change for their figures."""
    share = {"estimate": 0.2, "lo": 0.17, "hi": 0.23, "n": 900, "n_groups": 900}
    document = made.report(ROWS)
    document["edits"] |= {"doubtful_share": share, "suspicion_kind": "probability" if report == "probability" else "rank"}
    if report == "causal":
        document["features"] = [made.feature(1, 0.2, causal_effect=-0.4, causal_effect_lo=-0.5, causal_effect_hi=-0.3)]
    if report == "verification":
        document["verification"] = {"arms": [{"name": "edited", "accuracy": {**share, "estimate": 0.8, "lo": 0.77, "hi": 0.83}}]}
        del document["provenance"]["not_computed"]["verification"]
    assert [one.outcome for one in check(rule, document)] == [outcome]
