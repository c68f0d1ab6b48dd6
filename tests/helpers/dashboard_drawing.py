"""Draws what the dashboard's queries returned, panel by panel in the dashboard's own grid, as one SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from typing import Any

from tests.helpers.prometheus import Series

WIDTH, ROW, GAP = 1500, 25, 5
_COLUMNS = 24
_PLOT = (66, 30, 14, 54)
"""Room left, above, right and below of a plot: the axis, the title, nothing, time and legend."""
_COLOURS = (
    "#73bf69",
    "#f2cc0c",
    "#5794f2",
    "#ff780a",
    "#f2495c",
    "#b877d9",
    "#37872d",
    "#fade2a",
    "#8ab8ff",
    "#ffb357",
    "#96d98d",
)
_LEGEND_CHARACTERS = 62
_INK, _FAINT, _BACK, _PANEL, _LINE = "#ccccdc", "#8e8e9a", "#111217", "#181b1f", "#2c3035"


@dataclass(frozen=True)
class Drawn:
    """One line of a panel: its name in the legend, and its points (seconds since the epoch, value)."""

    name: str
    points: tuple[tuple[float, float], ...]


def drawing(dashboard: Mapping[str, Any], answers: Mapping[str, Sequence[Drawn]], start: float, end: float) -> str:
    """The whole dashboard. `answers`: title of a panel → its lines, between two times in seconds since the epoch."""
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    parts = [
        _row(panel) if panel["type"] == "row" else _panel(panel, answers[panel["title"]], start, end)
        for panel in dashboard["panels"]
    ]
    height = bottom * ROW + GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    style = 'font-family="Inter, Helvetica, Arial, sans-serif" font-size="11"'
    return f"{head} {style}>{_box(0, 0, WIDTH, height, _BACK)}{''.join(parts)}</svg>\n"


def legend(template: str, labels: Mapping[str, str]) -> str:
    """A series' name: `{{label}}` filled in."""
    for name, value in labels.items():
        template = template.replace("{{" + name + "}}", value)
    return template


def lines(panel: Mapping[str, Any], found: Sequence[Sequence[Series]]) -> list[Drawn]:
    """The lines of a panel, from the answers to its queries."""
    pairs = zip(panel["targets"], found, strict=True)
    return [Drawn(legend(target["legendFormat"], series.labels), series.points) for target, some in pairs for series in some]


def _row(panel: Mapping[str, Any]) -> str:
    x, y, _, height = _place(panel)
    return _text(x + 2, y + height - 8, panel["title"], size=14, weight=600)


def _panel(panel: Mapping[str, Any], drawn: Sequence[Drawn], start: float, end: float) -> str:
    x, y, width, height = _place(panel)
    frame = _box(x, y, width, height, _PANEL, _LINE) + _text(x + 8, y + 18, panel["title"], size=12, weight=600)
    unit = panel["fieldConfig"]["defaults"]["unit"]
    shown = [each for each in drawn if each.points]
    if not shown:
        return frame + _text(x + width / 2, y + height / 2, "No data", anchor="middle", fill=_FAINT)
    if panel["type"] == "stat":
        return frame + _stats(shown, unit, (x, y, width, height))
    stacked = "stacking" in panel["fieldConfig"]["defaults"].get("custom", {})
    return frame + _plot(_stacked(shown) if stacked else shown, shown, unit, (x, y, width, height), (start, end), stacked)


def _stats(drawn: Sequence[Drawn], unit: str, place: tuple[float, float, float, float]) -> str:
    x, y, width, height = place
    each = width / len(drawn)
    parts = []
    for number, one in enumerate(drawn):
        middle = x + each * (number + 0.5)
        parts.append(
            _text(
                middle, y + height * 0.6, amount(one.points[-1][1], unit), size=34, weight=600, anchor="middle", fill=_COLOURS[0]
            )
        )
        parts.append(_text(middle, y + height * 0.82, one.name, anchor="middle", fill=_FAINT))
    return "".join(parts)


def _stacked(drawn: Sequence[Drawn]) -> list[Drawn]:
    sums: dict[float, float] = {}
    found = []
    for each in drawn:
        for at, value in each.points:
            sums[at] = sums.get(at, 0.0) + value
        found.append(Drawn(each.name, tuple((at, sums[at]) for at, _ in each.points)))
    return found


