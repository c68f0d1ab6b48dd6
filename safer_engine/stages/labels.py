"""Labels: what the candidates are about, over a rubric; which of them are safety features."""

from __future__ import annotations

from typing import ClassVar, Literal

from safer_engine import label_tables
from safer_engine.artifacts import Artifact, Labels, Latents, SparseAutoencoder
from safer_engine.errors import SpecError
from safer_engine.labellers import make_labeller
from safer_engine.labellers.base import Labeller
from safer_engine.labellers.corrections import label_files_digest, load_corrections
from safer_engine.labellers.rubric import load_rubric, rubric_label
from safer_engine.stage import Draft, Inputs, StageContext


class LabelsStage:
    """Has the candidates rated by the labeller of the spec and the ratings checked; what a person says stands in their place."""

    name: ClassVar[str] = "labels"
    version: ClassVar[int] = 2
    resource: ClassVar[Literal["cpu", "gpu"]] = "cpu"
    consumes: ClassVar[tuple[type[Artifact], ...]] = (SparseAutoencoder, Latents)
    produces: ClassVar[type[Artifact]] = Labels
    reads: ClassVar[tuple[str, ...]] = ("labels", "contexts")
    opens: ClassVar[tuple[str, ...]] = ("labeller",)

    def run(self, ctx: StageContext, inputs: Inputs) -> Draft:
        """See `Stage.run`."""
        from safer_engine.labellers.checking import Task, checked_labels
        from safer_engine.payload_files import write_table

        latents, spec = inputs.get(Latents), ctx.spec.labels
        expected = ctx.sources.extra.get("labels")
        if expected is not None and label_files_digest(spec) != expected:
            raise SpecError(
                f"the rubric {rubric_label(spec.rubric)} or the corrections changed while the audit ran",
                "run the same command again",
            )
        given = load_corrections(spec.corrections)
        corrections = label_tables.matching_corrections(given, inputs.get(SparseAutoencoder), latents)
        task = Task(
            candidates=label_tables.candidate_windows(latents),
            background=label_tables.background_windows(latents),
            held_out=label_tables.held_out_windows(latents),
            corrections=corrections.used,
            minimum=ctx.spec.contexts.minimum,
            seed=ctx.seed("checks"),
        )
        labeller = _labeller(ctx)
        found = checked_labels(labeller, task, spec, ctx.progress)
        marked = label_tables.mark_features(found.labels, latents, spec)
        with ctx.work.publish("labels.arrow") as path:
            write_table(path, label_tables.labels_table(found.labels, marked, labeller.name))
        meta = label_tables.facts(found, marked, spec, labeller.name)
        meta |= {"n_corrections_of_others": corrections.of_others, "n_corrections_not_candidates": corrections.not_candidates}
        for note in label_tables.remarks(meta, len(found.labels)):
            ctx.note(note)
        return Draft(meta)


def _labeller(ctx: StageContext) -> Labeller:
    spec, files = ctx.spec.labels, ctx.sources.labeller
    model = None
    if files is not None:
        from safer_engine.labellers.local_lm import LocalModel

        model = LocalModel(files, ctx.runtime.device)
    return make_labeller(spec.labeller, load_rubric(spec.rubric), label_tables.WorkAnswers(ctx.work), model)
