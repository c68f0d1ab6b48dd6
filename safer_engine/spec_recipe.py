"""How a reward model learns from pairs: what `train-rm` and the retraining of an audit have in common."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from safer_engine.spec_section import Section


class RecipeSpec(Section):
    """Bradley–Terry training of a reward model."""

    epochs: int = Field(2, ge=1, description="Passes over the pairs.")
    lr: float | None = Field(
        None, gt=0, description="Peak learning rate; default 2e-4 with LoRA, else 5e-5 below 100 M parameters and 2e-5 above."
    )
    batch: int = Field(32, ge=1, description="Pairs per optimiser step, however many forward passes that takes.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay of the matrices; biases and norms have none.")
    schedule: Literal["linear", "cosine"] = Field("linear", description="How the rate falls to zero after the warm-up.")
    warmup: float = Field(0.06, ge=0, lt=1, description="Share of the steps with a linearly rising rate.")
    clip: float = Field(1.0, gt=0, description="Largest norm of the gradient; longer ones are scaled down to it.")
    centring: float = Field(
        0.0, ge=0, description="Weight of the squared sum of a pair's two rewards, which keeps rewards near zero; 0 is off."
    )
    dropout: bool = Field(False, description="Keep the base's dropout; off, training is faster and rewards are repeatable.")
    max_length: int = Field(1024, ge=8, description="Longest sequence in tokens, or what the base can read if that is less.")
    truncation_side: Literal["left", "right"] = Field("left", description="Which end is cut from an over-long sequence.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Precision of the forward and backward pass (weights stay float32): `auto` is bfloat16 on CUDA and float32 "
        "on CPU, where bfloat16 is slower on some processors.",
    )


class LoraSpec(Section):
    """Low-rank adapters in place of all weights (arXiv 2106.09685); merged into the base when training ends."""

    rank: int = Field(16, ge=1, description="Rank of the update.")
    alpha: int = Field(32, ge=1, description="Scale of the update, in units of 1 / rank.")
    merge: bool = Field(True, description="Save the merged model; false saves the adapter.")
