"""Stage `pairs`: a dataset becomes canonical, tokenised preference pairs."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

from safer_engine.artifacts import Artifact, PairSet
from safer_engine.pair_tables import (
    health,
    refuse_one_group,
    refuse_too_few,
    refuse_unrenderable,
    survey,
    write_pairs,
    write_prompt_keys,
    write_rows,
)
from safer_engine.sources.tokenizers import load_renderer
from safer_engine.stage import Draft, Inputs, StageContext


class PairsStage:
    """Reads, checks, groups, samples and renders the dataset."""

    name: ClassVar[str] = "pairs"
    version: ClassVar[int] = 4
    resource: ClassVar[Literal["cpu", "gpu"]] = "cpu"
    consumes: ClassVar[tuple[type[Artifact], ...]] = ()
    produces: ClassVar[type[Artifact]] = PairSet
    reads: ClassVar[tuple[str, ...]] = ("model", "dataset")
    opens: ClassVar[tuple[str, ...]] = ("model", "dataset")

    def run(self, ctx: StageContext, inputs: Inputs) -> Draft:
        """See `Stage.run`. Raises DatasetRefused or ModelRefused when the pairs can't be read or too few are left."""
        renderer = load_renderer(ctx.sources.model.path, ctx.spec.model, ctx.runtime.trust_remote_code)
        surveyed = survey(ctx.sources.dataset, ctx.spec.dataset, ctx.seed("sample"))
        total = len(surveyed.entries)
        with ctx.work.publish("pairs.arrow") as path:
            written = write_pairs(path, ctx.sources.dataset, surveyed, renderer, lambda n: ctx.progress(n, total, "pairs"))
        refuse_unrenderable(written)
        with ctx.work.publish("rows.arrow") as path:
            write_rows(path, surveyed, written)
        with ctx.work.publish("prompts.arrow") as path:
            write_prompt_keys(path, surveyed)
        counts = health(surveyed, written)
        refuse_too_few(counts, ctx.spec.dataset.min_pairs)
        refuse_one_group(counts)
        if counts["dropped"]:
            ctx.note(f"pairs.arrow: kept {counts['n_kept']} of {counts['n_in']} pairs; dropped {counts['dropped']}")
        with ctx.work.publish("health.json") as path:
            path.write_text(json.dumps({"dataset": counts}, ensure_ascii=False, sort_keys=True))
        return Draft(_meta(counts, renderer))


def _meta(counts: dict[str, Any], renderer: Any) -> dict[str, Any]:
    facts = {"n_pairs": counts["n_kept"], "n_groups": counts["n_groups"], "tokens": counts["tokens"]}
    reading = {"template": renderer.template, "max_length": renderer.max_length, "layout": counts["layout"]}
    return {**facts, **reading, "axes": counts["axes"], "subsets": counts["subsets"]}
