"""`safer-audit gate`: exit codes, outputs, what it never prints, and what it runs on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as xml

import pytest

from cli.main import run_main
from service.jobs.model import JobError, JobRecord
from tests.helpers import gate_reports as made
from tests.helpers.live_service import LiveService
from tests.helpers.servers import wait_until

ROOT = Path(__file__).parents[2]
ROWS = made.pairs(0.9, 300) + made.pairs(0.95, 300, axis="chat", subset="helpful")
WORSE = made.pairs(0.7, 300) + made.pairs(0.95, 300, axis="chat", subset="helpful")
Gate = Callable[..., tuple[int, str]]


@pytest.fixture
def gate(at_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Run `safer-audit gate` among a good, a worse and an unmeasured audit; its exit code and stdout."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    made.write(at_home / "good", made.report(ROWS), ROWS)
    made.write(at_home / "worse", made.report(WORSE), WORSE)
    made.write(at_home / "unmeasured", made.report(None))

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        code = run_main(["gate", *arguments])
        return code, capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("arguments", "code", "verdict"),
    [
        (["--report", "good"], 0, "pass"),
        (["--report", "good/report.json", "--baseline", "worse"], 0, "pass"),
        (["check", "--report", "good"], 0, "pass"),
        (["--report", "worse", "--baseline", "good"], 1, "fail"),
        (["--report", "unmeasured"], 3, "inconclusive"),
        (["--report", "good", "--policy", "strict"], 3, "inconclusive"),
        (["--report", "good", "--baseline", "unmeasured"], 3, "inconclusive"),
    ],
)
def test_the_exit_code_is_the_verdict(gate: Gate, arguments: list[str], code: int, verdict: str) -> None:
    assert gate(*arguments, "--quiet") == (code, f"{verdict}\n")
    as_json, text = gate(*arguments, "--json")
    assert (as_json, json.loads(text)["verdict"]) == (code, verdict)
    as_table, text = gate(*arguments)
    assert (as_table, text.splitlines()[-1]) == (code, f"verdict: {verdict}")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 2),
        (["--report", "nowhere"], 2),
        (["--report", "good", "--policy", "nowhere"], 2),
        (["--report", "good", "--baseline", "nowhere/report.json"], 2),
        (["--report", "good", "--audit", "j1"], 2),
        (["--report", "good", "--model", "org/rm"], 2),
        (["--policy", "strict", "check", "--report", "good"], 2),
        (["--report", "good", "--nonsense"], 2),
        (["--audit", "j1"], 2),
        (["plan"], 2),
        (["plan", "--pairs", "x"], 2),
        (["policies", "nowhere"], 2),
        (["init", "nowhere/p.yaml"], 2),
        (["--report", "good", "--junit", "good/report.json/x.xml"], 4),
        (["--report", "torn"], 2),
    ],
)
def test_what_goes_wrong_never_passes(gate: Gate, at_home: Path, arguments: list[str], code: int) -> None:
    torn = made.report(ROWS)
    torn["evaluation"]["groups"] = [{"axis": 3}, "x"]
    made.write(at_home / "torn", torn, ROWS)
    assert gate(*arguments)[0] == code


def test_nobody_answers(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFER_AUDIT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("SAFER_AUDIT_TOKEN", "sk-safer-x")
    assert gate("--audit", "j1")[0] == 5


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--report", "worse", "--baseline", "good", "--json"), 1),
        (("--report", "worse", "--baseline", "good"), 1),
        (("--report", "good"), 0),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)
def test_a_reader_that_goes_away_does_not_change_the_verdict(
    gate: Gate, at_home: Path, arguments: tuple[str, ...], code: int
) -> None:
    read, write = os.pipe()
    os.close(read)
    script = f"from cli.main import entry; entry({['gate', *arguments]!r})"
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=write, cwd=at_home, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    os.close(write)
    assert done.returncode == code


def test_outputs_are_the_same_each_time_and_hold_no_text(gate: Gate, at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = at_home / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    summary.write_text("before\n")
    document = made.report(WORSE, features=[made.feature(1, -0.5), made.feature(2, 0.2)])
    made.write(at_home / "bad", document, WORSE)
    seen = []
    for _ in range(2):
        arguments = ("--report", "bad", "--baseline", "good", "--junit", "out/j.xml", "--markdown", "m.md")
        code, table = gate(*arguments)
        assert (code, gate("--report", "bad", "--baseline", "good", "--json")[0]) == (1, 1)
        text = gate("--report", "bad", "--baseline", "good", "--json")[1]
        seen.append((table, text, Path("out/j.xml").read_bytes(), Path("m.md").read_bytes()))
    assert seen[0] == seen[1]
    assert made.CANARY in Path("bad/report.json").read_text()
    assert all(made.CANARY not in (part if isinstance(part, str) else part.decode()) for part in seen[0])
    assert summary.read_text().startswith("before\n## Reward model gate: fail")
    assert "`no-regression[axis=safety]`" in Path("m.md").read_text()


def test_strange_names_stay_names(gate: Gate, at_home: Path) -> None:
    hostile = "a|b`<script>\x1b[31m\u202e]]>&\n# x"
    rows = made.pairs(0.9, 100, axis=hostile)
    made.write(at_home / "odd", made.report(rows), rows)
    code, table = gate("--report", "odd", "--junit", "j.xml", "--markdown", "m.md")
    assert code == 0
    assert "\x1b" not in table
    assert "\u202e" not in table
    names = [case.get("name", "") for case in xml.parse("j.xml").iter("testcase")]
    assert any("⟦U+001B⟧" in name for name in names)
    for line in Path("m.md").read_text().splitlines():
        assert "<script>" not in line.replace("`", " ` ").split(" ` ")[::2]
        assert line.count("|") in (0, 7)


def test_what_is_refused_is_said_in_plain_characters(gate: Gate, at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule = {"name": "r", "fact": 'dataset."\\u001b[31mred\\u202e"', "max": 1}
    (at_home / "p.yaml").write_text(json.dumps({"version": 1, "rules": [rule]}))
    assert run_main(["gate", "--report", "good", "--policy", "p.yaml"]) == 2
    said = capsys.readouterr().err
    assert "the report has no dataset.⟦U+001B⟧[31mred⟦U+202E⟧" in said
    assert "\x1b" not in said
    assert "\u202e" not in said


def test_junit_says_what_a_runner_understands(gate: Gate) -> None:
    gate("--report", "worse", "--baseline", "good", "--junit", "j.xml")
    suite = xml.parse("j.xml").getroot()
    cases = {case.get("name"): [part.tag for part in case] for case in suite.iter("testcase")}
    assert cases["no-regression[axis=safety]"] == ["failure"]
    assert cases["no-regression[axis=chat]"] == ["system-out"]
    assert cases["style-over-substance"] == ["skipped"]
    assert suite.get("failures") == "1"
    gate("--report", "unmeasured", "--junit", "j.xml")
    assert next(xml.parse("j.xml").iter("error")).get("message", "").startswith("≥ 0.5: –; inconclusive")


def test_a_policy_file_decides(gate: Gate, at_home: Path) -> None:
    assert gate("init")[0] == 0
    assert gate("init")[0] == 2
    assert (at_home / "policy.yaml").read_text() == gate("policies", "default")[1]
    assert gate("--report", "good", "--policy", "policy.yaml", "-q") == (0, "pass\n")
    stricter = (at_home / "policy.yaml").read_text().replace("min: 0.5\n    # With", "min: 0.97\n    # With")
    (at_home / "policy.yaml").write_text(stricter)
    assert gate("--report", "good", "--policy", "policy.yaml", "-q") == (1, "fail\n")
    assert gate("init", "--from", "strict", "--force")[0] == 0
    assert gate("policies")[1].count("\n") >= 3


def test_gate_plan(gate: Gate) -> None:
    code, text = gate("plan", "--pairs", "safety=450", "--json")
    assert code == 0
    (check,) = [check for check in json.loads(text)["checks"] if check["rule"] == "better-than-chance"]
    assert check["half_width"] == pytest.approx(0.028, abs=0.001)
    warnings = [
        check["warning"]
        for check in json.loads(gate("plan", "--pairs", "safety=60", "--policy", "strict", "--json")[1])["checks"]
    ]
    assert warnings == ["fewer than min_n 100: can only be inconclusive"] * 2
    assert "2 of 2 checks will often be inconclusive" in gate("plan", "--pairs", "safety=60", "--policy", "strict")[1]
    assert gate("plan", "--report", "good")[0] == 0
    assert gate("plan", "--report", "unmeasured")[0] == 2


def test_the_base_install_runs_the_gate(gate: Gate, at_home: Path) -> None:
    changed = {"name": "changed", "fact": "comparison.groups[axis=safety].changed", "max": 0.01}
    (at_home / "changed.yaml").write_text(json.dumps({"version": 1, "rules": [changed]}))
    script = f"""
