"""Salience against causal effect."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from safer_engine.report.model import Feature
from safer_engine.report.svg import Scale, element, line, picture, text

_WIDTH, _HEIGHT = 520.0, 360.0
_LEFT, _TOP, _RIGHT, _BOTTOM = 70.0, 16.0, 508.0, 310.0


def causal_plot(features: Sequence[Feature]) -> Markup:
    """A dot for each ablated feature: salience across, change of the margin when it is ablated upwards."""
    points = [(f, f.salience, f.causal_effect) for f in features if f.causal_effect is not None]
    wide = max((abs(salience) for _, salience, _ in points), default=0.0) * 1.1 or 1.0
    high = max((abs(effect) for _, _, effect in points), default=0.0) * 1.1 or 1.0
    x, y = Scale(-wide, wide, _LEFT, _RIGHT), Scale(-high, high, _BOTTOM, _TOP)
    parts = []
    for tick in y.ticks(5):
        parts.append(line(_LEFT, y(tick), _RIGHT, y(tick), "zero" if tick == 0 else "grid"))
        parts.append(text(_LEFT - 8, y(tick) + 4, f"{tick:.3g}".replace("-", "−"), anchor="end"))
    for tick in x.ticks(5):
        parts.append(line(x(tick), _TOP, x(tick), _BOTTOM, "zero" if tick == 0 else "grid"))
        parts.append(text(x(tick), _BOTTOM + 18, f"{tick:.3g}".replace("-", "−")))
    parts.append(text((_LEFT + _RIGHT) / 2, _BOTTOM + 38, "salience", "axis-name"))
    parts.append(text(_LEFT + 8, _TOP + 12, "▲ margin grows when ablated", "corner", "start"))
    for feature, salience, effect in points:
        kind = "dot safety" if feature.safety_feature else "dot"
        tip = f"latent {feature.latent_id}: salience {salience:+.3f}, change of margin {effect:+.4f}"
        parts.append(
            element("circle", [element("title", [tip])], cx=round(x(salience), 1), cy=round(y(effect), 1), r=4, class_=kind)
        )
    label = f"Scatter plot: {len(points)} features by salience and causal effect. The table below holds the same figures."
    return picture(_WIDTH, _HEIGHT, label, parts)
