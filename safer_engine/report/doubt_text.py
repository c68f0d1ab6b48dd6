"""Sentences about how many labels are wrong and what decides what is edited; what speaks for and against a label."""

from __future__ import annotations

from collections.abc import Sequence

from safer_engine.report.model import EditsReport, Evidence, SuspiciousPair
from safer_engine.report.model_doubts import AxisDoubt, Interval
from safer_engine.report.text import MINUS, NARROW_SPACE, count, fact, small_percent, visible
from safer_engine.science.edits import RANK_BUDGET
from safer_engine.science.limits import SAE_ADDS_GROUPS
from safer_engine.science.pairs import UNNAMED


def estimated(axes: Sequence[AxisDoubt]) -> str:
    """How many labels of each axis are estimated to be wrong, as a sentence with a space after it; empty where nothing is."""
    parts = [
        f"{small_percent(axis.doubtful_share)} of {_named(axis)} "
        f"({small_percent(axis.doubtful_share_lo)} to {small_percent(axis.doubtful_share_hi)})"
        for axis in axes
        if axis.doubtful_share is not None and axis.doubtful_share_lo is not None and axis.doubtful_share_hi is not None
    ]
    return f"An estimated {', '.join(parts)} of the labels are doubtful. " if parts else ""


def _named(axis: AxisDoubt) -> str:
    """An axis within a sentence; pairs that state none share one whose name says nothing there."""
    return "pairs without an axis" if axis.axis == UNNAMED else visible(axis.axis)


def not_told(axis: AxisDoubt) -> str:
    """Why an axis has ranks only."""
    why = f" ({visible(axis.reason)})" if axis.reason else ""
    return f"Suspicion within {_named(axis)} is a rank, not a probability{why}: a budget decides how many are recommended."


def unchecked(axes: Sequence[AxisDoubt]) -> list[str]:
    """Sentences about the axes whose probabilities nobody has checked, one for each reason."""
    by_reason: dict[str, list[str]] = {}
    for axis in axes:
        if axis.kind == "probability" and (axis.decisions is None or axis.decisions.before is None):
            why = axis.decisions.reason if axis.decisions is not None else None
            by_reason.setdefault(f" ({visible(why)})" if why else "", []).append(_named(axis))
    return [
        f"The probabilities of {' and '.join(names)} are estimates that nobody has checked{why}: decide on a hundred pairs and "
        "name them in suspicion.decisions. Wrong labels that follow a rule the reward model has learnt (the longer answer is "
        "always chosen) are taken for right ones."
        for why, names in by_reason.items()
    ]


def decided(axis: AxisDoubt) -> str:
    """What people's decisions said of an axis's probabilities, as a sentence; empty where nobody decided."""
    found = axis.decisions
    if found is None:
        return ""
    head = f"{_named(axis)}: people decided on {count(found.n)} labels and called {count(found.n_wrong)} wrong"
    if found.before is None or found.after is None:
        return f"{head}; probabilities stay as they were ({visible(found.reason or '')})."
    change = "are recalibrated by that" if found.used else f"stay as they were ({visible(found.reason or '')})"
    return (
        f"{head}. Probabilities {change}: Brier score on these pairs {_told(found.before.brier)} before and "
        f"{_told(found.after.brier)} after, each pair left out of its own map; calibration error {_told(found.before.ece)} and "
        f"{_told(found.after.ece)}, of which chance alone would make {found.after.ece_chance:.3f}."
    )


def standing(axis: AxisDoubt) -> str:
    """How many pairs of an axis are suspicious and how many of these contested, and why."""
    reasons = ", ".join(f"{count(n)} {CONTESTED_WORDS.get(name, visible(name))}" for name, n in axis.contested_by.items())
    return f"{count(axis.n_contested)} of {count(axis.n_suspicious)}{f' ({reasons})' if reasons else ''}"


def _told(figure: Interval) -> str:
    return f"{figure.value:.3f} ({figure.lo:.3f} to {figure.hi:.3f})"


CONTESTED_WORDS = {
    "annotators": "by their annotators",
    "weak_preference": "by a weak preference",
    "no_evidence": "for want of evidence",
}
"""Why a pair is contested, in words."""


def how_chosen(edits: EditsReport) -> str:
    """What decides which rows are edited."""
    if edits.budget is not None:
        return f"Budget: {fact(100 * edits.budget)}{NARROW_SPACE}% of each axis, in whole rows."
    chosen = (
        "What is edited: the largest set, most doubtful first, of which no more than the allowed share is expected to be right"
    )
    kinds = {axis.kind for axis in edits.axes}
    if kinds == {"probability"}:
        return f"{chosen}."
    ranks = f"{fact(100 * RANK_BUDGET)}{NARROW_SPACE}% of each axis whose suspicion is a rank, in whole rows"
    return f"{chosen}; {ranks}." if "probability" in kinds else f"Budget: {ranks}."


def sae_adds(axes: Sequence[AxisDoubt]) -> list[str]:
    """What the SAE adds on each axis, or that it cannot be told, and what follows."""
    said = [_adds(axis) for axis in axes]
    if any(axis.sae is not None and not axis.sae.fair for axis in axes):
        said.append(
            "The reward model is taken to have been trained on these labels (suspicion.labels_seen), so its activations agree "
            "with wrong ones too, the dense probe's most: this cannot tell whether the SAE finds more of them, and decides "
            "nothing."
        )
    return said


def _adds(axis: AxisDoubt) -> str:
    found = axis.sae
    if found is None:
        needed = f"signals that were held out by group, and {SAE_ADDS_GROUPS} groups at least"
        return f"On {_named(axis)} it cannot be told what the SAE adds: it takes {needed}."
    ends = "" if found.lo is None or found.hi is None else f" [{_signed(found.lo)}, {_signed(found.hi)}]"
    agree = f"{small_percent(found.agree_with)} of the labels agree with the held-out score, {small_percent(found.agree_without)}"
    said = (
        f"On {_named(axis)} the SAE adds {_signed(found.bits)}{ends} bits a pair over a dense probe in its place "
        f"({agree} without it)."
    )
    return f"{said} It adds nothing: the dense probe stands in its place." if axis.sae_left_out else said


def _signed(bits: float) -> str:
    return f"{bits:+.3f}".replace("-", MINUS)


def expected_at(axis: AxisDoubt, budget: float) -> str:
    """Expected share of wrong labels among the most doubtful `budget` of an axis."""
    return next((small_percent(point.precision) for point in axis.curve if point.budget == budget), "–")


def sides(pair: SuspiciousPair) -> list[tuple[str, str, list[Evidence]]]:
    """Latents for the label and latents against it, each side's strongest first."""
    ranked = sorted(pair.evidence, key=lambda part: -abs(part.contribution))
    return [
        ("Latents for the label", "for", [part for part in ranked if part.contribution > 0]),
        ("Latents against the label", "against", [part for part in ranked if part.contribution < 0]),
    ]
