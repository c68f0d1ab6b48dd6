"""The gate's benchmark: each training against the one baseline and against all others of its recipe, from reports alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gate_table import judged_rows, markdown_table
from safer_engine.gate.policy import load_policy
from tests.helpers import gate_reports as made

ROWS = {
    "baseline": ("baseline", 0.9),
    "again-1": ("same recipe", 0.89),
    "again-2": ("same recipe", 0.91),
    "again-3": ("same recipe", 0.9),
    "flipped": ("safety labels flipped", 0.4),
}
POLICY = {"version": 1, "rules": [{"name": "drop", "fact": "evaluation.groups[axis=*].accuracy", "max_drop": 0.03}]}


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(json.dumps(POLICY))
    return path


def write(out: Path, *names: str) -> Path:
    for name in names:
        what, accuracy = ROWS[name]
        place = list(ROWS).index(name)
        rows = [{**row, "margin": row["margin"] * (1 + place)} for row in made.pairs(accuracy, 200, seed=place)]
        report = made.report(rows)
        report["provenance"]["inputs"]["model"]["digest"] = name
        made.write(out / name / "audit", report, rows)
        (out / name / "row.json").write_text(json.dumps({"name": name, "what": what, "seed": place}))
    return out


def test_every_row_is_judged_against_one_and_against_all_others(tmp_path: Path, policy: Path) -> None:
    rows = {row.name: row for row in judged_rows(write(tmp_path / "rows", *ROWS), load_policy(str(policy)))}
    assert {name: row.n_several for name, row in rows.items()} == {name: 4 if name == "flipped" else 3 for name in ROWS}
    assert rows["baseline"].single is None
    for name, row in rows.items():
        assert row.several is not None
        others = {str(each.digest("model")) for each in row.several.baselines}
        assert others == set(ROWS) - {name, "flipped"}
    assert rows["flipped"].several is not None
    assert rows["flipped"].several.verdict == "fail"


def test_both_tables_stand_side_by_side(tmp_path: Path, policy: Path) -> None:
    text = markdown_table(write(tmp_path / "rows", *ROWS), policy)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {8}
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| baseline", "| same recipe, seed 1", "| same recipe, seed 2", "| same recipe, seed 3", "| safety labels flipped",
    ]  # fmt: skip
    assert "fail (4) | drop[safety] −0.5" in lines[-1]
    assert "- A/A, each against all 3 others: 0 pass, 4 inconclusive, 0 fail of 4" in text
    assert "- Damaged, against all 4 trainings of the recipe: 0 pass, 0 inconclusive, 1 fail of 1." in text


def test_one_retraining_is_no_spread(tmp_path: Path, policy: Path) -> None:
    assert markdown_table(tmp_path / "rows", policy).startswith("nothing to judge yet")
    write(tmp_path / "rows", "baseline")
    assert markdown_table(tmp_path / "rows", policy).startswith("nothing to judge yet")
    rows = judged_rows(write(tmp_path / "rows", "again-1"), load_policy(str(policy)))
    assert [row.several for row in rows] == [None, None]
    assert "against all" not in markdown_table(tmp_path / "rows", policy).partition("| --- |")[2]
