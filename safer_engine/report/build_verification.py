"""The report's facts on retraining with the edits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safer_engine.artifacts import Verification
from safer_engine.report.model_verification import ArmAccuracy, ArmEffect, VerificationReport

_NAMES = (
    "outcome", "harmed", "level", "p_benefit", "p_harm", "seeds", "planned", "edited_axes", "edits", "pairs", "steps",
    "n_evaluated",
)  # fmt: skip


def verification_section(found: Verification) -> VerificationReport:
    """What the stage found."""
    return report_of(found.meta)


def report_of(meta: Mapping[str, Any]) -> VerificationReport:
    """The report's form of the facts of `Verification`, or of those that came in from elsewhere (`arm_import`)."""
    rows = [{**row, "change": row.get("estimate", row.get("change"))} for row in meta["effects"]]
    effects = [ArmEffect(**{name: row[name] for name in ArmEffect.model_fields}) for row in rows]
    accuracy = [ArmAccuracy(**row) for row in meta["accuracy"]]
    return VerificationReport(**{name: meta[name] for name in _NAMES}, effects=effects, accuracy=accuracy)
