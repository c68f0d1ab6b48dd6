"""Stage `causal`: what ablating a latent does to the reward. Not computed in this version."""

from __future__ import annotations

from typing import ClassVar, Literal

from safer_engine.artifacts import Absent, Artifact, CausalEffects
from safer_engine.stage import Draft, Inputs, StageContext

_REASON = (
    "causal effects are not computed in this version: salience shows how a latent fires with the label, "
    "not what the reward would be without it"
)


class CausalStage:
    """Yields `Absent`, so that every report says that its features are correlational."""

    name: ClassVar[str] = "causal"
    version: ClassVar[int] = 1
    resource: ClassVar[Literal["cpu", "gpu"]] = "cpu"
    consumes: ClassVar[tuple[type[Artifact], ...]] = ()
    produces: ClassVar[type[Artifact]] = CausalEffects
    reads: ClassVar[tuple[str, ...]] = ()

    def run(self, ctx: StageContext, inputs: Inputs) -> Draft | Absent:
        """Say why there is nothing."""
        return Absent(_REASON)
