"""`safer-audit gate` with several `--baseline`: what it says, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.main import run_main
from tests.helpers import gate_reports as made
from tests.helpers.live_service import LiveService

ACCURACIES = {"new": 0.86, "one": 0.9, "two": 0.92, "three": 0.88, "bad": 0.3}
POLICY = {"version": 1, "rules": [{"name": "drop", "fact": "evaluation.groups[axis=safety].accuracy", "max_drop": 0.05}]}
Gate = Callable[..., tuple[int, str, str]]


def training(name: str) -> tuple[dict[str, Any], list[made.Pair]]:
    """A training of that name: its report and its evaluation pairs."""
    place = list(ACCURACIES).index(name)
    rows = [{**row, "margin": row["margin"] * (1 + place / 10)} for row in made.pairs(ACCURACIES[name], 300, seed=place)]
    report = made.report(rows)
    report["provenance"]["inputs"]["model"]["digest"] = f"model-{name}"
    return report, rows


@pytest.fixture
def gate(at_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Run `safer-audit gate` beside several trainings; exit code, stdout, stderr."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    monkeypatch.setenv("COLUMNS", "250")
    for name in ACCURACIES:
        made.write(at_home / name, *training(name))
    (at_home / "p.yaml").write_text(json.dumps(POLICY))

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_main(["gate", *arguments])
        seen = capsys.readouterr()
        return code, seen.out, seen.err

    return run


def against(*names: str) -> list[str]:
    return [part for name in names for part in ("--baseline", name)]


def test_a_table_says_what_it_was_compared_with(gate: Gate) -> None:
    code, text, _ = gate("--report", "bad", *against("one", "two", "three"), "--policy", "p.yaml")
    assert (code, text.splitlines()[-1]) == (1, "verdict: fail")
    assert "against the mean of 3 baselines, spread between trainings SD 0.02" in " ".join(text.split())
    assert "evaluation pairs that each of 3 baselines had right are wrong now" in text
    code, text, _ = gate("--report", "new", *against("one", "two", "three"), "--policy", "p.yaml", "-q")
    assert (code, text) == (3, "inconclusive\n")


def test_the_order_of_baselines_changes_no_byte(gate: Gate) -> None:
    seen = []
    for names in (("one", "two", "three"), ("three", "one", "two")):
        arguments = ("--report", "new", *against(*names), "--policy", "p.yaml", "--junit", "j.xml", "--markdown", "m.md")
        text = gate(*arguments, "--json")[1]
        seen.append((gate(*arguments)[1], text, Path("j.xml").read_bytes(), Path("m.md").read_bytes()))
    assert seen[0] == seen[1]
    found = json.loads(seen[0][1])
    assert (found["schema_version"], found["baseline"]) == (1, None)
    assert [each["model"] for each in found["baselines"]] == ["model-one", "model-three", "model-two"]
    assert found["checks"][0]["training_sd"] == pytest.approx(0.02)
    single = json.loads(gate("--report", "new", *against("one"), "--policy", "p.yaml", "--json")[1])
    assert single["baseline"]["model"] == "model-one"
    assert "baselines" not in single
    assert "training_sd" not in single["checks"][0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--report", "new", *against("one", "one")), "two of the baselines are the same training"),
        (("--report", "new", *against("one", "two", "one/report.json")), "two of the baselines are the same training"),
        (("--report", "new", *against("one", "new")), "is one of the 2 baselines"),
        (("--report", "new", *against("one", "nowhere/report.json")), "cannot read --baseline"),
        (("--audit", "j1", "--detach", *against("label:a", "label:b")), "the service judges against one"),
        (("--gate", "g1", *against("label:a", "label:b")), "--baseline cannot be given with --gate"),
        (("plan", "--report", "new", *against("one", "two")), "measures on one --baseline"),
        (("plan", "--pairs", "450", "--baselines", "3"), "--baselines and --training-sd are one thing"),
        (("plan", "--pairs", "450", "--training-sd", "0.1"), "--baselines and --training-sd are one thing"),
    ],
)
def test_what_is_refused(gate: Gate, arguments: tuple[str, ...], said: str) -> None:
    code, text, told = gate(*arguments)
    assert (code, text) == (2, "")
    assert said in told
    assert "hint:" in told


def test_a_plan_knows_of_several_baselines(gate: Gate) -> None:
    def change(*more: str) -> dict[str, Any]:
        checks = json.loads(gate("plan", "--pairs", "safety=2000", "--policy", "p.yaml", "--json", *more)[1])["checks"]
        return {**checks[0]}

    one, few, many, wide = (
        change(*more)
        for more in (
            (),
            ("--baselines", "2", "--training-sd", "0.01"),
            ("--baselines", "10", "--training-sd", "0.01"),
            ("--baselines", "10", "--training-sd", "0.1"),
        )
    )
    assert one["half_width"] < many["half_width"] < few["half_width"]
    assert few["p_pass"] < many["p_pass"] <= one["p_pass"]
    assert wide["needed"] is None
    assert wide["warning"].endswith("more pairs would not do, more baselines might")


def test_jobs_and_files_together(gate: Gate, as_admin: Path, service: LiveService) -> None:
    jobs = {}
    for name in ("new", "one", "two"):
        report, rows = training(name)
        files = {"report.json": json.dumps(report).encode(), "evaluation.jsonl": made.lines(rows)}
        submitted = service.world.submit(labels={"several": name})
        jobs[name] = service.world.finish(submitted, {"report": files}).id
    mixed = gate("--audit", jobs["new"], *against(jobs["one"], "label:several=two", "three"), "--policy", "p.yaml", "--json")
    files_only = gate("--report", "new", *against("one", "two", "three"), "--policy", "p.yaml", "--json")
    assert mixed[:2] == files_only[:2]
    twice = gate("--audit", jobs["new"], *against(jobs["one"], "label:several=one"))
    assert twice[0] == 2
    assert "two of the baselines are the same training" in twice[2]