def _plot(
    curves: Sequence[Drawn], named: Sequence[Drawn], unit: str, place: tuple[float, float, float, float],
    span: tuple[float, float], filled: bool,
) -> str:  # fmt: skip
    x, y, width, height = place
    left, top, right, below = _PLOT
    highest = max((value for each in curves for _, value in each.points), default=0.0)
    step = _step(highest or 1.0)
    ceiling = step * max(1, math.ceil(highest / step - 1e-9))
    across = _scale(span, (x + left, x + width - right))
    up = _scale((0.0, ceiling), (y + height - below, y + top))
    parts = [_grid(x, width, unit, step, ceiling, up), _times(span, across, y + height - below + 14)]
    for number, each in reversed(list(enumerate(curves))):
        points = " ".join(f"{across(at):.1f},{up(value):.1f}" for at, value in each.points)
        colour = _COLOURS[number % len(_COLOURS)]
        if filled:
            first, last = across(each.points[0][0]), across(each.points[-1][0])
            area = f'<polygon points="{first:.1f},{up(0):.1f} {points} {last:.1f},{up(0):.1f}"'
            parts += [f'{area} fill="{_PANEL}"/>', f'{area} fill="{colour}" fill-opacity="0.25"/>']
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.4"/>')
    return "".join(parts) + _legend(named, x + left, y + height - 20, width - left - right)


def _legend(drawn: Sequence[Drawn], x: float, y: float, width: float) -> str:
    parts, at, line = [], x, 0
    for number, each in enumerate(drawn):
        name = each.name[:_LEGEND_CHARACTERS]
        needed = 22 + 5.9 * len(name)
        if at + needed > x + width and at > x:
            at, line = x, line + 1
        if line > 1:
            break
        colour = _COLOURS[number % len(_COLOURS)]
        parts.append(_box(at, y + 13 * line - 5, 10, 3, colour) + _text(at + 14, y + 13 * line, name, fill=_INK))
        at += needed
    return "".join(parts)


def _grid(x: float, width: float, unit: str, step: float, ceiling: float, up: Callable[[float], float]) -> str:
    left, _, right, _ = _PLOT
    parts = []
    for number in range(round(ceiling / step) + 1):
        height = up(step * number)
        parts.append(f'<path d="M{x + left} {height:.1f}H{x + width - right:.1f}" stroke="{_LINE}"/>')
        parts.append(_text(x + left - 6, height + 4, amount(step * number, unit), anchor="end", fill=_FAINT))
    return "".join(parts)


def _times(span: tuple[float, float], across: Callable[[float], float], y: float) -> str:
    start, end = span
    minutes = max(1, math.ceil((end - start) / 60 / 5))
    first = math.ceil(start / 60 / minutes) * 60 * minutes
    times = range(first, int(end) + 1, 60 * minutes)
    return "".join(_text(across(at), y, f"{datetime.fromtimestamp(at, UTC):%H:%M}", anchor="middle", fill=_FAINT) for at in times)


def _step(highest: float) -> float:
    power = 10.0 ** math.floor(math.log10(highest / 4))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if highest <= 4 * power * factor + 1e-12)


def _scale(source: tuple[float, float], target: tuple[float, float]) -> Callable[[float], float]:
    (low, high), (first, last) = source, target
    return lambda value: first + (value - low) / ((high - low) or 1.0) * (last - first)


def amount(value: float, unit: str) -> str:
    """A value in a unit of Grafana's."""
    if unit == "percentunit":
        return f"{_plain(100 * value)} %"
    if unit == "s":
        factor, name = next(
            (f, n) for f, n in ((3600, "h"), (60, "min"), (1, "s"), (0.001, "ms"), (1e-9, "ms")) if abs(value) >= f or f == 1e-9
        )
        return f"{_plain(value / (0.001 if name == 'ms' else factor))} {name}" if value else "0 s"
    if unit in ("bytes", "Bps"):
        power = min(int(math.log(abs(value), 1024)), 4) if abs(value) >= 1 else 0
        return f"{_plain(value / 1024**power)} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}{'/s' if unit == 'Bps' else ''}"
    power = min(int(math.log10(abs(value))) // 3, 3) if abs(value) >= 1000 else 0
    return f"{_plain(value / 1000**power)}{('', ' K', ' Mil', ' Bil')[power]}{' req/s' if unit == 'reqps' else ''}"


def _plain(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _place(panel: Mapping[str, Any]) -> tuple[float, float, float, float]:
    grid, column = panel["gridPos"], (WIDTH - GAP) / _COLUMNS
    return GAP + grid["x"] * column, GAP + grid["y"] * ROW, grid["w"] * column - GAP, grid["h"] * ROW - GAP


def _box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}" stroke="{stroke}"/>'


def _text(x: float, y: float, text: str, *, size: int = 11, weight: int = 400, anchor: str = "start", fill: str = _INK) -> str:
    about = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{fill}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {about}>{escape(text)}</text>'
