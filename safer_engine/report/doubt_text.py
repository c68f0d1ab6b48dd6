"""Sentences about how many labels are wrong and what decides what is edited; what speaks for and against a label."""

from __future__ import annotations

from collections.abc import Sequence

from safer_engine.report.model import EditsReport, Evidence, SuspiciousPair
from safer_engine.report.model_doubts import AxisDoubt
from safer_engine.report.text import MINUS, NARROW_SPACE, fact, small_percent, visible
from safer_engine.science.edits import RANK_BUDGET


def estimated(axes: Sequence[AxisDoubt]) -> str:
    """How many labels of each axis are estimated to be wrong, as a sentence with a space after it; empty where nothing is."""
    parts = [
        f"{small_percent(axis.doubtful_share)} of {visible(axis.axis)} "
        f"({small_percent(axis.doubtful_lo)} to {small_percent(axis.doubtful_hi)})"
        for axis in axes
        if axis.doubtful_share is not None and axis.doubtful_lo is not None and axis.doubtful_hi is not None
    ]
    return f"An estimated {', '.join(parts)} of the labels are wrong. " if parts else ""


def not_told(axis: AxisDoubt) -> str:
    """Why an axis has ranks only."""
    why = f" ({visible(axis.reason)})" if axis.reason else ""
    return f"Suspicion within {visible(axis.axis)} is a rank, not a probability{why}: a budget decides how many are recommended."


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


def sae_adds(axis: AxisDoubt) -> str:
    """What the SAE adds on an axis, and what follows; empty where it could not be told."""
    found = axis.sae
    if found is None:
        return ""
    ends = "" if found.lo is None or found.hi is None else f" [{_signed(found.lo)}, {_signed(found.hi)}]"
    agree = f"{small_percent(found.agree_with)} of the labels agree with the held-out score, {small_percent(found.agree_without)}"
    said = (
        f"On {visible(axis.axis)} the SAE adds {_signed(found.bits)}{ends} bits a pair over a dense probe in its place "
        f"({agree} without it)."
    )
    if axis.sae_left_out:
        return f"{said} It adds nothing: the dense probe stands in its place."
    if found.fair:
        return said
    return (
        f"{said} The reward model is taken to have been trained on these labels, so its activations agree with wrong ones too, "
        "the dense probe's most: this figure cannot tell whether the SAE finds more of them, and decides nothing."
    )


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
