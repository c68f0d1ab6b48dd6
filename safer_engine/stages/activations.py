"""Stage `activations`: one pass of the reward model over the pairs gives rewards and the residual stream at the hook."""

from __future__ import annotations

from dataclasses import asdict
from typing import ClassVar, Literal

from safer_engine import activation_files as files
from safer_engine.artifacts import Activations, Artifact, PairSet
from safer_engine.stage import Draft, Inputs, StageContext


class ActivationsStage:
    """Rewards of all pairs, and their activations in shards that are published one by one."""

    name: ClassVar[str] = "activations"
    version: ClassVar[int] = 2
    resource: ClassVar[Literal["cpu", "gpu"]] = "gpu"
    consumes: ClassVar[tuple[type[Artifact], ...]] = (PairSet,)
    produces: ClassVar[type[Artifact]] = Activations
    reads: ClassVar[tuple[str, ...]] = ("model", "hook", "causal", "split")

    def run(self, ctx: StageContext, inputs: Inputs) -> Draft:
        """See `Stage.run`. Raises ModelRefused, NumericalError, ResourceError, Interrupted."""
        from safer_engine.activation_pass import ActivationPass
        from safer_engine.science.hooks import check_layer
        from safer_engine.science.reward_model import hook_layer
        from safer_engine.sources.model_loading import load_reward_model

        pairs = inputs.get(PairSet).pairs
        rm = load_reward_model(ctx.sources.model, ctx.spec.model, ctx.runtime)
        layer = hook_layer(rm.info.n_blocks, ctx.spec.hook.layer, ctx.spec.hook.depth)
        check_layer(rm, layer)
        reading = ActivationPass(ctx, rm, layer, pairs.num_rows)
        invariance = reading.invariance(pairs)
        parts = reading.pairs(pairs)
        files.publish_head(ctx.work, parts, pairs.num_rows, rm.info.d_head)
        files.publish_reward_table(ctx.work, "rewards.arrow", parts, pairs.column("pair_id"))
        if reading.count.batches:
            ctx.note(reading.count.sentence())
        info = rm.info
        facts = {"d_in": info.d_in, "n_blocks": info.n_blocks, "hook_layer": layer, "dtype": info.dtype}
        facts |= {"hook_name": f"{info.blocks_name}.{layer - 1}", "attention": info.attention}
        facts |= {"reward_model": asdict(info), "invariance": invariance}
        return Draft({**facts, **files.read_pass_facts(ctx.work), **files.count_positions(ctx.work, len(parts))})
