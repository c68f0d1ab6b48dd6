"""The report's facts on retraining with the edits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from safer_engine.artifacts import Verification
from safer_engine.report.model_verification import (
    ArmAccuracy,
    ArmEffect,
    HeldOutEffect,
    ShapeReport,
    SweepReport,
    SweptBudget,
    VerificationReport,
)

_Effect = TypeVar("_Effect", ArmEffect, HeldOutEffect)
_NAMES = (
    "outcome", "harmed", "level", "p_benefit", "p_harm", "seeds", "planned", "edited_axes", "edits", "pairs", "steps",
    "n_evaluated",
)  # fmt: skip


def verification_section(found: Verification) -> VerificationReport:
    """What the stage found."""
    return report_of(found.meta)


def report_of(meta: Mapping[str, Any]) -> VerificationReport:
    """The report's form of the facts of `Verification`, or of those that came in from elsewhere (`arm_import`)."""
    named = {name: meta[name] for name in _NAMES}
    return VerificationReport(**named, **_slices(meta), shapes=_shapes(meta), sweep=_sweep(meta.get("sweep")))


def _slices(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "accuracy": [ArmAccuracy(**row) for row in meta["accuracy"]],
        "effects": [_effect(ArmEffect, row) for row in meta["effects"]],
    }


def _shapes(meta: Mapping[str, Any]) -> list[ShapeReport]:
    return [ShapeReport(name=shape["name"], **_slices(shape)) for shape in meta.get("shapes", [])]


def _sweep(meta: Mapping[str, Any] | None) -> SweepReport | None:
    if meta is None:
        return None
    judged = meta["judged"] or {"outcome": "inconclusive", "harmed": [], "p_benefit": {}}
    return SweepReport(
        budgets=[
            SweptBudget(budget=row["budget"], edits=row["edits"], **_slices(row), shapes=_shapes(row)) for row in meta["budgets"]
        ],
        **{name: meta[name] for name in ("axes", "chosen", "n_choosing", "n_judging")},
        **{name: judged[name] for name in ("outcome", "harmed", "p_benefit")},
        against=[_effect(HeldOutEffect, row) for row in meta["against"]],
    )


def _effect(kind: type[_Effect], row: Mapping[str, Any]) -> _Effect:
    found = {**row, "change": row.get("estimate", row.get("change"))}
    return kind(**{name: found[name] for name in kind.model_fields})
