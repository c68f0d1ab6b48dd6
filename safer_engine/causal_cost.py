"""How much work the causal stage is, before it is done."""

from __future__ import annotations

from safer_engine.spec_causal import CausalSpec

_FIRING_SHARE = 0.55
"""Assumed share of responses in which a reported latent fires, so that its ablation is run there: 0.54 in docs/benchmarks.md."""


def causal_runs(causal: CausalSpec, n_pairs: int) -> float:
    """Sequences that the causal stage runs the upper blocks on; a backward pass counts as two of them."""
    kept = min(causal.pairs, n_pairs) if causal.enabled else 0
    reported = causal.features + causal.attributed
    ablated = (reported + causal.controls) * _FIRING_SHARE + 1 + causal.control_sets
    return 2 * kept * (4 + ablated) + 2 * min(causal.sample, kept) * reported
