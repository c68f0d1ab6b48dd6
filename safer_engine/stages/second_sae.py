"""Stage `second_sae`: another SAE of the same activations, from another seed, to compare the first one with."""

from __future__ import annotations

from typing import ClassVar, Literal

from safer_engine import sae_files
from safer_engine.artifacts import Absent, Activations, Artifact, PairSet, SecondAutoencoder
from safer_engine.stage import Draft, Inputs, StageContext

NOT_ASKED = "a second SAE was not asked for (stability.second_sae)"
GIVEN = "the SAE is given (sae.given): another seed would say nothing of it"


class SecondSaeStage:
    """As stage `sae`, less its reward recovered: seeds of a stage depend on its name, so weights and order are others."""

    name: ClassVar[str] = "second_sae"
    version: ClassVar[int] = 1
    resource: ClassVar[Literal["cpu", "gpu"]] = "gpu"
    consumes: ClassVar[tuple[type[Artifact], ...]] = (PairSet, Activations)
    produces: ClassVar[type[Artifact]] = SecondAutoencoder
    reads: ClassVar[tuple[str, ...]] = ("stability", "sae", "split", "model", "hook")
    opens: ClassVar[tuple[str, ...]] = ("model", "corpus")

    def run(self, ctx: StageContext, inputs: Inputs) -> Draft | Absent:
        """See `Stage.run`. Raises NumericalError, ResourceError, Interrupted; what was trained is kept."""
        if not ctx.spec.stability.second_sae:
            return Absent(NOT_ASKED)
        if ctx.spec.sae.given is not None:
            return Absent(GIVEN)
        from safer_engine.sae_pretraining import pretrain
        from safer_engine.sae_run import SaeRun
        from safer_engine.sources.model_loading import load_reward_model

        run = SaeRun(ctx, inputs.get(PairSet), inputs.get(Activations))
        before = None
        if ctx.spec.sae.pretrain is not None:
            before = pretrain(run, load_reward_model(ctx.sources.model, ctx.spec.model, ctx.runtime))
        trained = run.train(before.sae if before is not None else None)
        metrics = run.measure(trained.sae)
        metrics |= {"dead_share": trained.dead_share, "dead_window": trained.dead_window}
        metrics |= {"training": run.training_facts(trained)}
        sae_files.publish_sae(ctx.work, trained.sae)
        sae_files.publish_curve(ctx.work, trained.curve)
        sae_files.publish_json(ctx.work, "metrics.json", metrics)
        return Draft({name: value for name, value in metrics.items() if name != "density"})
