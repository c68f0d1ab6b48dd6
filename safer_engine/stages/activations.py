"""Stage `activations`: one pass of the reward model over the pairs gives rewards and the residual stream at the hook."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, ClassVar, Literal

from safer_engine import activation_files as files
from safer_engine.artifacts import Activations, Artifact, PairSet
from safer_engine.spec import RuntimeSpec
from safer_engine.stage import Draft, Inputs, SpecView, StageContext

if TYPE_CHECKING:
    from safer_engine.activation_pass import ActivationPass


class ActivationsStage:
    """Rewards of all pairs, and their activations in shards that are published one by one. Parts are runs of shards."""

    name: ClassVar[str] = "activations"
    version: ClassVar[int] = 2
    resource: ClassVar[Literal["cpu", "gpu"]] = "gpu"
    consumes: ClassVar[tuple[type[Artifact], ...]] = (PairSet,)
    produces: ClassVar[type[Artifact]] = Activations
    reads: ClassVar[tuple[str, ...]] = ("model", "hook", "causal.pairs", "split")
    opens: ClassVar[tuple[str, ...]] = ("model",)

    def parts(self, spec: SpecView, runtime: RuntimeSpec, inputs: Inputs) -> tuple[str, ...]:
        """See `PartedStage.parts`: the first shard alone, then several shards each."""
        return files.part_names(files.shard_count(int(inputs.get(PairSet).meta["n_pairs"]), runtime.shard_pairs))

    def run_part(self, ctx: StageContext, inputs: Inputs, part: str) -> None:
        """See `PartedStage.run_part`. Raises as `run` does."""
        pairs, shards = inputs.get(PairSet).pairs, files.part_shards(part)
        reading = _loaded(ctx, pairs.num_rows)
        if shards.start == 0:
            reading.invariance(pairs)
        reading.pairs(pairs, shards)

    def run(self, ctx: StageContext, inputs: Inputs) -> Draft:
        """See `Stage.run`. Raises ModelRefused, NumericalError, ResourceError, Interrupted."""
        pairs = inputs.get(PairSet).pairs
        reading = _loaded(ctx, pairs.num_rows)
        invariance = reading.invariance(pairs)
        parts = reading.pairs(pairs)
        info = reading.rm.info
        files.publish_head(ctx.work, parts, pairs.num_rows, info.d_head)
        files.publish_reward_table(ctx.work, "rewards.arrow", parts, pairs.column("pair_id"))
        if reading.count.batches:
            ctx.note(reading.count.sentence())
        facts = {"d_in": info.d_in, "n_blocks": info.n_blocks, "hook_layer": reading.layer, "dtype": info.dtype}
        facts |= {"hook_name": f"{info.blocks_name}.{reading.layer - 1}", "attention": info.attention}
        facts |= {"reward_model": asdict(info), "invariance": invariance}
        return Draft({**facts, **files.read_pass_facts(ctx.work), **files.count_positions(ctx.work, parts)})


def _loaded(ctx: StageContext, n_pairs: int) -> ActivationPass:
    from safer_engine.activation_pass import ActivationPass
    from safer_engine.science.hook_place import hook_layer
    from safer_engine.science.hooks import check_layer
    from safer_engine.sources.model_loading import load_reward_model

    rm = load_reward_model(ctx.sources.model, ctx.spec.model, ctx.runtime)
    layer = hook_layer(rm.info.n_blocks, ctx.spec.hook.layer, ctx.spec.hook.depth)
    check_layer(rm, layer)
    return ActivationPass(ctx, rm, layer, n_pairs)
