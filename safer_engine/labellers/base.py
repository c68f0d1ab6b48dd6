"""What every labeller takes and gives. A labeller says what a latent is about, from the contexts it fires in.

Contexts are text out of a dataset: hostile until shown otherwise. A labeller that cannot answer says so in the status;
only `labelled` and `unverified` have a rating, and only the former can become a safety feature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from safer_engine.errors import LabellerError

Status = Literal["labelled", "unverified", "unparsed", "too_few_contexts", "error", "skipped"]
RATED: frozenset[Status] = frozenset(("labelled", "unverified"))
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Window:
    """Tokens round a position.

    Attributes:
        tokens: exact texts; joined they are the text shown.
        focus: index of the token the window is about.
        activations: of the latent at each token, ≥ 0; None where not covered. Empty for background windows.
    """

    tokens: tuple[str, ...]
    focus: int
    activations: tuple[float | None, ...] = ()

    @property
    def text(self) -> str:
        """The text of all tokens."""
        return "".join(self.tokens)


@dataclass(frozen=True)
class Candidate:
    """A latent to label and the windows it fires most in, strongest first."""

    latent_id: int
    windows: tuple[Window, ...]


@dataclass(frozen=True)
class LatentLabel:
    """What a labeller said of one latent.

    Attributes:
        rating: 1 (unrelated to the rubric) … 5 (squarely about it); None unless `labelled` or `unverified`.
        explanation: one or two sentences; for other statuses why there is no rating.
        direction: one of the rubric's directions, or None where the labeller saw none.
        terms: words that mark the contexts.
        kinds: categories of the rubric's terms that were counted in the contexts, where that is what the rating is made of.
        by: the person whose correction this is; None for what a labeller says.
    """

    latent_id: int
    status: Status
    rating: int | None = None
    explanation: str = ""
    direction: str | None = None
    terms: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    by: str | None = None

    def __post_init__(self) -> None:
        if (self.status in RATED) != (self.rating is not None):
            raise ValueError(f"latent {self.latent_id}: status {self.status} with rating {self.rating}")


@dataclass(frozen=True)
class Labelling:
    """Labels of all candidates, in their order, and what they took.

    Attributes:
        calls: requests sent, retries included.
        cost: in the currency of the prices given; 0 where none were.
    """

    labels: tuple[LatentLabel, ...]
    calls: int = 0
    cost: float = 0.0


@dataclass(frozen=True)
class Claim:
    """A label, and windows of which it is to tell those in which the latent fires.

    Attributes:
        windows: held out when the label was made; without activations, in an order that gives nothing away.
    """

    label: LatentLabel
    windows: tuple[Window, ...]


@dataclass(frozen=True)
class Judged:
    """What was said of a claim's windows.

    Attributes:
        fires: of each window; None where nothing was said.
        problem: why, where that is so.
    """

    fires: tuple[bool | None, ...]
    problem: str = ""


@dataclass(frozen=True)
class Judgements:
    """What was said of all claims, in their order; `calls` and `cost` as in `Labelling`."""

    claims: tuple[Judged, ...]
    calls: int = 0
    cost: float = 0.0


class Labeller(Protocol):
    """One way to label. `name` is stored with each label."""

    @property
    def name(self) -> str:
        """Kind of labeller, and which model where there is one."""

    @property
    def reads_in_order(self) -> bool:
        """Whether the order of the contexts can change a rating, so that a second reading in another order says something."""

    def label(self, candidates: Sequence[Candidate], background: Sequence[Window], progress: Progress) -> Labelling:
        """Label candidates, one label each, in their order.

        Args:
            background: windows at random positions of the same data.
            progress: told (done, total) between candidates; may raise to stop.

        Raises:
            LabellerError: the labeller cannot work at all; finished answers are not lost.
        """

    def detect(self, claims: Sequence[Claim], progress: Progress) -> Judgements:
        """Say of each window whether the latent fires in it, from the label alone. Progress and errors as for `label`."""


def label_all(
    labeller: Labeller, candidates: Sequence[Candidate], background: Sequence[Window], minimum: int, progress: Progress
) -> Labelling:
    """Label the candidates that have at least `minimum` windows; the others get `too_few_contexts`."""
    enough = [candidate for candidate in candidates if len(candidate.windows) >= minimum]
    found = labeller.label(enough, background, progress)
    by_id = {label.latent_id: label for label in found.labels}
    if missing := [one.latent_id for one in enough if one.latent_id not in by_id]:
        raise LabellerError(f"labeller {labeller.name} gave no label for latents {missing[:5]}")
    labels = tuple(by_id[one.latent_id] if one.latent_id in by_id else _too_few(one, minimum) for one in candidates)
    return Labelling(labels, found.calls, found.cost)


def _too_few(candidate: Candidate, minimum: int) -> LatentLabel:
    reason = f"{len(candidate.windows)} contexts, fewer than the {minimum} that a label needs"
    return LatentLabel(candidate.latent_id, "too_few_contexts", explanation=reason)
