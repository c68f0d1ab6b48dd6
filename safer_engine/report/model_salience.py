"""Parts of the report about tests of salience, and salience by part of the data."""

from __future__ import annotations

from pydantic import Field

from safer_engine.report.nodes import Count, Node, Rate


class ClusterSalience(Node):
    """Salience of a feature in one cluster of prompts."""

    cluster: Count = Field(description="Number in `sae.latents.clusters`.")
    n_groups: Count
    salience: float
    t: float | None


class PromptCluster(Node):
    """Prompts put together by their words, without looking at labels."""

    cluster: Count
    n_groups: Count
    terms: list[str] = Field(
        default_factory=list, description="Words of the data that mark it; none where the report holds no text."
    )


class SalienceTests(Node):
    """Tests of salience by sign flips within one half of the groups; features are shown by the other half."""

    fdr: float = Field(description="False-discovery rate of the discoveries.")
    n_tests: Count = Field(description="Tests made: latents times the axes they were tested in.")
    n_tested: Count = Field(description="Latents tested in the axis that they are shown in.")
    n_draws: Count = Field(description="Flips drawn.")
    smallest_p: Rate = Field(description="No p could fall below it.")
    n_discoveries: Count = Field(description="By Benjamini and Hochberg.")
    n_discoveries_by: Count = Field(description="By Benjamini and Yekutieli: valid under any dependence.")
    n_discoveries_max_t: Count = Field(description="By max-T: `fdr` is then the chance of any false discovery.")
    n_replicated: Count = Field(description="Discoveries found again in the other half: same sign, p of t at most 0.05.")
    replicated_share: Rate | None = Field(description="Their share; null without discoveries.")