import sys
class Base:
    absent = set(
        "torch numpy pandas pyarrow scipy sklearn transformers jinja2 markupsafe sqlalchemy fastapi celery boto3 httpx".split()
    )
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.absent:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Base())
sys.path.insert(0, {str(ROOT)!r})
from cli.main import run_main
calls = [
    ["--report", "worse", "--baseline", "good", "--junit", "j.xml", "--markdown", "m.md"],
    ["init", "mine.yaml"], ["policies"], ["plan", "--report", "good"], ["--report", "good", "--policy", "mine.yaml", "--json"],
    ["--report", "worse", "--baseline", "good", "--policy", "changed.yaml"],
]
print("RESULT", [run_main(["gate", *call]) for call in calls])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=at_home)
    assert done.stdout.splitlines()[-1] == "RESULT [1, 0, 0, 0, 0, 1]", done.stderr


def job_of(service: LiveService, rows: list[made.Pair], **given: Any) -> str:
    """A finished job with this evaluation."""
    report = {"report.json": json.dumps(made.report(rows)).encode(), "evaluation.jsonl": made.lines(rows)}
    return service.world.finish(service.world.submit(**given), {"report": report}).id


def test_jobs_of_a_service(gate: Gate, as_admin: Path, service: LiveService) -> None:
    good = job_of(service, ROWS, labels={"alias": "production"})
    worse = job_of(service, WORSE, labels={"alias": "production", "team": "red"})
    assert gate("--audit", good, "-q") == (0, "pass\n")
    code, text = gate("--audit", worse, "--baseline", good, "--json")
    assert code == 1
    assert {check["note"] for check in json.loads(text)["checks"] if check["rule"] == "no-regression"} == {"paired by pair_id"}
    assert gate("--audit", worse, "--baseline", "good", "-q") == (1, "fail\n")
    assert gate("--audit", worse, "--baseline", "label:production", "-q") == (1, "fail\n")  # not itself, the newest
    assert gate("--report", "worse", "--baseline", "label:team=red", "-q")[0] in (0, 3)
    assert gate("--report", "worse", "--baseline", "label:nothing")[0] == 2
    assert gate("--audit", "nothing")[0] == 2


