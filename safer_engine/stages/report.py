"""Stage `report`: everything that was found, for people and for scripts."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from safer_engine.artifacts import (
    Activations,
    Artifact,
    CausalEffects,
    Edits,
    EvaluationSet,
    Labels,
    Latents,
    PairScores,
    PairSet,
    Report,
    RetrainedMargins,
    SecondAutoencoder,
    SparseAutoencoder,
    Stability,
    Verification,
)
from safer_engine.spec import AuditSpec
from safer_engine.stage import Draft, Inputs, StageContext


class ReportStage:
    """See `Report` for what is written. The report prints the whole spec, so all of it but `runtime` enters the key."""

    name: ClassVar[str] = "report"
    version: ClassVar[int] = 9
    resource: ClassVar[Literal["cpu", "gpu"]] = "cpu"
    consumes: ClassVar[tuple[type[Artifact], ...]] = (
        PairSet,
        Activations,
        EvaluationSet,
        SparseAutoencoder,
        Latents,
        Labels,
        CausalEffects,
        RetrainedMargins,
        PairScores,
        Edits,
        SecondAutoencoder,
        Stability,
        Verification,
    )
    produces: ClassVar[type[Artifact]] = Report
    reads: ClassVar[tuple[str, ...]] = tuple(name for name in AuditSpec.model_fields if name != "runtime")
    opens: ClassVar[tuple[str, ...]] = ()

    def run(self, ctx: StageContext, inputs: Inputs) -> Draft:
        """Build the report and write its files."""
        from safer_engine.report.build import ReportRequest
        from safer_engine.report.write import utc_now, write_report

        sections: dict[str, Any] = {name: getattr(ctx.spec, name) for name in self.reads}
        spec = AuditSpec(**sections, runtime=ctx.runtime)
        found = {kind: inputs.maybe(kind) for kind in self.consumes}
        document = write_report(ReportRequest(spec, ctx.sources, found, utc_now()), ctx.work.publish)
        return Draft({"schema_version": document.schema_version, "not_computed": document.provenance.not_computed})
