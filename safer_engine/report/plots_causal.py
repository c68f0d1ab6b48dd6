"""Salience against causal effect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from safer_engine.report.harsh import mild_name
from safer_engine.report.model import Feature
from safer_engine.report.model_causal import SAFETY_SET, CausalReport, SetAblation
from safer_engine.report.plots import Frame
from safer_engine.report.svg import Scale, element, line, picture, text
from safer_engine.report.text import signed

_ROOM = 6.0
"""Largest effect that the upward scale has room for, times the largest there is: names of the directions stand beyond it."""


def disagreements_first(features: Sequence[Feature]) -> list[Feature]:
    """Ablated features: verified ones without which the margin grows, the other verified ones, the rest; larger effects first."""
    measured = [(f, f.causal_effect, f.causal_verified == "yes") for f in features if f.causal_effect is not None]
    return [f for f, _, _ in sorted(measured, key=lambda row: (not row[2], row[2] and row[1] <= 0, -abs(row[1])))]


def causal_plot(features: Sequence[Feature], carded: frozenset[int], *, narrow: bool) -> Markup:
    """A dot for each ablated feature: salience across, change of the margin upwards; verified ones in the colour of their side.

    The upward scale is asinh(change / (largest / 1000)): linear next to 0, logarithmic beyond.
    """
    points = [(f, f.causal_effect) for f in features if f.causal_effect is not None]
    width, height = (380.0, 420.0) if narrow else (1040.0, 420.0)
    frame = Frame(64, 16, width - 12, height - 42)
    reach = max((abs(f.salience) for f, _ in points), default=0.0) * 1.1 or 1.0
    largest = max((abs(effect) for _, effect in points), default=0.0) or 1.0
    x = Scale(-reach, reach, frame.left, frame.right)
    y = Scale(-_bent(_ROOM), _bent(_ROOM), frame.bottom, frame.top)
    parts = _axes(x, y, frame, largest)
    parts += [_dot(f, effect, x(f.salience), y(_bent(effect / largest)), f.latent_id in carded) for f, effect in points[::-1]]
    label = f"Scatter plot: {len(points)} features by salience and causal effect. The table below holds the same figures."
    return picture(width, height, label, parts, "plot narrow-only" if narrow else "plot wide-only")


def _bent(share: float) -> float:
    return math.asinh(1000 * share)


def _axes(x: Scale, y: Scale, frame: Frame, largest: float) -> list[Markup]:
    decade = math.floor(math.log10(largest))
    sizes = [10.0**power for power in range(decade, decade - 3, -1)]
    parts = []
    for tick in [*(-size for size in sizes), 0.0, *sizes]:
        at = y(_bent(tick / largest))
        parts.append(line(frame.left, at, frame.right, at, "zero" if tick == 0 else "grid"))
        parts.append(text(frame.left - 8, at + 4, f"{tick:+.3g}".replace("-", "−") if tick else "0", anchor="end"))
    for tick in x.ticks(6):
        parts.append(line(x(tick), frame.bottom, x(tick), frame.bottom + 4, "axis"))
        parts.append(text(x(tick), frame.bottom + 18, f"{tick:+.3g}".replace("-", "−") if tick else "0"))
    parts.append(text((frame.left + frame.right) / 2, frame.bottom + 36, "salience", "axis-name"))
    parts.append(text(frame.left + 8, frame.top + 12, "▲ margin grows without it", "corner", "start"))
    parts.append(text(frame.left + 8, frame.bottom - 8, "▼ margin falls without it", "corner", "start"))
    return parts


def _dot(feature: Feature, effect: float, across: float, up: float, linked: bool) -> Markup:
    verified = feature.causal_verified == "yes"
    tip = (
        f"#{feature.latent_id} {mild_name(feature)}\n"
        f"salience {signed(feature.salience)}, change of margin {signed(effect, 4)}, verified: {feature.causal_verified}"
    )
    kind = f"{feature.fires_on}-dot" if verified else "candidate-dot"
    dot = element("circle", cx=across, cy=up, r=5 if verified else 3, class_=f"dot {kind}", data_tip=tip)
    if not linked:
        return dot
    return element("a", [dot], href=f"#latent-{feature.latent_id}", aria_label=f"Latent {feature.latent_id}", tabindex="-1")


@dataclass(frozen=True)
class SetRow:
    """A slice of the pairs with the safety features ablated, and the same under each set of controls."""

    safety: SetAblation
    controls: list[SetAblation]


def sets_ablated(causal: CausalReport) -> list[SetRow]:
    """The safety features' rows in order, with the controls' of the same axis and subset."""
    controls: dict[tuple[str | None, str | None], list[SetAblation]] = {}
    for row in causal.sets:
        if row.name != SAFETY_SET:
            controls.setdefault((row.axis, row.subset), []).append(row)
    return [SetRow(row, controls.get((row.axis, row.subset), [])) for row in causal.sets if row.name == SAFETY_SET]


IN_TEMPLATES = {"causal_plot": causal_plot, "disagreements_first": disagreements_first, "sets_ablated": sets_ablated}
