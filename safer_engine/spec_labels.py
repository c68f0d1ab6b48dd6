"""The spec's section on labels: who rates the candidates, how the ratings are checked, what a person corrects."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from safer_engine.spec_section import Section


class LexiconLabeller(Section):
    """Offline labeller: shares of rubric terms in the contexts against a background."""

    kind: Literal["lexicon"] = "lexicon"


class ChatApiLabeller(Section):
    """Any OpenAI-compatible chat endpoint."""

    kind: Literal["chat_api"] = "chat_api"
    base_url: str = Field(description="Endpoint, for example https://host/v1.")
    model: str = Field(description="Model name sent to the endpoint.")
    api_key_env: str | None = Field("OPENAI_API_KEY", description="Environment variable that holds the key.")
    timeout: float = Field(60.0, gt=0, le=3600, description="Seconds per request.")
    retries: int = Field(4, ge=0, le=20, description="Retries after 408, 409, 429, 5xx or a broken connection.")
    max_tokens: int = Field(400, gt=0, description="Longest answer, in tokens.")
    price_in: float = Field(0.0, ge=0, description="Price of a million prompt tokens, in your currency.")
    price_out: float = Field(0.0, ge=0, description="Price of a million answer tokens.")
    max_cost: float | None = Field(
        None, ge=0, description="Stop asking when this much is spent, checks and second readings included; the rest is `skipped`."
    )
    max_calls: int = Field(2000, gt=0, description="Stop asking after this many calls.")


class LocalLmLabeller(Section):
    """A causal language model of Transformers on this machine; safetensors only, no code of its own."""

    kind: Literal["local_lm"] = "local_lm"
    path: str = Field(description="Local folder, or hub id with an optional revision: `org/name@revision`.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Precision; `auto` is bfloat16 on CUDA and float32 on CPU."
    )
    max_tokens: int = Field(400, gt=0, le=8192, description="Longest answer, in tokens.")
    max_prompt: int = Field(8192, ge=256, description="Longest prompt, in tokens; what is longer is not asked (`error`).")


Labeller = Annotated[LexiconLabeller | ChatApiLabeller | LocalLmLabeller, Field(discriminator="kind")]
ShortText = Annotated[str, StringConstraints(min_length=1, max_length=60)]


class Correction(Section):
    """What a person says of one latent of one SAE; it stands in place of the labeller's rating."""

    sae: str = Field(
        pattern=r"^[0-9a-f]{64}$",
        description="sha256 of the SAE's weights: `sae.digest` in report.json. Another SAE's is not used.",
    )
    latent_id: int = Field(ge=0, description="Which latent of it.")
    rating: int = Field(ge=1, le=5, description="Relevance to the rubric.")
    explanation: str = Field(min_length=1, max_length=1200, description="What it responds to.")
    direction: str | None = Field(None, description="One of the rubric's directions.")
    terms: tuple[ShortText, ...] = Field((), max_length=8, description="Words that mark its contexts.")
    by: str = Field(min_length=1, max_length=80, description="Who says so, as the report is to name them.")


class LabelSpec(Section):
    """Which candidates are safety features."""

    rubric: str = Field("safety", description="Built-in rubric, path of a rubric file (YAML), or its text.")
    labeller: Labeller = Field(default_factory=LexiconLabeller, description="Who rates.")
    min_rating: int = Field(4, ge=1, le=5, description="Smallest rating (1–5) of a safety feature; the paper keeps 5.")
    keep: int = Field(32, gt=0, description="At most this many safety features, in the order of the candidates.")
    detection_floor: float | None = Field(
        0.65,
        ge=0,
        le=1,
        description="Labels that tell held-out contexts apart with less than this balanced accuracy are `unverified`, and no "
        "safety features; 0 measures only, null does not ask.",
    )
    repeats: float = Field(
        0.25, ge=0, le=1, description="Share of the candidates rated once more, with their contexts in another order."
    )
    corrections: str | tuple[Correction, ...] | None = Field(
        None, description="What a person says in place of the labeller: path of a YAML, JSON or JSONL file, or the entries."
    )
