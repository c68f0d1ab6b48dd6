"""Parameters that several routes share."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated

from fastapi import Depends, Header, Path
from pydantic import AfterValidator, AwareDatetime, Field, WithJsonSchema

from service.errors import FieldProblem, NotFound, RequestInvalid
from service.http.services import Services, services_of
from service.jobs.ids import is_id
from service.jobs.stage_plan import stage_names
from service.schemas import LabelName, LabelValue

_LABEL = re.compile(r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._/-]{0,62})=(?P<value>.{0,200})$", re.DOTALL)


def _known_stage(name: str) -> str:
    if name not in stage_names():
        raise ValueError(f"there is no such stage; there are: {', '.join(stage_names())}")
    return name


StageName = Annotated[str, AfterValidator(_known_stage), WithJsonSchema({"type": "string", "enum": list(stage_names())})]
ServicesDep = Annotated[Services, Depends(services_of)]
Limit = Annotated[int, Field(ge=1, le=200, description="Items of a page.")]
Cursor = Annotated[str | None, Field(max_length=400, pattern=r"^[A-Za-z0-9_=-]+$", description="`next` of the page before.")]
DigestPath = Annotated[str, Path(description="sha256 in hex.", max_length=64)]
Labelled = Annotated[list[str], Field(description="`name=value`; repeat it for jobs that have all.", max_length=16)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[!-~]{1,200}$",
        description="A name for this request: sent again, it gives the same job instead of another.",
    ),
]


def known_id(value: str, what: str) -> str:
    """An id that may exist. Raises NotFound for what cannot be one."""
    if not is_id(value):
        raise NotFound(f"there is no {what} {value[:40]!r}")
    return value


def _job_id(job_id: Annotated[str, Path(description="Id of the job.", max_length=100)]) -> str:
    return known_id(job_id, "job")


def _upload_id(upload_id: Annotated[str, Path(description="Id of the upload.", max_length=100)]) -> str:
    return known_id(upload_id, "upload")


def _gate_id(gate_id: Annotated[str, Path(description="Id of the gate.", max_length=100)]) -> str:
    return known_id(gate_id, "gate")


JobId = Annotated[str, Depends(_job_id)]
UploadId = Annotated[str, Depends(_upload_id)]
GateId = Annotated[str, Depends(_gate_id)]


def labels_of(given: list[str]) -> dict[LabelName, LabelValue]:
    """`name=value` texts as labels. Raises RequestInvalid."""
    found = {}
    for text in given:
        match = _LABEL.match(text)
        if match is None:
            raise RequestInvalid("a label filter is wrong", "write name=value", (FieldProblem("query.label", "not name=value"),))
        found[match["name"]] = match["value"]
    return found


def moment(value: AwareDatetime | None, name: str) -> datetime | None:
    """A point in time that databases can keep. Raises RequestInvalid."""
    if value is not None and not 1970 < value.year < 9000:
        raise RequestInvalid(f"{name} is out of range", "", (FieldProblem(f"query.{name}", "out of range"),))
    return value
