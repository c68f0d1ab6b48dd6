"""What goes over the wire: the models of `/v1`, shared by the API and its client.

Times are UTC (RFC 3339). A list is a page: `items`, and `next`, the cursor of the following page or null.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, StringConstraints
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from service.jobs.model import JobKind, JobState, StageState

T = TypeVar("T")

MAX_LABELS = 16
Action = Literal["keep", "review", "drop", "flip"]
RoleName = Literal["submit", "read", "review", "redteam", "admin"]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
LabelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$")]
LabelValue = Annotated[str, StringConstraints(max_length=200)]
Labels = Annotated[dict[LabelName, LabelValue], Field(max_length=MAX_LABELS)]
Title = Annotated[str, StringConstraints(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
ProjectName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]


class SchemaOf:
    """Documents a free JSON object by the schema of the model that it will be validated with."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.model = model

    def __get_pydantic_json_schema__(self, _core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Called by pydantic."""
        return handler(self.model.__pydantic_core_schema__)


class Wire(BaseModel):
    """Base of what the service answers."""

    model_config = ConfigDict(frozen=True)


class Request(BaseModel):
    """Base of what clients send: unknown keys are errors, types are not converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Page(Wire, Generic[T]):
    """A page of a list."""

    items: list[T]
    next: str | None = Field(None, description="Cursor of the next page; null on the last.")


class ProblemField(Wire):
    """What is wrong with one field."""

    path: str = Field(description="Dotted path in the request; empty for the whole.")
    message: str


class Problem(Wire):
    """An error (RFC 9457)."""

    type: str = Field(description="URN of the kind of error.")
    title: str = Field(description="The status in words.")
    status: int
    detail: str = Field(description="What is wrong.")
    code: str = Field(description="Stable name for programs.")
    hint: str = Field("", description="What to do about it.")
    retryable: bool = Field(False, description="Whether the same request may succeed later.")
    errors: list[ProblemField] = Field(default_factory=list)


class ErrorView(Wire):
    """Why a job failed."""

    code: str
    message: str
    hint: str = ""
    retryable: bool = False


class StageView(Wire):
    """One step of a job."""

    name: str
    queue: str
    state: StageState
    outcome: str | None = Field(None, description="computed, cached or absent, once done.")
    done: float = Field(description="Progress, in `unit`.")
    total: float
    unit: str
    started: datetime | None
    finished: datetime | None
    seconds: float | None = Field(None, description="From start to end, or until now.")


class JobSummary(Wire):
    """A job, as lists show it."""

    id: str
    kind: JobKind
    state: JobState
    priority: int
    labels: dict[str, str]
    created: datetime
    started: datetime | None
    finished: datetime | None
    submitted_by: str = Field(description="Id of the API key.")
    cancel_requested: bool
    error: ErrorView | None
    verdict: dict[str, Any] | None = Field(description="Outcome of a policy; null where none was given.")
    model: str = Field(description="The reward model (of a training: the base), as the spec names it.")
    dataset: str = Field(description="The dataset, as the spec names it.")
    names: dict[str, str] = Field(description="`upload:<digest>` → what its file or folder was called.")


class JobView(JobSummary):
    """A job in full."""

    stage: str | None = Field(description="The step that is open; null before and after.")
    progress: float | None = Field(description="Share of the open step that is done, in [0, 1]; null where not known.")
    eta_seconds: float | None = Field(
        description="Seconds that the whole job will still compute, waiting for workers not counted; null where not known."
    )
    queue_position: int | None = Field(description="Its place in the queue, 1 being next; null when it is not waiting.")
    stages: list[StageView]
    inputs: dict[str, str] = Field(description="Role → content digest, once known.")
    verdict_reason: str
    callback_url: str | None
    gpu_seconds: float = Field(description="Spent so far, over all attempts.")
    gpu_seconds_budget: float | None
    attempt: int
    spec: dict[str, Any]
    links: dict[str, str] = Field(description="Paths of what belongs to it.")


class EventView(Wire):
    """Something that happened to a job."""

    id: int
    at: datetime
    kind: str
    stage: str | None
    data: dict[str, Any]


class ArtifactView(Wire):
    """A file that a job made."""

    name: str
    size: int
    digest: str = Field(description="sha256 of the content; its ETag.")
    media_type: str


class ArtifactList(Wire):
    """All files that a job has made so far."""

    items: list[ArtifactView]


class DecisionView(Wire):
    """What a reviewer decided."""

    action: Action
    note: str
    reviewer: str
    at: datetime


class EditView(Wire):
    """What is recommended for an input row, and what was decided."""

    pair_id: str
    content_digest: str
    group: str
    axis: str
    status: str
    reason: str | None
    action: Action = Field(description="As recommended.")
    suspicion: float | None
    suspicion_kind: str | None
    signals: dict[str, float | None]
    pair_score: float | None
    reward_margin: float | None
    evidence: list[dict[str, Any]]
    decision: DecisionView | None = Field(None, description="The last one; null while there is none.")


class EditDetail(EditView):
    """One edit, with all decisions on it, oldest first."""

    history: list[DecisionView]


class Decide(Request):
    """A reviewer's decision."""

    action: Action
    note: str = Field("", max_length=2000)


class ExportView(ArtifactView):
    """Decisions as an immutable artifact."""

    decisions: int


class UploadFile(Request):
    """A file to upload."""

    path: str = Field(min_length=1, max_length=500, description="Relative, with `/`.")
    size: int = Field(ge=0, le=1 << 50)
    sha256: Digest


class CreateUpload(Request):
    """A model folder or a dataset to upload."""

    kind: Literal["model", "dataset"]
    title: Title = Field("", description="What people call it: the name of the file or folder.")
    files: list[UploadFile] = Field(min_length=1, max_length=2000)


class PartView(Wire):
    """A part that was received."""

    part: int
    size: int
    digest: str


class UploadFileView(Wire):
    """A file of an upload, and the parts of it that have come."""

    index: int
    path: str
    size: int
    sha256: str
    parts: int = Field(description="How many parts it is cut into.")
    received: list[PartView]


class UploadView(Wire):
    """An upload."""

    id: str
    kind: str
    state: str = Field(description="open or complete.")
    part_bytes: int = Field(description="Size of every part of a file but its last.")
    files: list[UploadFileView]
    created: datetime
    expires: datetime
    name: str | None = Field(None, description="`upload:<digest>` for specs, once complete.")
    digest: str | None = None
    presigned: bool = Field(False, description="Whether parts may go straight to the object store.")


class PresignedPart(Wire):
    """Where a part may be put without passing through the service."""

    url: str
    headers: dict[str, str] = Field(default_factory=dict, description="To be sent as they stand.")
    expires_seconds: int


class PartDone(Request):
    """A part that was put straight to the object store."""

    etag: str = Field(min_length=1, max_length=200)
    size: int = Field(ge=0, le=1 << 40)
    sha256: Digest


class KeyCreate(Request):
    """An API key to make."""

    name: str = Field(min_length=1, max_length=200)
    roles: list[RoleName] = Field(min_length=1, max_length=5)
    days: float | None = Field(None, gt=0, le=36500, description="Days until it expires; never by default.")
    project: ProjectName | None = Field(None, description="Another project: for admins of `default`.")


class KeyView(Wire):
    """An API key, without its secret."""

    id: str
    project: str
    name: str
    roles: list[str]
    created: datetime
    expires: datetime | None
    revoked: datetime | None
    last_used: datetime | None


class KeySecret(KeyView):
    """An API key just made: `secret` is shown this once."""

    secret: str


class ProjectCreate(Request):
    """A project to make; limits not given are the settings'."""

    name: ProjectName
    max_running: int | None = Field(None, ge=1, le=1_000_000)
    max_queued: int | None = Field(None, ge=1, le=1_000_000_000)
    max_bytes: int | None = Field(None, ge=1, le=1 << 60)
    gpu_seconds_per_job: float | None = Field(None, gt=0, le=1e9)


class ProjectView(Wire):
    """A project and its limits."""

    name: str
    created: datetime
    max_running: int
    max_queued: int
    max_bytes: int
    gpu_seconds_per_job: float | None


class LogEntry(Wire):
    """Something that someone did."""

    id: int
    at: datetime
    actor: str
    action: str
    target: str
    data: dict[str, Any]


class Me(Wire):
    """Whose key this is, and what the service can do."""

    project: str
    key_id: str
    name: str
    roles: list[str]
    version: str


class PartState(Wire):
    """Whether something the service needs can be reached."""

    ok: bool
    detail: str = ""


class Ready(Wire):
    """Whether the service can do its work."""

    ok: bool
    parts: dict[str, PartState] = Field(description="database, broker, store.")


class Healthy(Wire):
    """The process answers."""

    ok: bool
    version: str
