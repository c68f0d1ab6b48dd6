"""What goes over the wire of a model's history: see `service.schemas`."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import Field

from service.schemas import Wire


class AxisAccuracy(Wire):
    """Pair accuracy on the evaluation pairs of an axis."""

    axis: str | None = Field(description="Null: all axes.")
    accuracy: float
    lo: float | None = Field(description="Lower end of the 95 % interval; null where there is none.")
    hi: float | None
    n: int
    change: float | None = Field(
        description="Less that of the version before; null where `previous` is, where the evaluation data are others, or where "
        "it has no such axis. It has no interval: `safer-audit compare` pairs the two."
    )


class VersionView(Wire):
    """A finished audit as one point of a history."""

    audit: str = Field(description="Its id.")
    created: datetime
    finished: datetime | None
    labels: dict[str, str]
    model: str = Field(description="As its spec names it.")
    model_digest: str | None = Field(description="Of the model's content; null where it was not recorded.")
    dataset_digest: str | None
    evaluation_digest: str | None
    accuracy: list[AxisAccuracy] = Field(description="On the evaluation pairs: all, then each axis; empty without any.")
    doubtful_share: float | None = Field(description="Estimated share of wrong labels in the dataset; null where there is none.")
    verdict: dict[str, Any] | None = Field(description="Of its newest gate; null where no gate has decided.")
    previous: str | None = Field(description="Id of the audit before it in this history; null for the first.")
    same_model: bool | None = Field(description="Whether the version before was of the same model (digest); null without one.")
    missing: str | None = Field(description="Why there are no figures, where its report cannot be read.")
