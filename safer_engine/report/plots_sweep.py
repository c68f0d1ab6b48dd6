"""How much to edit: change of accuracy by budget, a panel for each slice of the evaluation pairs, controls beside our edits."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from safer_engine.report.model_verification import ArmEffect, HeldOutEffect, SweepReport
from safer_engine.report.plots_curves import Plane, Point, Series, curves
from safer_engine.report.plots_verification import ARM_NAMES, OURS, ScopeRow, interval_of, scopes_of
from safer_engine.report.text import percent, signed


def sweep_scopes(found: SweepReport) -> list[ScopeRow]:
    """The slices, each with its differences from the data as given: budgets in order, three arms of each."""
    return scopes_of([effect for at in found.budgets for effect in at.effects])


def sweep_plot(found: SweepReport, scope: ScopeRow) -> Markup:
    """A line for each arm over the budgets, in points."""
    budgets = [at.budget for at in found.budgets]
    effects = {arm: [effect for effect in scope.effects if effect.arm == arm] for arm in ARM_NAMES}
    every = [effect for row in sweep_scopes(found) for effect in row.effects]
    ends = [100 * end for one in every for end in (one.change, one.lo, one.hi) if end is not None]
    reach = (max(-100.0, min([*ends, -1.0]) * 1.08), min(100.0, max([*ends, 1.0]) * 1.08))
    lines = [
        Series(f"sweep-{arm}", {budget: _point(effect, budget) for budget, effect in zip(budgets, own, strict=True)})
        for arm, own in effects.items()
    ]
    label = f"Change of accuracy on {scope.name} by budget, a line for each arm. The table below holds the same figures."
    return curves(Plane(budgets, reach, "rows edited → change of accuracy, points", label), lines)


def _point(effect: ArmEffect, budget: float) -> Point:
    tip = f"{ARM_NAMES[effect.arm]}, {100 * budget:g} %: {signed(100 * effect.change, 1)} points ({interval_of(effect)})"
    lo, hi = (None if end is None else 100 * end for end in (effect.lo, effect.hi)) if effect.arm == OURS else (None, None)
    return Point(100 * effect.change, lo, hi, tip)


def sweep_rows(found: SweepReport) -> list[Sequence[str]]:
    """A row for each slice and budget: rows edited, each arm's accuracy, and what our edits change with its interval."""
    rows: list[Sequence[str]] = []
    for scope in sweep_scopes(found):
        ours = [effect for effect in scope.effects if effect.arm == OURS]
        for at, effect in zip(found.budgets, ours, strict=True):
            edited = f"{at.edits.get('drop', 0)} dropped, {at.edits.get('flip', 0)} flipped"
            accuracy = {one.arm: one.accuracy for one in at.accuracy if (one.axis, one.subset) == (scope.axis, scope.subset)}
            arms = [percent(accuracy[arm]) for arm in ARM_NAMES]
            change = signed(100 * effect.change, 1), interval_of(effect)
            rows.append((scope.name, f"{100 * at.budget:g} %", edited, *arms, *change))
    return rows


def sweep_sentence(found: SweepReport) -> str:
    """What the budget was chosen by, and what it shows elsewhere."""
    if found.chosen is None:
        return "No budget was chosen: the halves of the evaluation pairs have no edited axis in common."
    return (
        f"{100 * found.chosen:g} % looks best on {found.n_choosing} evaluation pairs. On the other {found.n_judging}, by which "
        f"it was not chosen: {found.outcome} ({'; '.join(map(_against, found.against))})."
    )


def _against(one: HeldOutEffect) -> str:
    reference = "the data as given" if one.reference == "as given" else "as many random edits"
    return f"against {reference} {signed(100 * one.change, 1)} points, {interval_of(one)}"


IN_TEMPLATES = {
    "sweep_scopes": sweep_scopes, "sweep_plot": sweep_plot, "sweep_rows": sweep_rows, "sweep_sentence": sweep_sentence,
}  # fmt: skip
