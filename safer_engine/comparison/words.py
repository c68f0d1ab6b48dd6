"""What a comparison says in words: the paragraph, the key figures and what to keep in mind."""

from __future__ import annotations

from dataclasses import dataclass

from safer_engine.comparison.model import ComparisonDocument, Drift, FeaturesComparison, PairsComparison, SliceComparison
from safer_engine.report.model import Estimate
from safer_engine.report.text import NONE, base_name, count, interval, number, percent, signed, visible

_FEW_GROUPS = 30
_BADLY_READ = 0.5
"""FVU from which the reader is told that an SAE explains too little of a model's activations."""


@dataclass(frozen=True)
class KeyFigure:
    """A figure at the head of the page."""

    name: str
    value: str
    detail: str
    anchor: str


def main_pairs(found: ComparisonDocument) -> tuple[str, PairsComparison]:
    """The pairs that say most, evaluation pairs where there are some, and their name."""
    if found.evaluation is not None:
        return "evaluation", found.evaluation
    assert found.audited is not None
    return "audited", found.audited


def slice_name(row: SliceComparison) -> str:
    """`axis`, `axis: subset`, or `all`."""
    return "all" if row.axis is None else row.axis if row.subset is None else f"{row.axis}: {row.subset}"


def shown_slices(found: PairsComparison) -> list[SliceComparison]:
    """Slices without the only subset of an axis, which is the axis, and without the only axis, which is all."""
    axes = {row.axis for row in found.slices if row.axis is not None}
    subsets = [row.axis for row in found.slices if row.subset is not None]
    return [
        row
        for row in found.slices
        if not (row.subset is not None and subsets.count(row.axis) == 1)
        and not (row.axis is not None and row.subset is None and len(axes) == 1)
    ]


def points(figure: Estimate) -> str:
    """A difference of shares in points, with its interval."""
    return f"{signed(100 * figure.estimate, 1)} ({ends(figure, 100, 1)})"


def ends(figure: Estimate | None, times: float = 1.0, digits: int = 2) -> str:
    """The interval of a figure, in words."""
    if figure is None or figure.lo is None or figure.hi is None:
        return "no interval"
    return interval(times * figure.lo, times * figure.hi, digits)


def title(found: ComparisonDocument) -> str:
    """What is compared: the models' names, with the folder they are in where their names are the same."""
    names = [base_name(side.model) for side in (found.a, found.b)]
    if names[0] == names[1]:
        names = ["/".join(visible(side.model).rstrip("/").rsplit("/", 2)[-2:]) for side in (found.a, found.b)]
    return f"{names[0]} → {names[1]}"


def paragraph(found: ComparisonDocument) -> str:
    """The outcome in a few sentences: no more than the intervals carry."""
    kind, pairs = main_pairs(found)
    whole = pairs.slices[0]
    said = [
        f"On {count(whole.n)} {kind} pairs that both audits have, pair accuracy is {percent(whole.accuracy_a)} with A and "
        f"{percent(whole.accuracy_b)} with B: {points(whole.accuracy_change)} points.",
        f"{count(whole.right_to_wrong)} pairs went from right to wrong, {count(whole.wrong_to_right)} from wrong to right.",
    ]
    sure = [row for row in shown_slices(pairs) if row.axis is not None and _away(row.accuracy_change)]
    if sure:
        worst = max(sure, key=lambda row: abs(row.accuracy_change.estimate))
        kept = "" if len(sure) == 1 else f" (of {len(sure)} whose interval leaves out 0)"
        said.append(f"The largest sure change is in {slice_name(worst)}{kept}: {points(worst.accuracy_change)} points.")
    else:
        said.append("In no slice does the interval leave out 0.")
    if found.features is not None:
        told = found.features
        said.append(
            f"Both were read with the same SAE: of {count(told.n_safety_a)} safety features of A and {count(told.n_safety_b)} of "
            f"B, {count(told.n_safety_both)} are the same latents."
        )
    return " ".join(said)


def _away(figure: Estimate) -> bool:
    return figure.lo is not None and figure.hi is not None and (figure.lo > 0 or figure.hi < 0)


def key_figures(found: ComparisonDocument) -> list[KeyFigure]:
    """The figures at the head of the page."""
    kind, pairs = main_pairs(found)
    whole = pairs.slices[0]
    rank = whole.rank_correlation
    change = whole.accuracy_change
    changed = f"{count(pairs.n_changed)} of {count(whole.n)} {kind} pairs"
    return [
        KeyFigure("change of pair accuracy", signed(100 * change.estimate, 1), f"points; {ends(change, 100, 1)}", kind),
        KeyFigure("preferences changed", percent(whole.changed.estimate), changed, kind),
        KeyFigure("right → wrong", count(whole.right_to_wrong), f"and {count(whole.wrong_to_right)} wrong → right", kind),
        KeyFigure("rank correlation", "–" if rank is None else signed(rank.estimate, 2), f"of the margins; {ends(rank)}", kind),
    ]


def cautions(found: ComparisonDocument) -> list[str]:
    """What to keep in mind."""
    said = []
    if found.same_model:
        said.append("Both audits are of the same reward model (digest): what differs is not the model's.")
    for name, pairs in (("evaluation", found.evaluation), ("audited", found.audited)):
        if pairs is None:
            said.append(f"Not compared: {name} pairs ({found.not_computed[name]}).")
            continue
        if not pairs.same_data:
            said.append(
                f"The {name} data differ: {count(pairs.n_common)} pairs are in both, {count(pairs.n_only_a)} in A alone and "
                f"{count(pairs.n_only_b)} in B alone."
            )
        if pairs.slices[0].n_groups < _FEW_GROUPS:
            said.append(f"Only {count(pairs.slices[0].n_groups)} groups of {name} pairs: intervals are wide, and rough.")
    if found.audited is not None:
        said.append("A reward model that was trained on the audited pairs is at its best there: changes on them say less.")
    if found.features is None:
        said.append(f"Features are not compared: {found.not_computed['features']}.")
    else:
        said += _of_sae(found.features)
    said.append("Slices are many: of twenty that did not change, one interval leaves out 0 by chance.")
    return said


def _of_sae(told: FeaturesComparison) -> list[str]:
    """How badly the shared SAE reads a model, if it does."""
    said = []
    for name, interpretable, fvu in (("A", told.interpretable_a, told.fvu_a), ("B", told.interpretable_b, told.fvu_b)):
        if not interpretable:
            said.append(f"The SAE recovers too little of the reward of {name}: its features there say little.")
        if fvu >= _BADLY_READ:
            most = "none" if fvu >= 1 else "less than half"
            said.append(
                f"The SAE explains {most} of the variance of {name}'s activations (FVU {number(fvu, 2)}): what {name} does is "
                "largely outside of these latents. An SAE of its own says what its features are."
            )
    return said


def drift_words(change: Drift | None, digits: int = 3) -> str:
    """A change with its interval; a dash where it is not known."""
    if change is None:
        return NONE
    return f"{signed(change.estimate, digits)} ({interval(change.lo, change.hi, digits)})"
