"""The words that a report uses, each explained once."""

from __future__ import annotations

GLOSSARY: tuple[tuple[str, str], ...] = (
    (
        "Pair, chosen, rejected",
        "Two responses to one prompt, and which of them the data call the better. The label is that choice.",
    ),
    ("Group", "Pairs linked by a prompt or a response. Splits, folds and intervals never cut through a group."),
    ("Axis, subset", "A column of the data (for example safety, chat), and a finer one. Suspicion is ranked within an axis."),
    ("Reward margin", "Reward of the chosen response minus that of the rejected one, in the reward model's own units."),
    ("Pair accuracy", "Share of pairs with a reward margin above zero. Equal rewards are not counted as right."),
    ("Latent", "One unit of the sparse autoencoder, not interpreted. A feature is a latent with a label."),
    ("Safety feature", "A feature that the labeller rated as relevant to the rubric, at or above the spec's rating."),
    ("Detection", "How well a label tells, in contexts held out when it was made, where its latent fires; 0.5 is guessing."),
    (
        "Salience",
        "How much more a latent fires on chosen (+) than on rejected (−) responses, between −1 and 1, with its interval.",
    ),
    (
        "Discovery, q",
        "A latent whose salience chance hardly explains: q is the share of false ones to expect among those of its q or less. "
        "Tested on one half of the groups; its salience is that of the other half. Found again: significant there too. In a "
        "second SAE: one trained from another seed has nearly the same direction, and it is a discovery of the same sign there.",
    ),
    (
        "Length-bound, mixed",
        "Length-bound: its salience goes with a difference of length, and is not there at equal length. Mixed: its sign differs "
        "between parts of the data.",
    ),
    ("FVU, variance explained", "Fraction of the activations' variance that the autoencoder does not explain; one minus it."),
    ("L0", "Mean number of latents active at a position."),
    ("Dead latent", "A latent that did not fire for a long stretch of training. Silent: it fires at no held-out position."),
    ("Reward recovered", "What is left of rewards and preferences when activations are replaced by their reconstruction."),
    ("Context", "A text window where a latent fires strongly. Shading is its activation at each token."),
    ("Causal effect", "Change of the reward margin when a latent is removed from the activations."),
    ("Pair score", "The paper's score: signed activation of safety features, chosen minus rejected (arXiv 2507.00665)."),
    ("Suspicion", "How likely the label contradicts the evidence, from 0 to 1. As a rank it orders pairs and is no probability."),
    ("Evidence", "What single latents contribute to a pair's signal: positive speaks for the label, negative against it."),
    ("Contested", "Suspicious, and honestly disputed: public preference data show disagreement on a quarter of pairs and more."),
    ("Edit", "What is recommended for a row: keep, review, drop or flip. The budget is the share of an axis that is dropped."),
)
