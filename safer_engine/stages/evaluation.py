"""Stage `evaluation`: pairs that only measure, read as the dataset's are, and the reward model's rewards on them."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

from safer_engine.artifacts import Absent, Artifact, EvaluationSet, PairSet
from safer_engine.evaluation_pairs import NO_EVALUATION, EvaluationInput, read_evaluation, shortage
from safer_engine.stage import Draft, Inputs, StageContext


class EvaluationStage:
    """Apart from the other stages, so that another evaluation set changes nothing of what the dataset gave."""

    name: ClassVar[str] = "evaluation"
    version: ClassVar[int] = 3
    resource: ClassVar[Literal["cpu", "gpu"]] = "gpu"
    consumes: ClassVar[tuple[type[Artifact], ...]] = (PairSet,)
    produces: ClassVar[type[Artifact]] = EvaluationSet
    reads: ClassVar[tuple[str, ...]] = ("model", "evaluation")
    opens: ClassVar[tuple[str, ...]] = ("model", "evaluation")

    def run(self, ctx: StageContext, inputs: Inputs) -> Draft | Absent:
        """See `Stage.run`. Raises DatasetRefused, ModelRefused, NumericalError, ResourceError, Interrupted."""
        if ctx.sources.evaluation is None:
            return Absent(NO_EVALUATION)
        counts = _pairs(ctx, inputs.get(PairSet))
        short = shortage(counts, ctx.spec.evaluation.min_pairs)
        if short:
            ctx.note(f"warning: {short}")
        if not counts["n_kept"]:
            return Absent(short)
        _rewards(ctx)
        facts = {"n_pairs": counts["n_kept"], **{name: counts[name] for name in ("n_groups", "tokens", "axes", "subsets")}}
        return Draft({**facts, "layout": counts["layout"], "min_pairs": ctx.spec.evaluation.min_pairs, "too_few": bool(short)})


def _pairs(ctx: StageContext, dataset: PairSet) -> dict[str, Any]:
    """Publish the usable pairs, if any, and what became of all; not twice."""
    from safer_engine.sources.tokenizers import load_renderer

    source, spec = ctx.sources.evaluation, ctx.spec.evaluation
    if ctx.work.has("health.json"):
        return dict(json.loads(ctx.work.path("health.json").read_bytes()))
    assert source is not None
    renderer = load_renderer(ctx.sources.model.path, ctx.spec.model, ctx.runtime.trust_remote_code)
    with ctx.work.publish("eval.arrow") as path:
        pulse = lambda done, total: ctx.progress(done, total, "pairs")  # noqa: E731
        counts, _ = read_evaluation(path, EvaluationInput(source, spec, ctx.base_seed, dataset), renderer, pulse)
    if not counts["n_kept"]:
        ctx.work.remove("eval.arrow")
        return counts
    with ctx.work.publish("health.json") as path:
        path.write_text(json.dumps(counts, ensure_ascii=False, sort_keys=True), encoding="utf-8")
    if counts["dropped"]:
        ctx.note(f"evaluation: kept {counts['n_kept']} of {counts['n_in']} pairs; dropped {counts['dropped']}")
    return counts


def _rewards(ctx: StageContext) -> None:
    import pyarrow as pa

    from safer_engine import activation_files as files
    from safer_engine.reward_pass import read_rewards
    from safer_engine.sources.model_loading import load_reward_model

    with pa.memory_map(str(ctx.work.path("eval.arrow"))) as source:
        table = pa.ipc.open_file(source).read_all()
    rm = load_reward_model(ctx.sources.model, ctx.spec.model, ctx.runtime)
    parts = read_rewards(ctx, rm, table, "eval")
    files.publish_reward_table(ctx.work, "eval_rewards.arrow", parts.names, table.column("pair_id"))
    if parts.count.batches:
        ctx.note(parts.count.sentence())
