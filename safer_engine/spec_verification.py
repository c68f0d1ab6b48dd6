"""Spec section `verification`: retraining with the recommended edits and with controls, to measure what the edits change."""

from __future__ import annotations

from pydantic import Field

from safer_engine.spec_retraining import RetrainingSpec
from safer_engine.spec_section import Section

N_ARMS = 4
"""As given, our edits, as many by margin, as many at random (`science.arms`)."""
LEAST_SEEDS = 5
"""Fewer seeds can show harm, and nothing else."""


class VerificationSpec(Section):
    """Arms (as given, the recommended edits, as many by margin, as many at random) × seeds, trained as section `retraining` says
    and compared on the evaluation pairs (docs/verify.md)."""

    seeds: int = Field(
        LEAST_SEEDS,
        ge=1,
        le=100,
        description="Trainings of each of the four arms; with fewer than 5 the outcome is `inconclusive` or `harm shown`.",
    )
    level: float = Field(
        0.05, gt=0, lt=0.5, description="Chance of a wrong `benefit shown`, and of a wrong `harm shown`, at most."
    )
    early_stop: bool = Field(
        True,
        description="Stop after 5 seeds where the outcome is decided there: the test after 5 takes a fifth of the level, that "
        "after all seeds the rest.",
    )


def require_inputs(verification: VerificationSpec | None, retraining: RetrainingSpec | None, *, evaluation: bool) -> None:
    """Refuse a verification that has nothing to train from, or nothing to measure with. Raises ValueError."""
    if verification is None:
        return
    if retraining is None:
        raise ValueError(
            "section verification retrains reward models: name the model to train from (retraining.base; with "
            "retraining.folds: 0 nothing else is retrained)"
        )
    if not evaluation:
        raise ValueError("section verification compares reward models on pairs that none was trained on: give section evaluation")
