"""Labels: what the candidates are about, over a rubric; which of them are safety features."""

from __future__ import annotations

from typing import ClassVar, Literal

from safer_engine.artifacts import Artifact, Labels, Latents
from safer_engine.errors import SpecError
from safer_engine.label_tables import WorkAnswers, background_windows, candidate_windows, facts, labels_table, mark_features
from safer_engine.labellers import make_labeller
from safer_engine.labellers.base import label_all
from safer_engine.labellers.rubric import load_rubric, rubric_digest
from safer_engine.stage import Draft, Inputs, StageContext


class LabelsStage:
    """Has the candidates rated by the labeller of the spec; only what was rated can become a safety feature."""

    name: ClassVar[str] = "labels"
    version: ClassVar[int] = 1
    resource: ClassVar[Literal["cpu", "gpu"]] = "cpu"
    consumes: ClassVar[tuple[type[Artifact], ...]] = (Latents,)
    produces: ClassVar[type[Artifact]] = Labels
    reads: ClassVar[tuple[str, ...]] = ("labels", "contexts")
    opens: ClassVar[tuple[str, ...]] = ()

    def run(self, ctx: StageContext, inputs: Inputs) -> Draft:
        """See `Stage.run`."""
        from safer_engine.payload_files import write_table

        latents, spec = inputs.get(Latents), ctx.spec.labels
        expected = ctx.sources.digest("labels")
        if expected is not None and rubric_digest(spec.rubric) != expected:
            raise SpecError(f"the rubric {spec.rubric} changed while the audit ran", "run the same command again")
        labeller = make_labeller(spec.labeller, load_rubric(spec.rubric), WorkAnswers(ctx.work))
        found = label_all(
            labeller,
            candidate_windows(latents),
            background_windows(latents),
            ctx.spec.contexts.minimum,
            lambda done, total: ctx.progress(done, total, "latents"),
        )
        marked = mark_features(found.labels, latents, spec)
        with ctx.work.publish("labels.arrow") as path:
            write_table(path, labels_table(found.labels, marked, labeller.name))
        meta = {**facts(found, marked, spec.rubric, labeller.name), "min_rating": spec.min_rating}
        unusable = sum(meta["counts"].get(status, 0) for status in ("unparsed", "error", "skipped"))
        if unusable:
            ctx.note(f"{unusable} of {len(found.labels)} candidates got no label and cannot be safety features")
        return Draft(meta)
