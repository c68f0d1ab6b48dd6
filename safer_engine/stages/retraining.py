"""Stage `retraining`: reward models trained without a part of the pairs, and what they make of that part."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from safer_engine.artifacts import Absent, Artifact, PairSet, RetrainedMargins
from safer_engine.stage import Draft, Inputs, StageContext

NOT_ASKED = "not asked for: section retraining of the spec names no base model to train from, or no folds"
_RESAMPLES = 2000


class RetrainingStage:
    """Apart from the pair scores, so that nothing is trained again when suspicion is made in another way."""

    name: ClassVar[str] = "retraining"
    version: ClassVar[int] = 1
    resource: ClassVar[Literal["cpu", "gpu"]] = "gpu"
    consumes: ClassVar[tuple[type[Artifact], ...]] = (PairSet,)
    produces: ClassVar[type[Artifact]] = RetrainedMargins
    reads: ClassVar[tuple[str, ...]] = ("dataset", "retraining")
    asked_by: ClassVar[str] = "retraining.folds"
    opens: ClassVar[tuple[str, ...]] = ("dataset", "base")

    def run(self, ctx: StageContext, inputs: Inputs) -> Draft | Absent:
        """See `Stage.run`. Raises as `fold_margins`."""
        import numpy as np

        from safer_engine.base_trainings import BaseTrainings, Watch, training_spec
        from safer_engine.retraining import FoldedPairs, fold_margins
        from safer_engine.science.folds import group_folds
        from safer_engine.science.stats import group_bootstrap_mean

        spec, pairs = ctx.spec.retraining, inputs.get(PairSet)
        if spec is None or ctx.sources.base is None or not spec.folds:
            return Absent(NOT_ASKED)
        groups = pairs.pairs["group"].to_pylist()
        folded = FoldedPairs(ctx.sources.dataset, pairs, group_folds(groups, spec.folds, ctx.seed("folds")))
        training = training_spec(spec.base, spec.recipe, spec.lora, ctx.spec.dataset, ctx.base_seed, ctx.runtime)
        watch = Watch(lambda done, total, unit: ctx.observer.progress(ctx.stage, done, total, unit), ctx.observer.cancelled)
        found = fold_margins(BaseTrainings.of(training, ctx.sources.base, ctx.work, watch, "retraining"), folded)
        _publish(ctx, folded, found.margins_P)
        read = np.isfinite(found.margins_P)
        n_unread = int((~read).sum())
        if n_unread:
            ctx.note(f"the base cannot read {n_unread} of {len(read)} pairs: they have no retrained margin")
        facts = {
            "folds": int(folded.folds_P.max()) + 1,
            "n_pairs": len(read),
            "n_unread": n_unread,
            "steps": found.steps,
            "tokens": found.tokens,
        }
        rng = np.random.default_rng(ctx.seed("interval"))
        right = group_bootstrap_mean(found.margins_P[read] > 0, np.asarray(groups)[read], _RESAMPLES, rng)
        accuracy = {"accuracy": right.estimate, "accuracy_lo": right.lo, "accuracy_hi": right.hi}
        return Draft({**facts, **accuracy, "base": found.base})


def _publish(ctx: StageContext, folded: Any, margins_P: Any) -> None:
    import numpy as np
    import pyarrow as pa

    from safer_engine.payload_files import write_table

    columns = {
        "pair": pa.array(np.arange(len(margins_P)), pa.int32()),
        "pair_id": folded.pairs.pairs["pair_id"].combine_chunks(),
        "fold": pa.array(folded.folds_P, pa.int32()),
        "margin": pa.array(margins_P, pa.float64(), mask=np.isnan(margins_P)),
    }
    with ctx.work.publish("retrained.arrow") as path:
        write_table(path, pa.table(columns))
