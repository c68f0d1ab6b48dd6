"""What all parts of a report's document have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Rate = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Scalar = bool | int | float | str | None
Facts = dict[str, Scalar]


class Node(BaseModel):
    """Base of all parts: immutable, unknown keys are errors, NaN and infinity are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
