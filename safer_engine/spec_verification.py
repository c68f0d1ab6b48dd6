"""Spec section `verification`: retraining with the recommended edits and with controls, to measure what the edits change."""

from __future__ import annotations

from pydantic import Field, field_validator

from safer_engine.spec_retraining import RetrainingSpec
from safer_engine.spec_section import Section

N_ARMS = 4
"""As given, our edits, as many by margin, as many at random (`science.arms`)."""
_OF_A_BUDGET = N_ARMS - 1
_LARGEST = 0.5
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
    budgets: tuple[float, ...] = Field(
        (),
        max_length=20,
        description="A sweep: shares of the rows of each axis, in (0, 0.5). Each adds three arms (most doubtful rows, as many "
        "by margin, as many at random) to those of the audit's own cut; the best is chosen on half of the evaluation groups "
        "and judged on the other half.",
    )

    @field_validator("budgets")
    @classmethod
    def _shares(cls, budgets: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0.0 < budget < _LARGEST for budget in budgets):
            raise ValueError("a budget is a share of the rows, more than 0 and less than 0.5: give for example [0.02, 0.04]")
        if len(set(budgets)) < len(budgets):
            raise ValueError("a budget is named twice")
        return tuple(sorted(budgets))

    @property
    def n_arms(self) -> int:
        """Trainings of each seed."""
        return N_ARMS + _OF_A_BUDGET * len(self.budgets)


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
