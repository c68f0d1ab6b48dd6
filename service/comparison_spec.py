"""What a comparison is of: the reports of two finished audits, by the keys under which the store holds them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from safer_engine.store import canonical_json, digest_bytes

VERSION = 1
"""Of what a comparison computes: it changes when the same reports would give something else."""


class ComparedAudit(BaseModel):
    """One of the two."""

    model_config = ConfigDict(extra="forbid")
    job: str = Field(description="Its job.")
    model: str = Field(description="What its spec calls the reward model.")
    report: str = Field(description="Cache key of its report.")
    content: str = Field(description="Digest of the report's contents.")


class ComparisonSpec(BaseModel):
    """Two finished audits of one project."""

    model_config = ConfigDict(extra="forbid")
    a: ComparedAudit
    b: ComparedAudit

    @property
    def key(self) -> str:
        """Cache key of the comparison: the same two reports are compared once."""
        return digest_bytes(canonical_json(["comparison", VERSION, self.a.content, self.b.content]))
