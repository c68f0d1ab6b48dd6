"""Plots of a comparison: what changed by slice, and how latents of the shared SAE moved. Pure: values in, markup out."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from safer_engine.comparison.model import LatentDrift, SliceComparison
from safer_engine.comparison.words import points, slice_name
from safer_engine.report.plots import Frame
from safer_engine.report.svg import Scale, element, line, picture, text
from safer_engine.report.text import count, percent, signed, visible

_ROW = 30.0


def changes_plot(rows: Sequence[SliceComparison], *, narrow: bool) -> Markup:
    """A row for each slice: B's accuracy less A's, in points, with its interval."""
    width, left = (380.0, 130.0) if narrow else (1040.0, 240.0)
    frame = Frame(left, 10, width - 16, 10 + _ROW * len(rows))
    figures = [row.accuracy_change for row in rows]
    reach = max([0.01, *(abs(end) for one in figures for end in (one.estimate, one.lo, one.hi) if end is not None)])
    x = Scale(-min(1.0, reach * 1.05), min(1.0, reach * 1.05), frame.left, frame.right)
    parts = []
    for tick in x.ticks(4 if narrow else 8):
        parts.append(line(x(tick), frame.top, x(tick), frame.bottom, "zero" if tick == 0 else "grid"))
        parts.append(text(x(tick), frame.bottom + 18, f"{100 * tick:+.3g}".replace("-", "−") if tick else "0"))
    parts.append(text((frame.left + frame.right) / 2, frame.bottom + 36, "change of pair accuracy, points", "axis-name"))
    for place, row in enumerate(rows):
        middle, figure = frame.top + _ROW * (place + 0.5), row.accuracy_change
        parts.append(text(frame.left - 10, middle + 4, _clipped(slice_name(row), 18 if narrow else 34), anchor="end"))
        if figure.lo is not None and figure.hi is not None:
            parts.append(line(x(max(figure.lo, x.low)), middle, x(min(figure.hi, x.high)), middle, "whisker"))
        tip = (
            f"{slice_name(row)}\n{percent(row.accuracy_a)} → {percent(row.accuracy_b)}: {points(figure)} points\n"
            f"right → wrong {count(row.right_to_wrong)}, wrong → right {count(row.wrong_to_right)}, of {count(row.n)}"
        )
        kind = "chosen-dot" if figure.estimate >= 0 else "rejected-dot"
        parts.append(element("circle", cx=x(figure.estimate), cy=middle, r=5, class_=f"dot {kind}", data_tip=visible(tip)))
    label = f"Change of pair accuracy from A to B in {len(rows)} slices. The table below holds the same figures."
    return picture(width, frame.bottom + 42, label, parts, "plot narrow-only" if narrow else "plot wide-only")


def drift_plot(latents: Sequence[LatentDrift], *, narrow: bool) -> Markup:
    """A dot for each latent: its salience in A across, in B upwards; safety features of either in colour."""
    width, height = (380.0, 380.0) if narrow else (1040.0, 470.0)
    frame = Frame(52, 14, width - 14, height - 44)
    known = [one for one in latents if one.a.salience is not None and one.b.salience is not None]
    reach = max([0.05, *(abs(value) for one in known for value in (one.a.salience, one.b.salience) if value is not None)]) * 1.05
    x, y = Scale(-reach, reach, frame.left, frame.right), Scale(-reach, reach, frame.bottom, frame.top)
    parts = []
    for tick in x.ticks(4 if narrow else 6):
        shown = f"{tick:g}".replace("-", "−")
        kind = "zero" if tick == 0 else "grid"
        parts += [line(x(tick), frame.top, x(tick), frame.bottom, kind), text(x(tick), frame.bottom + 18, shown)]
        parts += [line(frame.left, y(tick), frame.right, y(tick), kind), text(frame.left - 8, y(tick) + 4, shown, anchor="end")]
    parts.append(line(x(-reach), y(-reach), x(reach), y(reach), "axis"))
    parts.append(text((frame.left + frame.right) / 2, frame.bottom + 36, "salience in A", "axis-name"))
    parts.append(text(frame.left + 8, frame.top + 14, "▲ salience in B", "corner", "start"))
    for one in sorted(known, key=_marked):
        parts.append(_dot(one, x, y))
    label = f"Scatter plot of the salience of {len(known)} latents in A and in B; on the line nothing changed."
    return picture(width, height, label, parts, "plot narrow-only" if narrow else "plot wide-only")


def _marked(one: LatentDrift) -> bool:
    return bool(one.a.safety_feature or one.b.safety_feature)


def _dot(one: LatentDrift, x: Scale, y: Scale) -> Markup:
    tip = f"#{one.latent_id} {one.name}\nsalience {signed(one.a.salience)} → {signed(one.b.salience)}"
    kind = ("chosen-dot" if (one.a.salience or 0) >= 0 else "rejected-dot") if _marked(one) else "candidate-dot"
    return element(
        "circle", cx=x(one.a.salience or 0), cy=y(one.b.salience or 0), r=5.5 if _marked(one) else 3,
        class_=f"dot {kind}", data_tip=visible(tip),
    )  # fmt: skip


def _clipped(name: str, limit: int) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"
