"""Stage `causal`: what ablating a latent does to the reward."""

from __future__ import annotations

from typing import ClassVar, Literal

from safer_engine.artifacts import Absent, Activations, Artifact, CausalEffects, Labels, Latents, PairSet, SparseAutoencoder
from safer_engine.stage import Draft, Inputs, StageContext

_OFF = "causal effects were switched off (causal.enabled): salience does not say what the reward would be without a latent"
_NO_RESIDUALS = "no residual streams were kept (causal.pairs is 0), so that no latent could be ablated"


class CausalStage:
    """Ranks all latents by gradient × activation and ablates the reported ones, on the pairs whose residuals were kept."""

    name: ClassVar[str] = "causal"
    version: ClassVar[int] = 3
    resource: ClassVar[Literal["cpu", "gpu"]] = "gpu"
    consumes: ClassVar[tuple[type[Artifact], ...]] = (PairSet, Activations, SparseAutoencoder, Latents, Labels)
    produces: ClassVar[type[Artifact]] = CausalEffects
    reads: ClassVar[tuple[str, ...]] = ("causal", "model")
    opens: ClassVar[tuple[str, ...]] = ("model",)

    def run(self, ctx: StageContext, inputs: Inputs) -> Draft | Absent:
        """See `Stage.run`. Finished files of residual streams are kept across restarts."""
        if not ctx.spec.causal.enabled:
            return Absent(_OFF)
        for kind in self.consumes[:-1]:
            needed = inputs.maybe(kind)
            if isinstance(needed, Absent):
                return Absent(needed.reason)
        activations = inputs.get(Activations)
        if not activations.names("residual-"):
            return Absent(_NO_RESIDUALS)
        import numpy as np

        from safer_engine import causal_tables, sae_files
        from safer_engine.causal_run import CausalRun
        from safer_engine.payload_files import write_table
        from safer_engine.science.hooks import upper_blocks
        from safer_engine.science.readings import token_ids
        from safer_engine.sources.model_loading import load_reward_model
        from safer_engine.stages.latents import load_sae

        pairs, labels = inputs.get(PairSet).pairs, inputs.maybe(Labels)
        rm = load_reward_model(ctx.sources.model, ctx.spec.model, ctx.runtime)
        layer = int(activations.meta["hook_layer"])
        ids = (token_ids(pairs, "chosen"), token_ids(pairs, "rejected"))
        rows = sae_files.ResidualRows(activations, np.ones(pairs.num_rows, dtype=bool), ids)
        sae = load_sae(inputs.get(SparseAutoencoder), ctx.runtime.device)
        run = CausalRun(ctx, rows, sae, upper_blocks(rm, layer))
        latents = inputs.get(Latents).latents
        found = run.attribution()
        choice = causal_tables.choose(latents, None if isinstance(labels, Absent) else labels.labels, found, ctx.spec.causal)
        edits, everywhere = causal_tables.edits_of(choice, found)
        sample = run.sample(pairs["pair_id"].to_pylist(), ctx.spec.causal.sample)
        ablated = run.ablation(edits, everywhere, sample)
        tables, facts = causal_tables.tables(
            causal_tables.Measured(pairs, latents, found, choice, ablated), ctx.seed("resamples")
        )
        for name, table in tables.items():
            with ctx.work.publish(name) as path:
                write_table(path, table)
        return Draft(facts)
