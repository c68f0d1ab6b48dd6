"""The spec's section on causal effects."""

from __future__ import annotations

from pydantic import Field

from safer_engine.spec_section import Section


class CausalSpec(Section):
    """Ablation of the reported latents."""

    pairs: int = Field(512, ge=0, description="Pairs whose full-sequence residuals are kept for runs of the upper blocks.")
    enabled: bool = Field(True, description="Measure causal effects on the pairs kept; False leaves the stage out.")
    features: int = Field(32, gt=0, le=512, description="Features ablated: safety features first, then the most salient latents.")
    attributed: int = Field(8, ge=0, le=512, description="Latents ablated besides: those of largest gradient × activation.")
    controls: int = Field(16, ge=0, le=512, description="Control latents ablated, to compare first-order effects with.")
    control_sets: int = Field(4, ge=0, le=64, description="Sets of controls, ablated as the set of all safety features is.")
    sample: int = Field(64, ge=0, description="Pairs of those kept that mean-ablation is run on.")
