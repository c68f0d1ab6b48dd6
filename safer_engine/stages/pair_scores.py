"""Evidence about each pair: signals, suspicion, and the latents behind them."""

from __future__ import annotations

from dataclasses import asdict
from typing import ClassVar, Literal

from safer_engine.artifacts import Activations, Artifact, Labels, Latents, PairScores, PairSet, RetrainedMargins
from safer_engine.signal_inputs import signal_inputs
from safer_engine.stage import Draft, Inputs, StageContext


class PairScoresStage:
    """See `PairScores` for what is written."""

    name: ClassVar[str] = "pair_scores"
    version: ClassVar[int] = 5
    resource: ClassVar[Literal["cpu", "gpu"]] = "cpu"
    consumes: ClassVar[tuple[type[Artifact], ...]] = (PairSet, Activations, Latents, Labels, RetrainedMargins)
    produces: ClassVar[type[Artifact]] = PairScores
    reads: ClassVar[tuple[str, ...]] = ("suspicion",)
    opens: ClassVar[tuple[str, ...]] = ()

    def run(self, ctx: StageContext, inputs: Inputs) -> Draft:
        """Score every pair; signals whose inputs are absent are left out and named in meta."""
        import numpy as np

        from safer_engine.decisions import decisions_digest, load_decisions
        from safer_engine.errors import SpecError
        from safer_engine.pair_score_table import pair_score_table
        from safer_engine.pair_verdicts import apply_decisions, standing
        from safer_engine.payload_files import write_table
        from safer_engine.science.pair_scoring import ScoringParams, score_pairs

        spec, pairs = ctx.spec.suspicion, inputs.get(PairSet)
        wanted = {"paper": 1.0} if spec.estimator == "paper" else dict(spec.signals)
        data = signal_inputs(
            pairs,
            inputs.get(Activations),
            inputs.maybe(Latents),
            inputs.maybe(Labels),
            retrained=inputs.maybe(RetrainedMargins),
            signals={*wanted, "dense"} if {"latents", "knn"} & set(wanted) else wanted,
            progress=lambda done, total: ctx.progress(done, total, "shards"),
        )
        params = ScoringParams(
            weights=wanted,
            estimator=spec.estimator,
            folds=spec.folds,
            shrinkage=spec.shrinkage,
            neighbours=spec.neighbours,
            seed=ctx.seed("folds"),
            labels_seen=spec.labels_seen,
        )
        scoring = score_pairs(data, params)
        for name, reason in scoring.left_out.items():
            ctx.note(f"signal {name} is left out: {reason}")
        decisions = load_decisions(spec.decisions)
        expected = ctx.sources.digest("suspicion")
        if expected is not None and decisions_digest(decisions) != expected:
            raise SpecError("the decisions changed while the audit ran", "run the same command again")
        decided = apply_decisions(scoring, pairs.pairs, decisions, params.seed)
        scoring = decided.scoring
        standings = standing(scoring, pairs.pairs, pairs.meta["layout"], spec)
        table = pair_score_table(pairs.pairs, data.margins_P, scoring, standings)
        with ctx.work.publish("pair_scores.arrow") as path:
            write_table(path, table)
        return Draft(
            {
                "estimator": spec.estimator,
                "signals": {name: {"weight": weight, "used": name in scoring.signals} for name, weight in wanted.items()},
                "left_out": scoring.left_out,
                "folds": scoring.folds,
                "doubts": {axis: asdict(doubt) for axis, doubt in scoring.doubts.items()},
                "decisions": decided.meta,
                "standing": standings.counts(pairs.pairs["axis"].to_pylist()),
                "n_pairs": table.num_rows,
                "n_without_suspicion": int(np.isnan(scoring.suspicion_P).sum()),
            }
        )
