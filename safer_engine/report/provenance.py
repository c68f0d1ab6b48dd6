"""The part of a report's document that says where every figure comes from, and what it cost."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from safer_engine.report.nodes import Count, Node


class InputRecord(Node):
    """A model or dataset as it was found."""

    origin: str
    revision: str | None = None
    digest: str


class StageRecord(Node):
    """A stage and the artifact it left."""

    stage: str
    state: Literal["computed", "absent", "pending"]
    reason: str | None = Field(None, description="Why it is absent or pending.")
    version: int | None = None
    cache_key: str | None = None
    content_digest: str | None = None
    inputs: dict[str, str] = Field(default_factory=dict, description="Content digests of the artifacts it consumed.")
    machine: dict[str, Any] = Field(default_factory=dict, description="Versions and machine it ran on.")


class PlannedCost(Node):
    """What was expected before the work began; null where that could not be told."""

    seconds: float | None
    peak_memory_bytes: int | None
    peak_gpu_bytes: int | None
    disk_bytes: int | None


NO_PLAN = PlannedCost(seconds=None, peak_memory_bytes=None, peak_gpu_bytes=None, disk_bytes=None)
"""Stands where nothing was planned, when a row is shown."""


class StageCost(Node):
    """What a stage took when it was computed."""

    stage: str
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int | None
    peak_gpu_bytes: int | None
    disk_bytes: Count = Field(description="Size of its artifact's files.")
    planned: PlannedCost | None = Field(description="What `plan` said of it before it was computed.")
    unplanned: str | None = Field(None, description="Why `planned` is null.")


class Timing(Node):
    """The only block that differs between two identical audits."""

    created: str = Field(description="UTC time at which this report was written, ISO 8601.")
    total_seconds: float
    peak_memory_bytes: int | None = Field(description="The largest of the stages.")
    peak_gpu_bytes: int | None = Field(description="The largest of the stages.")
    disk_bytes: Count = Field(description="The artifacts of all stages together.")
    planned: PlannedCost | None = Field(description="The same as planned; null where not every stage was planned.")
    stages: list[StageCost]
    runtime: dict[str, Any] = Field(description="Spec section `runtime`: how the work was done.")


class Progress(Node):
    """Where an unfinished audit stands."""

    done: Count
    total: Count
    following: str = Field(description="Stage that comes next, or at which the audit stopped.")
    stopped: str | None = Field(
        None, description="Why the audit stopped there, and what to do; null while it goes on, and where it was killed."
    )


class Provenance(Node):
    """Where every figure comes from."""

    tool: str
    tool_version: str
    seed: int
    inputs: dict[Literal["model", "dataset", "evaluation", "corpus", "base"], InputRecord]
    stages: list[StageRecord]
    not_computed: dict[str, str] = Field(description="Path of each null → why it is null.")
    text_included: bool = Field(description="False: ids and figures only.")
    progress: Progress | None = Field(None, description="Null once the audit is finished.")
    timing: Timing
