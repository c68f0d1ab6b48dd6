"""Stage `pairs`: a dataset becomes canonical, tokenised preference pairs."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

from safer_engine.artifacts import Artifact, PairSet
from safer_engine.pair_tables import Survey, Written, health, refuse_one_group, refuse_too_few, survey, write_pairs, write_rows
from safer_engine.sources.tokenizers import load_renderer
from safer_engine.stage import Draft, Inputs, StageContext


class PairsStage:
    """Reads, checks, groups, samples and renders the dataset and the evaluation set."""

    name: ClassVar[str] = "pairs"
    version: ClassVar[int] = 1
    resource: ClassVar[Literal["cpu", "gpu"]] = "cpu"
    consumes: ClassVar[tuple[type[Artifact], ...]] = ()
    produces: ClassVar[type[Artifact]] = PairSet
    reads: ClassVar[tuple[str, ...]] = ("model", "dataset", "evaluation")

    def run(self, ctx: StageContext, inputs: Inputs) -> Draft:
        """See `Stage.run`. Raises DatasetRefused or ModelRefused when the pairs can't be read or too few are left."""
        from safer_engine.science.pairs import prompt_keys

        renderer = load_renderer(ctx.sources.model.path, ctx.spec.model, ctx.runtime.trust_remote_code)
        dataset = survey(ctx.sources.dataset, ctx.spec.dataset, ctx.seed("sample"))
        counts = self._write(ctx, "pairs.arrow", dataset, renderer)
        evaluation = None
        if ctx.sources.evaluation is not None:
            keys = prompt_keys(dataset.candidates)
            apart = survey(ctx.sources.evaluation, ctx.spec.evaluation, ctx.seed("evaluation sample"), keys)
            evaluation = self._write(ctx, "eval.arrow", apart, renderer)
        with ctx.work.publish("health.json") as path:
            path.write_text(json.dumps({"dataset": counts, "evaluation": evaluation}, ensure_ascii=False, sort_keys=True))
        return Draft(_meta(counts, evaluation, renderer))

    def _write(self, ctx: StageContext, name: str, surveyed: Survey, renderer: Any) -> dict[str, Any]:
        of_dataset = name == "pairs.arrow"
        source = ctx.sources.dataset if of_dataset else ctx.sources.evaluation
        spec = ctx.spec.dataset if of_dataset else ctx.spec.evaluation
        assert source is not None
        total = len(surveyed.entries)
        with ctx.work.publish(name) as path:
            written: Written = write_pairs(path, source, surveyed, renderer, lambda n: ctx.progress(n, total, "pairs"))
        if of_dataset:
            with ctx.work.publish("rows.arrow") as path:
                write_rows(path, surveyed, written)
        counts = health(surveyed, written)
        refuse_too_few(counts, spec.min_pairs, "the dataset" if of_dataset else "the evaluation set")
        if of_dataset:
            refuse_one_group(counts)
        if counts["dropped"]:
            ctx.note(f"{name}: kept {counts['n_kept']} of {counts['n_in']} pairs; dropped {counts['dropped']}")
        return counts


def _meta(counts: dict[str, Any], evaluation: dict[str, Any] | None, renderer: Any) -> dict[str, Any]:
    facts = {"n_pairs": counts["n_kept"], "n_groups": counts["n_groups"], "n_eval": evaluation["n_kept"] if evaluation else 0}
    sizes = {"tokens": counts["tokens"], "tokens_eval": evaluation["tokens"] if evaluation else 0}
    reading = {"template": renderer.template, "max_length": renderer.max_length, "layout": counts["layout"]}
    return {**facts, **sizes, **reading, "axes": counts["axes"], "subsets": counts["subsets"]}
