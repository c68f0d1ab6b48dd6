"""`safer-audit gate plan` on two audits: what it measures, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.main import run_main
from tests.helpers import gate_reports as made

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def gate(at_home: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `gate plan` beside two audits; exit code, stdout, stderr."""
    new, old = made.cells((400, 10, 10, 30))
    made.write(at_home / "new", made.report(new), new)
    made.write(at_home / "old", made.report(old), old)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_main(["gate", "plan", *arguments])
        seen = capsys.readouterr()
        return code, seen.out, seen.err

    return run


def test_the_command_measures(gate: Run) -> None:
    code, text, _ = gate("--report", "new", "--baseline", "old", "--json")
    found: dict[str, Any] = json.loads(text)
    assert code == 0
    assert found["measured"][0]["n_differ"] == 20
    assert found["measured"][0]["correlation"] == pytest.approx((400 * 30 - 100) / (410 * 40))
    shown = gate("--report", "new", "--baseline", "old/report.json")[1]
    assert "axis=safety" in shown
    assert "0.73" in shown
    assert "as given" not in shown
    assert (
        "planned with a correlation of 0.2, as given" in gate("--report", "new", "--baseline", "old", "--correlation", "0.2")[1]
    )
    widths = [
        next(c["half_width"] for c in json.loads(gate("--report", "new", *more, "--json")[1])["checks"] if c["kind"] == "change")
        for more in (("--baseline", "old"), ("--baseline", "old", "--correlation", "0.2"), ())
    ]
    assert widths[0] < widths[2] < widths[1]
    effect = json.loads(gate("--report", "new", "--design-effect", "4", "--json")[1])["checks"][0]["half_width"]
    assert effect > 1.5 * json.loads(gate("--report", "new", "--json")[1])["checks"][0]["half_width"]


@pytest.mark.parametrize(
    "arguments",
    [("--pairs", "450", "--baseline", "old"), ("--baseline", "old"), ("--report", "new", "--baseline", "nowhere/report.json")],
)
def test_what_cannot_be_measured_is_refused(gate: Run, arguments: tuple[str, ...]) -> None:
    code, text, said = gate(*arguments)
    assert (code, text) == (2, "")
    assert "hint:" in said
