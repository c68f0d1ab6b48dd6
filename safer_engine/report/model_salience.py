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


class SeedMatch(Node):
    """A feature's counterpart in an SAE that was trained from another seed."""

    latent_id: Count = Field(description="Of the second SAE.")
    cosine: float = Field(description="Of the decoder directions.")
    found_again: bool | None = Field(
        description="The cosine is at least the bound, and the counterpart a discovery of the same axis and sign; null where the "
        "feature is no discovery."
    )


class SeedStability(Node):
    """How far the discoveries are those of a second SAE, trained on the same activations from another seed."""

    min_cosine: float = Field(description="Decoder cosine from which on a counterpart counts as the same latent.")
    n_discoveries: Count
    n_matched: Count = Field(description="Discoveries whose counterpart is that near.")
    n_found_again: Count = Field(description="Those whose counterpart is a discovery too, of the same axis and sign.")
    found_again_share: Rate | None = Field(description="Their share of the discoveries; null without discoveries.")
    by_chance_share: Rate | None = Field(
        description="The share to be expected were counterparts drawn at random among the tested latents."
    )
    mean_cosine: float | None = Field(description="Mean largest cosine of the discoveries.")
    mean_cosine_tested: float | None = Field(description="The same of all tested latents.")
    random_mean_cosine: float = Field(description="The same of random directions, spread as the second SAE's.")
    random_matched_share: Rate = Field(description="Share of those with a counterpart as near as the bound.")
    n_second_discoveries: Count = Field(description="Discoveries of the second SAE, over all axes.")
    second_fvu: float | None = Field(description="Fraction of variance unexplained by the second SAE.")

    @property
    def words(self) -> str:
        """What it says, in a few sentences."""
        if self.found_again_share is None or self.by_chance_share is None or self.mean_cosine is None:
            return "A second SAE was trained from another seed, but there is no discovery that it could have too."
        return (
            f"A second SAE, trained from another seed, has {self.n_found_again} of the {self.n_discoveries} discoveries too "
            f"({self.found_again_share:.0%}; {self.by_chance_share:.0%} were counterparts drawn at random): decoder cosine at "
            f"least {self.min_cosine}, and a discovery there with the same sign. {self.n_matched} have a counterpart as near. "
            f"The mean largest cosine is {self.mean_cosine:.2f}, of random directions {self.random_mean_cosine:.2f}."
        )
