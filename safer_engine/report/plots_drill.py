"""The curves of a drill as inline SVG: harm and detection against the budget, a line for each rule."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

from markupsafe import Markup

from safer_engine.report.model_drill import Cell, DrillDocument, Effect, Ranked
from safer_engine.report.plots_curves import Plane, Point, Series, curves
from safer_engine.report.text import interval, percent, signed

RULE_WORDS = {
    "score": "highest pair score", "margin": "highest reward margin", "length": "longer by most", "random": "at random",
}  # fmt: skip


def harm_plot(found: DrillDocument, where: str) -> Markup:
    """Change of accuracy by budget, in points.

    Args:
        where: `axis`, or `rest`.
    """

    def point(cell: Cell) -> Point | None:
        effect: Effect | None = cell.axis if where == "axis" else cell.rest
        if effect is None:
            return None
        ends = "no interval" if effect.lo is None or effect.hi is None else interval(100 * effect.lo, 100 * effect.hi, 1)
        tip = f"{_name(cell)}: {signed(100 * effect.change, 1)} points ({ends})"
        lo, hi = (None if end is None else 100 * end for end in (effect.lo, effect.hi))
        return Point(100 * effect.change, lo, hi, tip)

    every = [one for cell in found.cells for name in ("axis", "rest") if (one := getattr(cell, name)) is not None]
    ends = [100 * end for one in every for end in (one.change, one.lo, one.hi) if end is not None]
    low, high = max(-100.0, min([*ends, -1.0]) * 1.08), min(100.0, max([*ends, 1.0]) * 1.08)
    name = f"axis {found.axis}" if where == "axis" else "all other axes"
    label = f"Change of accuracy on {name} by budget, a line for each rule. The table below holds the same figures."
    return _curves(found, point, (low, high), "change of accuracy, points", label)


def found_plot(found: DrillDocument, figure: str) -> Markup:
    """How much of the poison suspicion finds, by budget.

    Args:
        figure: `average_precision` (dots are seeds), or `at_tenth`: recall when a tenth of the axis is looked at.
    """

    def point(cell: Cell) -> Point | None:
        ranked = ranking(cell, "suspicion")
        if ranked is None:
            return None
        if figure == "average_precision":
            value, spread = ranked.average_precision, ranked.by_seed
            tip = f"{_name(cell)}: average precision {percent(value)}, by chance {percent(cell.chance)}"
            return Point(100 * value, 100 * min(spread), 100 * max(spread), tip)
        value = next(at.recall for at in ranked.at if at.share == 0.1)
        return Point(100 * value, None, None, f"{_name(cell)}: {percent(value)} of the poison among the first tenth")

    chance: Callable[[Cell], float] = (lambda cell: 100 * cell.chance) if figure == "average_precision" else (lambda _: 10.0)
    words = "average precision, %" if figure == "average_precision" else "poison found in a tenth, %"
    label = f"Detection: {words} by budget, a line for each rule. The table below holds the same figures."
    return _curves(found, point, (0.0, 100.0), words, label, chance)


def ranking(cell: Cell, name: str) -> Ranked | None:
    """A ranking of a cell by its name; None where the audits had no such figure."""
    return next((one for one in cell.rankings if one.name == name), None)


def rules_of(found: DrillDocument) -> list[str]:
    """The rules, in the order of the document."""
    return [rule for rule, _ in groupby(cell.rule for cell in found.cells)]


def _curves(
    found: DrillDocument,
    point: Callable[[Cell], Point | None],
    reach: tuple[float, float],
    words: str,
    label: str,
    chance: Callable[[Cell], float] | None = None,
) -> Markup:
    """A line for each rule over budgets; with `chance`, a dashed line of it."""
    budgets = sorted({cell.budget for cell in found.cells})
    ordered = sorted(found.cells, key=lambda one: one.budget)
    by_chance = None if chance is None else {cell.budget: chance(cell) for cell in ordered}
    lines = [
        Series(f"drill-{rule}", {cell.budget: one for cell in found.cells if cell.rule == rule and (one := point(cell))})
        for rule in rules_of(found)
    ]
    return curves(Plane(budgets, reach, f"pairs flipped → {words}", label, by_chance), lines)


def _name(cell: Cell) -> str:
    return f"{RULE_WORDS[cell.rule]}, {100 * cell.budget:g} %"
