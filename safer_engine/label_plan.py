"""How many requests labelling takes, and what they would cost: before any is made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from safer_engine.labellers.model_labeller import WINDOWS_PER_CHECK
from safer_engine.science.sae_budget import sae_width
from safer_engine.spec import AuditSpec
from safer_engine.spec_labels import ChatApiLabeller, LexiconLabeller

_PER_TOKEN = 1.5
"""Tokens of a prompt for a token of a context, JSON and marks included."""
_INSTRUCTIONS = 600
"""Tokens of a prompt besides the contexts."""
_ANSWER = 120
"""Tokens of a usual answer."""


@dataclass(frozen=True)
class LabelRequests:
    """Requests by purpose, where each candidate is rated and checked; retries are not counted.

    Attributes:
        cost: about what they cost, in the currency of the prices given; 0 where none are.
    """

    labels: int
    detection: int
    repeats: int
    cost: float

    @property
    def total(self) -> int:
        """All of them."""
        return self.labels + self.detection + self.repeats


def label_requests(spec: AuditSpec, d_in: int) -> LabelRequests | None:
    """What a labeller that asks a model would be asked, at most; None for one that asks none.

    Args:
        d_in: width of the reward model; 0 where not known.
    """
    labeller, contexts = spec.labels.labeller, spec.contexts
    if isinstance(labeller, LexiconLabeller):
        return None
    n = min(spec.salience.candidates, sae_width(spec.sae, d_in)) if d_in else spec.salience.candidates
    repeats = round(spec.labels.repeats * n)
    checks = math.ceil(2 * contexts.held_out / WINDOWS_PER_CHECK) if spec.labels.detection_floor is not None else 0
    cost = 0.0
    if isinstance(labeller, ChatApiLabeller):
        rating = _PER_TOKEN * contexts.per_latent * contexts.window + _INSTRUCTIONS
        check = _PER_TOKEN * WINDOWS_PER_CHECK * contexts.held_out_window + _INSTRUCTIONS
        asked = (n + repeats) * rating + n * checks * check
        answered = (n + repeats + n * checks) * min(_ANSWER, labeller.max_tokens)
        cost = (asked * labeller.price_in + answered * labeller.price_out) / 1e6
    return LabelRequests(n, n * checks, repeats, cost)
