"""Stage `sae`: trains the sparse autoencoder on the activations, or takes a given one; measures it on held-out groups."""

from __future__ import annotations

from typing import ClassVar, Literal

from safer_engine import sae_files
from safer_engine.artifacts import Activations, Artifact, PairSet, SparseAutoencoder
from safer_engine.stage import Draft, Inputs, StageContext


class SaeStage:
    """An SAE of the residual stream at the hook, with its quality measures."""

    name: ClassVar[str] = "sae"
    version: ClassVar[int] = 1
    resource: ClassVar[Literal["cpu", "gpu"]] = "gpu"
    consumes: ClassVar[tuple[type[Artifact], ...]] = (PairSet, Activations)
    produces: ClassVar[type[Artifact]] = SparseAutoencoder
    reads: ClassVar[tuple[str, ...]] = ("sae", "split", "model", "hook")
    opens: ClassVar[tuple[str, ...]] = ("model", "corpus")

    def run(self, ctx: StageContext, inputs: Inputs) -> Draft:
        """See `Stage.run`. Raises NumericalError, ResourceError, Interrupted; what was trained is kept."""
        from safer_engine.given_sae import publish_given
        from safer_engine.sae_pretraining import pretrain
        from safer_engine.sae_run import SaeRun
        from safer_engine.science.hooks import upper_blocks
        from safer_engine.sources.model_loading import load_reward_model

        activations = inputs.get(Activations)
        run = SaeRun(ctx, inputs.get(PairSet), activations)
        rm = load_reward_model(ctx.sources.model, ctx.spec.model, ctx.runtime)
        layer = int(activations.meta["hook_layer"])
        if ctx.spec.sae.given is not None:
            return publish_given(run, upper_blocks(rm, layer))
        before = pretrain(run, rm)
        trained = run.train(before.sae if before is not None else None)
        metrics = run.measure(trained.sae)
        metrics |= {"dead_share": trained.dead_share, "dead_window": trained.dead_window}
        metrics |= run.recovered(trained.sae, upper_blocks(rm, layer))
        skipped = {"status": "skipped", "reason": "no corpus is named (sae.pretrain)"}
        metrics |= {"training": run.training_facts(trained), "pretraining": before.facts if before is not None else skipped}
        sae_files.publish_sae(ctx.work, trained.sae)
        sae_files.publish_curve(ctx.work, trained.curve)
        sae_files.publish_json(ctx.work, "metrics.json", metrics)
        return Draft({name: value for name, value in metrics.items() if name != "density"})