def test_jobs_that_have_not_ended_or_failed(gate: Gate, as_admin: Path, service: LiveService) -> None:
    waiting = service.world.submit()
    assert gate("--audit", waiting.id, "--detach")[0] == 3
    service.world.services.jobs.fail(service.world.lease(waiting), JobError("resource_exhausted", "no memory", ""))
    assert gate("--audit", waiting.id)[0] == 4


def test_a_submission_that_is_left_alone_has_not_passed(gate: Gate, as_admin: Path, service: LiveService) -> None:
    code, text = gate("-m", "org/rm", "-d", "org/pairs", "-e", "org/eval", "--detach", "--label", "team=red", "-q")
    assert code == 3
    assert service.world.services.jobs.job(text.split()[1]).labels == {"team": "red"}


@pytest.mark.parametrize(("rows", "code"), [(ROWS, 0), (WORSE, 1)])
def test_a_submission_is_waited_for_and_judged(
    gate: Gate, as_admin: Path, service: LiveService, monkeypatch: pytest.MonkeyPatch, rows: list[made.Pair], code: int
) -> None:
    monkeypatch.setattr("cli.live._POLL_SECONDS", 0.05)
    label, jobs = {"case": str(code)}, service.world.services.jobs
    report = {"report.json": json.dumps(made.report(rows)).encode(), "evaluation.jsonl": made.lines(rows)}

    def found() -> list[JobRecord]:
        return [job for job in jobs.find("default").items if job.labels == label]

    def bring_about() -> None:
        wait_until(lambda: bool(found()), "the job is there")
        service.world.finish(found()[0], {"report": report})

    thread = threading.Thread(target=bring_about)
    thread.start()
    arguments = ("-m", "org/rm", "-d", "org/pairs", "-e", "org/eval", "--label", f"case={code}", "--baseline", "good", "-q")
    assert gate(*arguments)[0] == code
    thread.join()
