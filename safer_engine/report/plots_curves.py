"""Lines of figures over budgets, as inline SVG: what a drill and a sweep of budgets draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from safer_engine.report.plots import Frame
from safer_engine.report.svg import Scale, element, line, path, picture, text

_WIDTH, _HEIGHT, _SPREAD = 480.0, 280.0, 7.0


@dataclass(frozen=True)
class Point:
    """A figure, with the ends of its interval or range where it has one, and what its tip says."""

    value: float
    lo: float | None
    hi: float | None
    tip: str


@dataclass(frozen=True)
class Series:
    """A line: `name` is its class in the style sheet (`NAME`, and `dot-NAME` of its points); a point by budget."""

    name: str
    points: dict[float, Point]


@dataclass(frozen=True)
class Plane:
    """What lines are drawn on.

    Attributes:
        budgets: shares, ascending; drawn at even distances.
        reach: ends of the vertical scale.
        words: name of the axes.
        label: what the picture shows, in words.
        chance: a dashed line by budget; None: no such line.
    """

    budgets: Sequence[float]
    reach: tuple[float, float]
    words: str
    label: str
    chance: dict[float, float] | None = None


def curves(plane: Plane, lines: Sequence[Series]) -> Markup:
    """A line for each series, its points a little aside from those of the others."""
    frame = Frame(48, 14, _WIDTH - 14, _HEIGHT - 44)
    place = {budget: at for at, budget in enumerate(plane.budgets)}
    x = Scale(-0.5, len(place) - 0.5, frame.left, frame.right)
    y = Scale(*plane.reach, frame.bottom, frame.top)
    parts = []
    for tick in y.ticks(5):
        parts.append(line(frame.left, y(tick), frame.right, y(tick), "zero" if tick == 0 else "grid"))
        parts.append(text(frame.left - 7, y(tick) + 4, f"{tick:g}".replace("-", "−"), anchor="end"))
    parts += [text(x(at), frame.bottom + 17, f"{100 * budget:g} %") for budget, at in place.items()]
    parts.append(text((frame.left + frame.right) / 2, frame.bottom + 36, plane.words, "axis-name"))
    if plane.chance is not None:
        parts.append(path([(x(place[budget]), y(value)) for budget, value in plane.chance.items()], "curve-chance"))
    for number, one in enumerate(lines):
        aside = _SPREAD * (number - (len(lines) - 1) / 2)
        own = [(x(place[budget]) + aside, point) for budget, point in sorted(one.points.items())]
        parts.append(path([(at, y(point.value)) for at, point in own], f"curve-line {one.name}"))
        for at, point in own:
            if point.lo is not None and point.hi is not None:
                low, high = (y(min(max(end, plane.reach[0]), plane.reach[1])) for end in (point.lo, point.hi))
                parts.append(line(at, low, at, high, f"curve-whisker {one.name}"))
            parts.append(element("circle", cx=at, cy=y(point.value), r=4.5, class_=f"dot dot-{one.name}", data_tip=point.tip))
    return picture(_WIDTH, _HEIGHT, plane.label, parts)
