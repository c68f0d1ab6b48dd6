"""`safer-audit drill`: off by default, and how flags become a spec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from cli.drill import drill_document
from cli.main import EXIT_USAGE, run_main
from safer_engine.drill_spec import BUDGETS, RULE_NAMES, build_drill_spec
from safer_engine.redteam import ENABLE

NONE: dict[str, Any] = dict.fromkeys(("axis", "seeds", "unit", "rules", "budgets", "device"))


def flags(folder: Path, **given: Any) -> dict[str, Any]:
    for name in ("d", "e"):
        (folder / f"{name}.jsonl").write_text("{}\n")
    places = {"base": "b", "dataset": str(folder / "d.jsonl"), "eval_dataset": str(folder / "e.jsonl")}
    return {**NONE, **places, "keep_poison": False, "assignments": (), **given}


def test_off_it_ends_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The inputs are not even there, and that is not what it complains of."""
    monkeypatch.delenv(ENABLE, raising=False)
    out, store = tmp_path / "out", tmp_path / "store"
    given = ["drill", "-b", "no", "-d", "no.jsonl", "-e", "no.jsonl", "-o", str(out), "--store", str(store)]
    assert run_main(given) == EXIT_USAGE
    said = capsys.readouterr().err
    assert "off unless the operator" in said
    assert ENABLE in said
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(ENABLE, "1")
    assert run_main(given) == EXIT_USAGE
    assert "no.jsonl" in capsys.readouterr().err


def test_flags_become_a_spec(tmp_path: Path) -> None:
    plain = build_drill_spec(drill_document(flags(tmp_path)))
    assert (plain.rules, plain.budgets, plain.seeds, plain.unit, plain.axis) == (RULE_NAMES, BUDGETS, 3, "groups", "safety")
    more = flags(
        tmp_path, rules="random, score", budgets="5%,0.5", seeds=2, unit="pairs", axis="x", device="cpu",
        assignments=("recipe.epochs=4", "audit.sae.k=8"),
    )  # fmt: skip
    spec = build_drill_spec(drill_document(more))
    assert (spec.rules, spec.budgets, spec.seeds, spec.unit, spec.axis) == (("score", "random"), (0.005, 0.05), 2, "pairs", "x")
    assert (spec.recipe.epochs, spec.audit, spec.runtime.device) == (4, {"sae": {"k": 8}}, "cpu")
    with pytest.raises(click.UsageError, match="write percentages"):
        drill_document(flags(tmp_path, budgets="few"))
