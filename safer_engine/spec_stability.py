"""The spec's section on stability: what is computed once more to see whether it comes out again."""

from __future__ import annotations

from pydantic import Field

from safer_engine.spec_section import Section


class StabilitySpec(Section):
    """Whether discoveries belong to the reward model, or to one training of the SAE."""

    second_sae: bool = Field(
        False,
        description="Train a second SAE from another seed on the same activations, and say which discoveries it has too; takes "
        "the stages `sae` and `latents` about once more.",
    )
