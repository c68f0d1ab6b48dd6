"""The curves of a drill as inline SVG: harm and detection against the budget, a line for each rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from safer_engine.report.model_drill import Cell, DrillDocument, Effect, Ranked
from safer_engine.report.plots import Frame
from safer_engine.report.svg import Scale, element, line, path, picture, text
from safer_engine.report.text import interval, percent, signed

RULE_WORDS = {
    "score": "highest pair score", "margin": "highest reward margin", "length": "longer by most", "random": "at random",
}  # fmt: skip
_WIDTH, _HEIGHT, _SPREAD = 480.0, 280.0, 7.0


@dataclass(frozen=True)
class Point:
    """A figure of a cell, with the ends of its interval or range where it has one, and what its tip says."""

    value: float
    lo: float | None
    hi: float | None
    tip: str


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
    """A line for each rule over budgets at even distances; with `chance`, a dashed line of it."""
    frame = Frame(48, 14, _WIDTH - 14, _HEIGHT - 44)
    budgets, rules = sorted({cell.budget for cell in found.cells}), rules_of(found)
    x = Scale(-0.5, len(budgets) - 0.5, frame.left, frame.right)
    y = Scale(*reach, frame.bottom, frame.top)
    parts = []
    for tick in y.ticks(5):
        parts.append(line(frame.left, y(tick), frame.right, y(tick), "zero" if tick == 0 else "grid"))
        parts.append(text(frame.left - 7, y(tick) + 4, f"{tick:g}".replace("-", "−"), anchor="end"))
    parts += [text(x(place), frame.bottom + 17, f"{100 * budget:g} %") for place, budget in enumerate(budgets)]
    parts.append(text((frame.left + frame.right) / 2, frame.bottom + 36, f"pairs flipped → {words}", "axis-name"))
    if chance is not None:
        by_budget = {cell.budget: chance(cell) for cell in found.cells}
        parts.append(path([(x(place), y(by_budget[budget])) for place, budget in enumerate(budgets)], "drill-chance"))
    for number, rule in enumerate(rules):
        aside = _SPREAD * (number - (len(rules) - 1) / 2)
        own = [(x(budgets.index(cell.budget)) + aside, one) for cell in found.cells if cell.rule == rule and (one := point(cell))]
        parts.append(path([(place, y(one.value)) for place, one in own], f"drill-line drill-{rule}"))
        for place, one in own:
            if one.lo is not None and one.hi is not None:
                low, high = (y(min(max(end, reach[0]), reach[1])) for end in (one.lo, one.hi))
                parts.append(line(place, low, place, high, f"drill-whisker drill-{rule}"))
            parts.append(element("circle", cx=place, cy=y(one.value), r=4.5, class_=f"dot drill-dot-{rule}", data_tip=one.tip))
    return picture(_WIDTH, _HEIGHT, label, parts)


def _name(cell: Cell) -> str:
    return f"{RULE_WORDS[cell.rule]}, {100 * cell.budget:g} %"
