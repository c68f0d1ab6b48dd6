"""`safer-audit export --to evidence`: figures, digests and reasons of the audit, hostile names harmless, the same bytes again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from cli.main import run_main
from tests.helpers import gate_reports as made

HOSTILE = "x | <img src=x> ` [a](http://b) \u202e"
ROWS = made.pairs(0.9, 200, axis=HOSTILE)
NULLS = ("dataset", "reward_model", "sae", "features", "edits", "verification", "verdict")


def audit(folder: Path) -> Path:
    """A finished audit that measured accuracy alone."""
    timing = {"created": "2026-01-02T03:04:05Z", "total_seconds": 1.0, "peak_memory_bytes": None, "peak_gpu_bytes": None,
              "disk_bytes": 0, "planned": None, "stages": [], "runtime": {}}  # fmt: skip
    provenance: dict[str, Any] = {
        "tool": "safer-audit", "tool_version": "9.8.7", "seed": 3, "text_included": False, "progress": None, "timing": timing,
        "inputs": {"model": {"origin": HOSTILE, "revision": None, "digest": "ab" * 32}},
        "stages": [{"stage": "evaluation", "state": "computed", "version": 5, "content_digest": "cd" * 32},
                   {"stage": "sae", "state": "absent", "reason": f"not wanted {HOSTILE}"}],
        "not_computed": dict.fromkeys(NULLS, "not asked for"),
    }  # fmt: skip
    measured = {**made.evaluation(ROWS), "n_pairs": 200, "min_pairs": 20, "too_few": False, "margins": []}
    document = made.report(ROWS) | dict.fromkeys(NULLS) | {"provenance": provenance, "evaluation": measured}
    document["spec"]["preset"] = "standard"
    made.write(folder, document, ROWS)
    return folder


def test_evidence_says_what_the_audit_found_and_cites_its_files(at_home: Path) -> None:
    folder = audit(at_home / "audit")
    assert run_main(["export", str(folder), "--to", "evidence", "-o", "one"]) == 0
    found = json.loads((at_home / "one" / "evidence.json").read_text())
    assert (found["tool_version"], found["seed"], found["inputs"]["model"]["digest"]) == ("9.8.7", 3, "ab" * 32)
    assert found["accuracy"][0]["accuracy"]["estimate"] == pytest.approx(0.9)
    assert {"what": "verdict", "reason": "not asked for"} in found["not_made"]
    assert [n["what"] for n in found["not_made"]].count("stage sae") == 1
    assert [s["stage"] for s in found["stages"]] == ["evaluation"]
    expected = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("report.json", "evaluation.jsonl")}
    assert {f["name"]: f["sha256"] for f in found["files"]} == expected
    assert run_main(["export", str(folder / "report.json"), "--to", "evidence", "-o", "two"]) == 0
    for name in ("evidence.json", "evidence.md"):
        assert (at_home / "one" / name).read_bytes() == (at_home / "two" / name).read_bytes()


def test_foreign_names_stay_in_code_spans(at_home: Path) -> None:
    assert run_main(["export", str(audit(at_home / "audit")), "--to", "evidence"]) == 0
    text = (at_home / "evidence.md").read_text(encoding="utf-8")
    assert "0.900 (" in text
    assert "\u202e" not in text
    assert "``x \\| <img src=x> ` [a](http://b) ⟦RLO⟧``" in text
    assert "not wanted x \\| &lt;img src=x&gt;" in text


def test_what_is_no_finished_audit_is_refused(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = audit(at_home / "audit")
    document = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps({**document, "unknown": 1}))
    assert run_main(["export", str(folder), "--to", "evidence", "-o", "out"]) == 2
    assert "not as an audit wrote it: unknown" in capsys.readouterr().err
    (folder / "report.json").write_text(json.dumps({**document, "spec": {}}))
    assert run_main(["export", str(folder), "--to", "evidence", "-o", "out"]) == 2
    assert "the report's spec" in capsys.readouterr().err
    assert run_main(["export", "nowhere", "--to", "evidence", "-o", "out"]) == 2
    assert not (at_home / "out").exists()
