"""What retraining with the edits changed, by subset, beside the controls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from safer_engine.report.model_verification import ArmEffect, HeldOutEffect, ShapeReport, VerificationReport
from safer_engine.report.plots import Frame
from safer_engine.report.svg import Scale, element, line, picture, text
from safer_engine.report.text import interval, percent, signed

AS_GIVEN, OURS = "as given", "edits"
ARM_NAMES = {OURS: "our edits", "margin": "as many by margin", "random": "as many at random"}
_ROW, _ARM = 62.0, 15.0
_SENTENCES = {
    "benefit shown": "The edits help: on the edited axes models trained with them are more often right than models of the data "
    "as given, and than models with as many random edits.",
    "no benefit shown": "No benefit was shown: the tests do not tell the edits from the data as given, or not from as many "
    "random ones. The intervals say how large a benefit could still be there.",
    "harm shown": "The edits do harm: on at least one subset models trained with them are less often right.",
    "inconclusive": "Nothing can be said yet: there were too few trainings.",
}  # fmt: skip


@dataclass(frozen=True)
class ScopeRow:
    """A slice of the evaluation pairs: each arm's difference from the data as given, our edits first."""

    axis: str | None
    subset: str | None
    effects: list[ArmEffect]

    @property
    def name(self) -> str:
        """What the slice is called."""
        return "all" if self.axis is None else self.axis if self.subset is None else f"{self.axis}: {self.subset}"


def scopes(found: VerificationReport) -> list[ScopeRow]:
    """All slices in the report's order, with what was compared with the data as given; the only subset of an axis is the axis."""
    return scopes_of(found.effects)


def scopes_of(every: Sequence[ArmEffect]) -> list[ScopeRow]:
    """The same of some effects."""
    rows: dict[tuple[str | None, str | None], list[ArmEffect]] = {}
    for effect in every:
        if effect.reference == AS_GIVEN:
            rows.setdefault((effect.axis, effect.subset), []).append(effect)
    n_subsets = Counter(axis for axis, subset in rows if subset is not None)
    shown = [(scope, effects) for scope, effects in rows.items() if scope[1] is None or n_subsets[scope[0]] > 1]
    return [ScopeRow(axis, subset, effects) for (axis, subset), effects in shown]


def effects_plot(found: VerificationReport, *, narrow: bool) -> Markup:
    """A row for each slice: how much more often each arm's models are right than those of the data as given."""
    rows = scopes(found)
    width, left, fits = (380.0, 116.0, 16) if narrow else (1040.0, 240.0, 36)
    height = 16 + _ROW * len(rows) + 42
    frame = Frame(left, 16, width - 16, height - 42)
    ends = [
        abs(end) for row in rows for effect in row.effects for end in (effect.lo, effect.hi, effect.change) if end is not None
    ]
    reach = min(1.0, max(ends, default=0.0) * 1.08) or 0.01
    x = Scale(-reach, reach, frame.left, frame.right)
    parts = [
        line(x(tick), frame.top, x(tick), frame.bottom, "zero" if tick == 0 else "grid") for tick in x.ticks(4 if narrow else 8)
    ]
    parts += [text(x(tick), frame.bottom + 18, _points(tick)) for tick in x.ticks(4 if narrow else 8)]
    parts.append(text((frame.left + frame.right) / 2, frame.bottom + 36, "change of accuracy, points", "axis-name"))
    for number, row in enumerate(rows):
        middle = frame.top + _ROW * (number + 0.5)
        name = row.name if len(row.name) <= fits else f"{row.name[: fits - 1]}…"
        parts.append(text(frame.left - 10, middle + 4, name, anchor="end"))
        for place, effect in enumerate(row.effects):
            parts += _arm(effect, x, middle + _ARM * (place - (len(row.effects) - 1) / 2))
    label = f"Change of accuracy in {len(rows)} slices of the evaluation pairs. The table below holds the same figures."
    return picture(width, height, label, parts, "plot narrow-only" if narrow else "plot wide-only")


def _arm(effect: ArmEffect, x: Scale, y: float) -> list[Markup]:
    ours = effect.arm == OURS
    tip = f"{ARM_NAMES[effect.arm]}: {signed(100 * effect.change, 1)} points ({interval_of(effect)})"
    parts = []
    if effect.lo is not None and effect.hi is not None:
        parts.append(line(x(max(effect.lo, x.low)), y, x(min(effect.hi, x.high)), y, "whisker" if ours else "whisker control"))
    kind = "chosen-dot" if ours else "candidate-dot"
    parts.append(element("circle", cx=x(effect.change), cy=y, r=5 if ours else 4, class_=f"dot {kind}", data_tip=tip))
    return parts


def interval_of(effect: ArmEffect | HeldOutEffect) -> str:
    """The interval of a change, in points."""
    if effect.lo is None or effect.hi is None:
        return "no interval"
    return interval(100 * effect.lo, 100 * effect.hi, 1)


def _change(effect: ArmEffect) -> str:
    return signed(100 * effect.change, 1)


def _points(share: float) -> str:
    return f"{100 * share:+.3g}".replace("-", "−") if share else "0"


def accuracy_of(found: VerificationReport, row: ScopeRow, arm: str) -> float | None:
    """Mean accuracy of an arm in a slice."""
    return next((one.accuracy for one in found.accuracy if (one.arm, one.axis, one.subset) == (arm, row.axis, row.subset)), None)


SHAPE_NAMES = {
    "best_of_n": "best of N (as RewardBench 2)", "hard": "hard (as RM-Bench)", "normal": "normal (as RM-Bench)",
    "easy": "easy (as RM-Bench)",
}  # fmt: skip


def shape_rows(shapes: Sequence[ShapeReport]) -> list[Sequence[str]]:
    """A row for each benchmark's figure and slice: each arm's, and what our edits change with its interval, in points."""
    rows: list[Sequence[str]] = []
    for shape in shapes:
        for scope in scopes_of(shape.effects):
            at = {one.arm: one.accuracy for one in shape.accuracy if (one.axis, one.subset) == (scope.axis, scope.subset)}
            arms = [percent(at[arm]) if arm in at else "–" for arm in (AS_GIVEN, *ARM_NAMES)]
            ours = scope.effects[0]
            rows.append((f"{SHAPE_NAMES[shape.name]}: {scope.name}", *arms, _change(ours), interval_of(ours)))
    return rows


IN_TEMPLATES = {
    "effects_plot": effects_plot, "verified_scopes": scopes, "accuracy_of": accuracy_of, "arm_names": ARM_NAMES,
    "outcome_sentence": _SENTENCES.__getitem__, "shape_rows": shape_rows,
    "change_points": _change, "interval_points": interval_of,
}  # fmt: skip
