"""Latents: activations of all latents per response, their salience, and where the candidates fire most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from safer_engine.artifacts import Activations, Artifact, Latents, PairSet, SparseAutoencoder
from safer_engine.errors import ArtifactError
from safer_engine.stage import Draft, Inputs, StageContext

if TYPE_CHECKING:
    from safer_engine.science.sae import Sae

_BACKGROUND = 512


class LatentsStage:
    """Encodes each activation shard once (a finished shard is kept across restarts), then ranks and cuts out contexts."""

    name: ClassVar[str] = "latents"
    version: ClassVar[int] = 2
    resource: ClassVar[Literal["cpu", "gpu"]] = "gpu"
    consumes: ClassVar[tuple[type[Artifact], ...]] = (PairSet, Activations, SparseAutoencoder)
    produces: ClassVar[type[Artifact]] = Latents
    reads: ClassVar[tuple[str, ...]] = ("salience", "contexts", "hook")
    opens: ClassVar[tuple[str, ...]] = ()

    def run(self, ctx: StageContext, inputs: Inputs) -> Draft:
        """See `Stage.run`."""
        from safer_engine import latent_files, latent_tables, latent_tests
        from safer_engine.held_out_tables import held_out_windows
        from safer_engine.payload_files import write_table
        from safer_engine.science.contexts import merge_contexts
        from safer_engine.science.latent_acts import add_totals

        pairs, activations = inputs.get(PairSet), inputs.get(Activations)
        strata = latent_tables.Strata.of(pairs.pairs, ctx.seed("halves"))
        sae = load_sae(inputs.get(SparseAutoencoder), ctx.runtime.device)
        job = latent_files.ShardJob(ctx, activations, sae, strata.groups_P)
        fragments = job.fragments()
        with ctx.work.publish("acts.safetensors") as path:
            latent_files.write_acts(path, fragments, pairs.pairs.num_rows)
        acts = latent_files.open_acts(ctx.work.path("acts.safetensors"), sae.shape.d_sae)
        totals = add_totals([fragment.totals for fragment in fragments])
        spec = ctx.spec.salience
        ranking = latent_tables.rank(acts, totals, strata, spec, ctx.seed("flips"))
        shown = latent_tables.shown_half(strata, ranking, pairs.pairs, spec.clusters)
        evidence = None if ranking.tests is None else latent_tests.candidate_evidence(acts, shown, "paired_mean")
        parts = [fragment.contexts for fragment in fragments]
        found = merge_contexts(parts, ctx.spec.contexts.per_latent, strata.groups_P)
        contexts = found.of(ranking.candidates)
        spans = latent_tables.spans_of(pairs.pairs, contexts, ctx.spec.contexts.window)
        windows = job.windows(fragments, contexts, spans)
        region, window = ctx.spec.hook.region, ctx.spec.contexts.window
        tables: dict[str, Any] = {
            "latents.arrow": latent_tables.latents_table(totals, ranking, evidence),
            "axes.arrow": ranking.axes,
            "subsets.arrow": ranking.subsets,
            "clusters.arrow": latent_tests.clusters_table(evidence),
            "contexts.arrow": latent_tables.contexts_table(pairs.pairs, contexts, spans, windows),
            "background.arrow": latent_tables.background_table(pairs.pairs, region, window, _BACKGROUND, ctx.seed("background")),
            "checks.arrow": held_out_windows(job, fragments, pairs.pairs, contexts),
        }
        for name, table in tables.items():
            with ctx.work.publish(name) as path:
                write_table(path, table)
        return Draft(latent_tables.facts(spec, totals, ranking, evidence))


def load_sae(stored: SparseAutoencoder, device: str) -> Sae:
    """The trained SAE on the device that was asked for."""
    import torch
    from safetensors.torch import load_file

    from safer_engine.science.sae import Sae

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not stored.has("sae.safetensors"):
        raise ArtifactError("the SAE artifact has no weights", "remove it from the store and run again")
    return Sae.restore(load_file(stored.path("sae.safetensors")), stored.json("sae.json")).to(device)
