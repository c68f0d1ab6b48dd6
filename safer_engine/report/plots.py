"""The report's plots as inline SVG: salience of all latents, SAE quality, margins, intervals. Pure: values in, markup out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from safer_engine.report.harsh import mild_name
from safer_engine.report.model import Estimate, Feature, Histogram
from safer_engine.report.model_plots import Curve, Overview
from safer_engine.report.svg import Scale, element, line, path, picture, power_of_ten, rect, text
from safer_engine.report.text import count, number, percent, signed, small_percent

_DENSITY_LEVELS = 5
_MAX_LABELS = 9
_SMALL_WIDTH, _SMALL_HEIGHT = 360.0, 210.0


@dataclass(frozen=True)
class Frame:
    """The inner rectangle of a plot, in pixels."""

    left: float
    top: float
    right: float
    bottom: float


def salience_plot(overview: Overview, features: Sequence[Feature], carded: frozenset[int], *, narrow: bool) -> Markup:
    """Every latent by firing rate and salience: a density of all, a dot for each candidate, safety features named.

    Args:
        carded: latents that have a card on the page, which their dots link to.
        narrow: for a phone: taller, without names.
    """
    width, height = (380.0, 420.0) if narrow else (1040.0, 470.0)
    frame = Frame(46, 16, width - 12, height - 42)
    x = Scale(overview.log10_rate_edges[0], overview.log10_rate_edges[-1], frame.left, frame.right)
    y = Scale(overview.salience_edges[0], overview.salience_edges[-1], frame.bottom, frame.top)
    dots = [_dot(feature, x, y, feature.latent_id in carded) for feature in _back_to_front(features)]
    names = [] if narrow else _names(features, x, y, frame)
    label = (
        f"Scatter plot: {count(sum(map(sum, overview.counts)))} latents by firing rate and salience, "
        f"{len(features)} candidates as dots. The table of candidates holds the same figures."
    )
    parts = [*_salience_axes(x, y, frame), _density_cells(overview, x, y), *dots, *names]
    return picture(width, height, label, parts, "plot narrow-only" if narrow else "plot wide-only")


def _back_to_front(features: Sequence[Feature]) -> list[Feature]:
    return sorted(features, key=lambda f: (bool(f.safety_feature), -f.rank))


def _salience_axes(x: Scale, y: Scale, frame: Frame) -> list[Markup]:
    parts = []
    for tick in y.ticks(6):
        parts.append(line(frame.left, y(tick), frame.right, y(tick), "zero" if tick == 0 else "grid"))
        parts.append(text(frame.left - 8, y(tick) + 4, f"{tick:g}".replace("-", "−"), anchor="end"))
    for tick in range(math.ceil(x.low - 1e-9), math.floor(x.high + 1e-9) + 1):
        parts.append(text(x(tick), frame.bottom + 18, power_of_ten(tick)))
        parts.append(line(x(tick), frame.bottom, x(tick), frame.bottom + 4, "axis"))
    parts.append(text((frame.left + frame.right) / 2, frame.bottom + 36, "share of positions where it fires", "axis-name"))
    parts.append(text(frame.left + 8, frame.top + 12, "▲ fires more on chosen responses", "corner chosen-ink", "start"))
    parts.append(text(frame.left + 8, frame.bottom - 8, "▼ fires more on rejected responses", "corner rejected-ink", "start"))
    return parts


def _density_cells(overview: Overview, x: Scale, y: Scale) -> Markup:
    """One path for each of a few shades: all latents, however many, in bounded space."""
    peak = max((n for row in overview.counts for n in row), default=0)
    cells: dict[int, list[str]] = {}
    for i, row in enumerate(overview.counts):
        left, right = x(overview.log10_rate_edges[i]), x(overview.log10_rate_edges[i + 1])
        for j, n in enumerate(row):
            if n:
                level = 1 + int((_DENSITY_LEVELS - 1) * math.log(n) / math.log(max(peak, 2)))
                low, high = y(overview.salience_edges[j]), y(overview.salience_edges[j + 1])
                cells.setdefault(level, []).append(f"M{left:g} {high:g}H{right:g}V{low:g}H{left:g}Z")
    shades = [element("path", d="".join(parts), class_=f"cell cell-{level}") for level, parts in sorted(cells.items())]
    return element("g", shades)


def _dot(feature: Feature, x: Scale, y: Scale, linked: bool) -> Markup:
    height = min(max(feature.salience, min(y.low, y.high)), max(y.low, y.high))
    kind = f"{feature.fires_on}-dot" if feature.safety_feature else "candidate-dot"
    tip = (
        f"#{feature.latent_id} {mild_name(feature)}\n"
        f"salience {signed(feature.salience)}, fires at {small_percent(feature.firing_rate)} of positions"
    )
    dot = element(
        "circle",
        cx=x(math.log10(max(feature.firing_rate, 10**x.low))),
        cy=y(height),
        r=5.5 if feature.safety_feature else 3,
        class_=f"dot {kind}",
        data_tip=tip,
    )
    if not linked:
        return dot
    name = f"Latent {feature.latent_id}: {mild_name(feature)}"
    stop = None if feature.safety_feature else "-1"
    return element("a", [dot], href=f"#latent-{feature.latent_id}", aria_label=name, tabindex=stop)


def _names(features: Sequence[Feature], x: Scale, y: Scale, frame: Frame) -> list[Markup]:
    """Names of safety features beside their dots, as long as they do not cover one another."""
    taken: list[tuple[float, float, float]] = []
    parts: list[Markup] = []
    for feature in [f for f in features if f.safety_feature and f.firing_rate > 0]:
        name = mild_name(feature, 34) or f"#{feature.latent_id}"
        width = 6.3 * len(name)
        height = y(feature.salience) + 4
        dot = x(math.log10(feature.firing_rate))
        to_right = dot + 12 + width < frame.right
        start = dot + 11 if to_right else dot - 11 - width
        free = all(abs(height - other) > 15 or start > right or start + width < left for left, right, other in taken)
        cornered = start < frame.left + 240 and not frame.top + 22 < height < frame.bottom - 18
        if free and not cornered and start > frame.left and len(parts) < _MAX_LABELS:
            taken.append((start, start + width, height))
            parts.append(text(dot + (11 if to_right else -11), height, name, "dot-name", "start" if to_right else "end"))
    return parts


def curve_plot(curve: Curve) -> Markup:
    """Training loss against positions seen."""
    frame = Frame(44, 12, _SMALL_WIDTH - 12, _SMALL_HEIGHT - 38)
    high = max(curve.loss)
    x = Scale(0, max(curve.positions[-1], 1), frame.left, frame.right)
    y = Scale(0, high * 1.05 if high > 0 else 1, frame.bottom, frame.top)
    points = [(x(p), y(v)) for p, v in zip(curve.positions, curve.loss, strict=True)]
    parts = [*_grid(y, frame), path(points, "area", frame.bottom), path(points, "curve")]
    parts.append(element("circle", cx=points[-1][0], cy=points[-1][1], r=3.5, class_="curve-end"))
    parts.append(text(points[-1][0], points[-1][1] - 9, number(curve.loss[-1], 3), "value", "end"))
    parts += [text(x(tick), frame.bottom + 16, _short(tick)) for tick in x.ticks(4)]
    parts.append(text((frame.left + frame.right) / 2, frame.bottom + 33, "positions seen", "axis-name"))
    label = f"Training loss falls from {number(curve.loss[0], 3)} to {number(curve.loss[-1], 3)}"
    return picture(_SMALL_WIDTH, _SMALL_HEIGHT, label, parts)


def _grid(y: Scale, frame: Frame) -> list[Markup]:
    parts = []
    for tick in y.ticks(4):
        parts.append(line(frame.left, y(tick), frame.right, y(tick), "grid"))
        parts.append(text(frame.left - 7, y(tick) + 4, _short(tick), anchor="end"))
    return parts


def _short(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}".replace("-", "−")


def density_plot(density: Histogram) -> Markup:
    """How many latents fire how often; silent ones at the left end."""
    frame = Frame(44, 12, _SMALL_WIDTH - 12, _SMALL_HEIGHT - 38)
    x = Scale(density.edges[0], density.edges[-1], frame.left, frame.right)
    y = Scale(0, max([*density.counts, 1]) * 1.05, frame.bottom, frame.top)
    parts = _grid(y, frame)
    for i, n in enumerate(density.counts):
        left, right = x(density.edges[i]), x(density.edges[i + 1])
        tip = f"{count(n)} latents, {power_of_ten(density.edges[i])} or less" if i == 0 else f"{count(n)} latents"
        if n:
            parts.append(rect(left + 0.5, y(n), right - left - 1, frame.bottom - y(n), "bar dead-bar" if i == 0 else "bar", tip))
    parts += [text(x(tick), frame.bottom + 16, power_of_ten(tick)) for tick in range(math.ceil(x.low), math.floor(x.high) + 1)]
    parts.append(
        text((frame.left + frame.right) / 2, frame.bottom + 33, "firing rate (silent ones at the left end)", "axis-name")
    )
    return picture(_SMALL_WIDTH, _SMALL_HEIGHT, f"Histogram of {count(sum(density.counts))} latents by firing rate", parts)


@dataclass(frozen=True)
class Bar:
    """A named share, and what it is to be compared with."""

    name: str
    value: float
    reference: float | None = None
    floor: float | None = None


def bars_plot(bars: Sequence[Bar], label: str) -> Markup:
    """Horizontal bars of shares in [0, 1], reference (tick) and floor (dashed) marked; a negative share is an empty bar."""
    row = 38.0
    height = max(_SMALL_HEIGHT, 20 + row * len(bars))
    x = Scale(0, 1, 0, _SMALL_WIDTH - 62)
    parts = []
    for i, bar in enumerate(bars):
        top = 10 + row * i
        parts.append(text(0, top + 10, bar.name, "bar-name", "start"))
        parts.append(rect(0, top + 16, x.end, 11, "bar-track"))
        parts.append(rect(0, top + 16, x(min(1.0, max(0.0, bar.value))), 11, "bar", f"{bar.name}: {percent(bar.value)}"))
        if bar.reference is not None:
            at = x(min(1.0, max(0.0, bar.reference)))
            parts.append(line(at, top + 13, at, top + 30, "reference"))
        if bar.floor is not None:
            parts.append(line(x(bar.floor), top + 11, x(bar.floor), top + 32, "floor"))
        parts.append(text(_SMALL_WIDTH - 4, top + 26, percent(bar.value), "value", "end"))
    return picture(_SMALL_WIDTH, height, label, parts)


def margin_plot(histogram: Histogram, label: str) -> Markup:
    """Distribution of reward margins; what lies left of zero disagrees with the label."""
    width, height = 320.0, 132.0
    frame = Frame(6, 8, width - 6, height - 22)
    x = Scale(histogram.edges[0], histogram.edges[-1], frame.left, frame.right)
    y = Scale(0, max([*histogram.counts, 1]) * 1.04, frame.bottom, frame.top)
    parts: list[Markup] = []
    for i, n in enumerate(histogram.counts):
        low, high = histogram.edges[i], histogram.edges[i + 1]
        side = "against-bar" if (low + high) / 2 < 0 else "for-bar"
        if n:
            tip = f"{count(n)} pairs, margin {signed(low, 2)} to {signed(high, 2)}"
            parts.append(rect(x(low) + 0.5, y(n), x(high) - x(low) - 1, frame.bottom - y(n), side, tip))
    parts.append(line(frame.left, frame.bottom, frame.right, frame.bottom, "axis"))
    parts.append(line(x(0), frame.top, x(0), frame.bottom + 4, "zero"))
    parts += [text(x(tick), height - 6, _short(tick)) for tick in x.ticks(5)]
    return picture(width, height, label, parts)


def interval_plot(estimate: Estimate, scale: tuple[float, float], mark: float) -> Markup:
    """An estimate with its interval on a common scale, `mark` being the value of no effect."""
    width, height = 132.0, 18.0
    x = Scale(min(scale[0], mark), max(scale[1], mark), 5, width - 5)
    parts = [line(x(mark), 2, x(mark), height - 2, "mark")]
    if estimate.lo is not None and estimate.hi is not None:
        parts.append(line(x(estimate.lo), height / 2, x(estimate.hi), height / 2, "whisker"))
    parts.append(element("circle", cx=x(estimate.estimate), cy=height / 2, r=3.6, class_="estimate"))
    return picture(width, height, "", parts, "spark")


def salience_spark(salience: float, lo: float | None, hi: float | None, reach: float) -> Markup:
    """A salience with its interval as a bar from zero, on a scale of ± `reach`."""
    width, height = 132.0, 14.0
    x = Scale(-reach, reach, 2, width - 2)
    left, right = sorted((x(0), x(max(-reach, min(reach, salience)))))
    parts = [rect(left, 4, right - left, 6, "chosen-bar" if salience >= 0 else "rejected-bar")]
    if lo is not None and hi is not None:
        parts.append(line(x(max(-reach, lo)), 7, x(min(reach, hi)), 7, "whisker"))
    parts.append(line(x(0), 0, x(0), height, "mark"))
    return picture(width, height, "", parts, "spark")
