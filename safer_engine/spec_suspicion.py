"""Parts of the spec's section on suspicion: when a pair is contested, and what people decided."""

from __future__ import annotations

from pydantic import Field

from safer_engine.spec_section import Section


class ContestedSpec(Section):
    """When a pair is open to dispute: then it is contested rather than suspicious, and no more than reviewed."""

    dissent: float = Field(
        0.25,
        gt=0,
        le=1,
        description="Smallest share of at least two annotators against the label; one who sees no difference counts half.",
    )
    weak: float | None = Field(
        None,
        description="Largest `strength` of a weak preference, in the dataset's units; default 1 (“slightly better”) for "
        "helpsteer2 and helpsteer3, else 0.",
    )
    evidence: float = Field(
        0.1,
        ge=0,
        description="Largest evidence that counts as none: change of the log-odds, or, under a rank, weighted mean of the "
        "signals in units of their root mean square.",
    )


class PairDecision(Section):
    """What a person decided on one row of the dataset."""

    content_digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of the row, as edits.jsonl has it.")
    wrong: bool | None = Field(description="Whether the label is wrong; null: left open (a `review`).")
    by: str = Field("", max_length=80, description="Who decided.")
