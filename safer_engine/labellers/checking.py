"""Labels checked: on held-out windows, by a second reading, and by what a person says.

A label that does not tell where its latent fires is no ground to call the latent a feature. So each rating is checked on
windows that were held out when it was made: the labeller is shown the label and the windows, mixed, and says where the
latent fires. Below the floor, or where too few windows could be judged, the label is `unverified`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from safer_engine.labellers.base import RATED, Candidate, Claim, Labeller, Labelling, LatentLabel, Window, label_all
from safer_engine.science.label_checks import Agreement, Detection, agreement, detection
from safer_engine.spec_labels import Correction, LabelSpec

LEAST_WINDOWS = 5
"""Windows of either kind that must have been judged."""
_RESAMPLES = 2000
_ROUNDING = 1e-9
Told = Callable[[int, int, str], None]


@dataclass(frozen=True)
class HeldOut:
    """Held-out windows of a latent, half of which it fires in: `fires[i]` says whether it does in `windows[i]`."""

    windows: tuple[Window, ...] = ()
    fires: tuple[bool, ...] = ()


@dataclass(frozen=True)
class CheckedLabel:
    """A label and what checking it gave.

    Attributes:
        detection: how well the label tells held-out windows apart; None with the reason in `problem`.
        rating_again: of the second reading; None where there was none, or it gave no rating (then `status_again` says why).
    """

    label: LatentLabel
    detection: Detection | None = None
    problem: str = ""
    rating_again: int | None = None
    status_again: str | None = None


@dataclass(frozen=True)
class Spent:
    """Requests and their price."""

    calls: int = 0
    cost: float = 0.0


@dataclass(frozen=True)
class CheckedLabels:
    """All labels, in the order of the candidates.

    Attributes:
        agreement: of both readings; None with the reason in `no_agreement`.
        spent: by purpose: labels, detection, repeats.
    """

    labels: tuple[CheckedLabel, ...]
    agreement: Agreement | None = None
    no_agreement: str = ""
    spent: Mapping[str, Spent] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What is to be labelled and how.

    Attributes:
        held_out: by latent.
        corrections: by latent; they stand in place of what the labeller says.
        minimum: contexts that a label needs.
        seed: of the order of windows, and of which candidates are read twice.
    """

    candidates: Sequence[Candidate]
    background: Sequence[Window]
    held_out: Mapping[int, HeldOut]
    corrections: Mapping[int, Correction]
    minimum: int
    seed: int


def checked_labels(labeller: Labeller, task: Task, spec: LabelSpec, told: Told) -> CheckedLabels:
    """Label the candidates, check the labels, read some twice: in this order, so that a limit on cost ends the last first.

    Args:
        told: (done, total, what) between latents; may raise to stop.

    Raises:
        LabellerError: the labeller cannot work at all; finished answers are not lost.
    """
    first = label_all(labeller, task.candidates, task.background, task.minimum, lambda a, b: told(a, b, "latents"))
    said = [_corrected(label, task.corrections.get(label.latent_id)) for label in first.labels]
    spent = {"labels": Spent(first.calls, first.cost)}
    checked = [CheckedLabel(label) for label in said]
    if spec.detection_floor is not None:
        checked, spent["detection"] = _detected(labeller, said, task, told)
        checked = [_verified(one, spec.detection_floor) for one in checked]
    again = _again(labeller, task, spec, told)
    if again is None:
        why = "asked for no second reading (labels.repeats)" if labeller.reads_in_order else _COUNTS
        return CheckedLabels(tuple(checked), None, why, spent)
    spent["repeats"] = Spent(again.calls, again.cost)
    second = {label.latent_id: label for label in again.labels}
    checked = [_with_second(one, second.get(one.label.latent_id)) for one in checked]
    once = {label.latent_id: label.rating for label in first.labels if label.rating is not None}
    both = [(once[key], label.rating) for key, label in second.items() if label.rating is not None and key in once]
    found = agreement([a for a, _ in both], [b for _, b in both], _RESAMPLES, np.random.default_rng(task.seed)) if both else None
    return CheckedLabels(tuple(checked), found, "" if found else "no candidate was rated in both readings", spent)


