"""Why a row gives no usable pair: one word for each reason, counted and shown; and what says so of a side."""

from __future__ import annotations

from enum import StrEnum


class Drop(StrEnum):
    """Reasons, in the order in which they are looked for: a pair is counted under the first that holds."""

    MALFORMED = "malformed"
    """A cell isn't what the row's layout says."""
    TIE = "tie"
    """The row states that neither response is better."""
    UNRATED = "unrated"
    """The row does not say which response is better: its winner column is empty."""
    EMPTY_SIDE = "empty_side"
    """A response is empty, white space, or leaves no token."""
    IDENTICAL_SIDES = "identical_sides"
    """Chosen and rejected are the same text."""
    DUPLICATE = "duplicate"
    """The same prompt, chosen and rejected occurred before."""
    IN_TRAINING_DATA = "in_training_data"
    """Evaluation only: the prompt occurs in the dataset under audit."""
    SAMPLED_OUT = "sampled_out"
    """Not in the sample that was asked for."""
    UNRENDERABLE = "unrenderable"
    """The chat template refuses the conversation, or where the response lies in it can't be told."""
    OVER_LONG = "over_long"
    """Longer than the limit and not to be cut, or nothing of the response would be left."""
    IDENTICAL_AFTER_TRUNCATION = "identical_after_truncation"
    """The model would read the same tokens for both sides."""


class SideDropped(ValueError):
    """A side can't be read by the model; `reason` says why."""

    def __init__(self, reason: Drop, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
