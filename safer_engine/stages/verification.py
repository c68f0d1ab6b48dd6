"""Stage `verification`: retrain with and without the edits and compare. Not computed in this version."""

from __future__ import annotations

from typing import ClassVar, Literal

from safer_engine.artifacts import Absent, Artifact, Verification
from safer_engine.stage import Draft, Inputs, StageContext

_REASON = "no model was retrained on the edited data: what the edits would change has not been measured"


class VerificationStage:
    """Yields `Absent`, so that every report says that its edits are recommendations, not measured gains."""

    name: ClassVar[str] = "verification"
    version: ClassVar[int] = 1
    resource: ClassVar[Literal["cpu", "gpu"]] = "cpu"
    consumes: ClassVar[tuple[type[Artifact], ...]] = ()
    produces: ClassVar[type[Artifact]] = Verification
    reads: ClassVar[tuple[str, ...]] = ()

    def run(self, ctx: StageContext, inputs: Inputs) -> Draft | Absent:
        """Say why there is nothing."""
        return Absent(_REASON)