_COUNTS = "the labeller counts words, which are the same in any order"


def _corrected(label: LatentLabel, correction: Correction | None) -> LatentLabel:
    if correction is None:
        return label
    return replace(
        label,
        status="labelled",
        rating=correction.rating,
        explanation=correction.explanation,
        direction=correction.direction,
        terms=correction.terms,
        kinds=(),
        by=correction.by,
    )


def _detected(labeller: Labeller, labels: Sequence[LatentLabel], task: Task, told: Told) -> tuple[list[CheckedLabel], Spent]:
    """The labels with their detection, and what it took."""
    claims, truths = list[Claim](), dict[int, tuple[bool, ...]]()
    for label in labels:
        mine = task.held_out.get(label.latent_id, HeldOut())
        if label.status in RATED and sum(mine.fires) >= LEAST_WINDOWS:
            order = _order(len(mine.windows), f"{task.seed}/windows/{label.latent_id}")
            claims.append(Claim(label, tuple(mine.windows[at] for at in order)))
            truths[label.latent_id] = tuple(mine.fires[at] for at in order)
    judged = labeller.detect(claims, lambda a, b: told(a, b, "labels checked"))
    found = dict(zip((claim.label.latent_id for claim in claims), judged.claims, strict=True))
    checked = []
    for label in labels:
        one = found.get(label.latent_id)
        if one is not None:
            value = detection(truths[label.latent_id], one.fires)
            least = 0 if value is None else min(value.n_fires, value.n_silent)
            enough = value if least >= LEAST_WINDOWS else None
            why = "" if enough else one.problem or f"only {least} windows of a kind could be judged"
            checked.append(CheckedLabel(label, enough, why))
        else:
            n = sum(task.held_out.get(label.latent_id, HeldOut()).fires)
            why = f"{n} held-out contexts with a match, fewer than {LEAST_WINDOWS}" if label.status in RATED else ""
            checked.append(CheckedLabel(label, problem=why))
    return checked, Spent(judged.calls, judged.cost)


def _verified(checked: CheckedLabel, floor: float) -> CheckedLabel:
    """`unverified` where detection is below the floor, or could not be had; what a person says stands."""
    label, found = checked.label, checked.detection
    if (
        floor == 0
        or label.status != "labelled"
        or label.by is not None
        or (found is not None and found.score >= floor - _ROUNDING)
    ):
        return checked
    return replace(checked, label=replace(label, status="unverified"))


def _again(labeller: Labeller, task: Task, spec: LabelSpec, told: Told) -> Labelling | None:
    """The second reading of a share of the candidates that have contexts enough; None where there is none."""
    enough = [one for one in task.candidates if len(one.windows) >= max(2, task.minimum)]
    drawn = sorted(enough, key=lambda one: _hash(f"{task.seed}/again/{one.latent_id}"))[: round(spec.repeats * len(enough))]
    wanted = {one.latent_id for one in drawn}
    if not labeller.reads_in_order or not wanted:
        return None
    turned = [_turned(one, f"{task.seed}/contexts/{one.latent_id}") for one in enough if one.latent_id in wanted]
    return labeller.label(turned, task.background, lambda a, b: told(a, b, "second readings"))


def _turned(candidate: Candidate, seed: str) -> Candidate:
    """The candidate with its windows in another order."""
    order = _order(len(candidate.windows), seed)
    if order == sorted(order):
        order.reverse()
    return Candidate(candidate.latent_id, tuple(candidate.windows[at] for at in order))


def _with_second(checked: CheckedLabel, second: LatentLabel | None) -> CheckedLabel:
    return checked if second is None else replace(checked, rating_again=second.rating, status_again=second.status)


def _order(n: int, seed: str) -> list[int]:
    """0 … n − 1 in an order that follows from the seed, the same on every machine."""
    return sorted(range(n), key=lambda at: _hash(f"{seed}/{at}"))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
