"""Pieces of SVG: escaped elements, scales and axes. Colours come from the page's style sheet, by class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from safer_engine.report.text import visible

Attribute = str | float | int | None


def element(tag: str, children: Sequence[Markup | str] = (), **attributes: Attribute) -> Markup:
    """An element; attribute values and text are escaped. `class_` is class, other underscores become hyphens."""
    parts = [f"<{tag}"]
    for name, value in attributes.items():
        if value is not None:
            shown = f"{value:.6g}" if isinstance(value, float) else value
            parts.append(f' {_name(name)}="{escape(shown)}"')
    inner = "".join(child if isinstance(child, Markup) else str(escape(visible(child))) for child in children)
    return Markup("".join(parts) + (f">{inner}</{tag}>" if inner else "/>"))  # noqa: S704 (every part was escaped)


def _name(name: str) -> str:
    return {"class_": "class", "viewBox": "viewBox"}.get(name, name.replace("_", "-"))


def picture(width: float, height: float, label: str, children: Sequence[Markup], class_: str = "plot") -> Markup:
    """The outermost element. `label` says in words what the picture shows."""
    return element("svg", children, viewBox=f"0 0 {width:g} {height:g}", class_=class_, **_described(label))


def _described(label: str) -> dict[str, Attribute]:
    """A picture without a description repeats figures beside it: screen readers skip it."""
    return {"role": "img", "aria_label": visible(label)} if label else {"aria_hidden": "true"}


@dataclass(frozen=True)
class Scale:
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Pixel of a value, to a tenth."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, about: int = 5) -> list[float]:
        """Round values within the scale."""
        step = _round_step((self.high - self.low) / max(1, about))
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 10) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)


def text(x: float, y: float, content: str, class_: str = "tick", anchor: str = "middle") -> Markup:
    """A line of text."""
    return element("text", [content], x=x, y=y, class_=class_, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def rect(x: float, y: float, width: float, height: float, class_: str, tip: str | None = None) -> Markup:
    """A rectangle with an optional tooltip."""
    shown = None if tip is None else visible(tip)
    return element("rect", x=x, y=y, width=max(0.0, width), height=max(0.0, height), class_=class_, data_tip=shown)


def path(points: Sequence[tuple[float, float]], class_: str, close_at: float | None = None) -> Markup:
    """A line through points; with `close_at`, an area down to that height."""
    if not points:
        return Markup("")
    steps = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
    if close_at is not None:
        steps += f"L{points[-1][0]:g} {close_at:g}L{points[0][0]:g} {close_at:g}Z"
    return element("path", d=steps, class_=class_)


def power_of_ten(exponent: float) -> str:
    """10ⁿ in words of a tick label."""
    digits = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return "1" if exponent == 0 else "10" + str(round(exponent)).translate(digits)
