"""Stage `stability`: which discoveries an SAE from another seed has too."""

from __future__ import annotations

from typing import ClassVar, Literal

from safer_engine.artifacts import (
    Absent,
    Activations,
    Artifact,
    Latents,
    PairSet,
    SecondAutoencoder,
    SparseAutoencoder,
    Stability,
)
from safer_engine.stage import Draft, Inputs, StageContext


class StabilityStage:
    """Tests the second SAE's latents as the first one's were tested, and compares."""

    name: ClassVar[str] = "stability"
    version: ClassVar[int] = 1
    resource: ClassVar[Literal["cpu", "gpu"]] = "gpu"
    consumes: ClassVar[tuple[type[Artifact], ...]] = (PairSet, Activations, SparseAutoencoder, SecondAutoencoder, Latents)
    produces: ClassVar[type[Artifact]] = Stability
    reads: ClassVar[tuple[str, ...]] = ("salience", "hook")
    opens: ClassVar[tuple[str, ...]] = ()

    def run(self, ctx: StageContext, inputs: Inputs) -> Draft | Absent:
        """See `Stage.run`. An activation shard that was encoded is kept across restarts."""
        second = inputs.maybe(SecondAutoencoder)
        if isinstance(second, Absent):
            return Absent(second.reason)
        from safer_engine.payload_files import write_table
        from safer_engine.stability_tables import SecondRun, compare
        from safer_engine.stages.latents import load_sae

        device = ctx.runtime.device
        sae, other = load_sae(inputs.get(SparseAutoencoder), device), load_sae(second, device)
        tested = SecondRun(ctx, inputs.get(PairSet), inputs.get(Activations), other).tested()
        found = compare(inputs.get(Latents), sae.W_dec_SD, other.W_dec_SD, tested, ctx.seed("random directions"))
        with ctx.work.publish("stability.arrow") as path:
            write_table(path, found.table)
        facts = {name: second.meta.get(name) for name in ("fvu", "l0", "dead_share")}
        return Draft({**found.facts, "second_sae": facts})
