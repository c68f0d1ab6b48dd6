"""The report's sections about the pairs, the reward model's rewards on them, and the evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from safer_engine import evaluation_pairs
from safer_engine.artifacts import Activations, EvaluationSet, PairSet, RetrainedMargins
from safer_engine.report.columns import by_id, histogram, scalars
from safer_engine.report.model import (
    Dataset,
    Estimate,
    Evaluation,
    Health,
    Length,
    Margins,
    Measured,
    RewardModel,
    Score,
    StyleMatrix,
)
from safer_engine.report.nodes import Facts
from safer_engine.science.evaluation import BenchmarkScore, ScoredPairs, SliceLength, SliceScore, evaluate
from safer_engine.science.stats import Interval
from safer_engine.spec import AuditSpec

if TYPE_CHECKING:
    import pyarrow as pa

_BINS = 44


def dataset_section(pairs: PairSet, evaluation: EvaluationSet | None) -> Dataset:
    """What was read, kept and dropped, of the evaluation pairs too where there are any."""
    table, meta = pairs.pairs, pairs.meta
    lengths = [_lengths(table, side) for side in ("chosen", "rejected")]
    return Dataset(
        health=_health(pairs.health["dataset"]),
        evaluation_health=None if evaluation is None else _health(evaluation.health),
        n_pairs=table.num_rows,
        n_groups=meta["n_groups"],
        n_both_orders=sum(table.column("both_orders").to_pylist()),
        tokens=meta.get("tokens"),
        axes=dict(sorted(meta["axes"].items())),
        subsets=dict(sorted(meta["subsets"].items())),
        longer_chosen=float((lengths[0] > lengths[1]).mean()),
    )


def _lengths(table: pa.Table, side: str) -> NDArray[np.int64]:
    import pyarrow.compute as pc

    return np.asarray(pc.utf8_length(table.column(side)).to_pylist(), dtype=np.int64)


_HEALTH_FACTS = ("layout", "groups", "n_rows", "sides_truncated", "marked_rows")


def _health(counts: dict[str, Any]) -> Health:
    facts = scalars({name: counts[name] for name in _HEALTH_FACTS if name in counts})
    return Health(n_in=counts["n_in"], n_kept=counts["n_kept"], dropped=counts["dropped"], facts=facts)


def scored_pairs(table: pa.Table, rewards: pa.Table, *, lengths: bool = False) -> ScoredPairs:
    """Join a table of pairs with its table of rewards, by pair_id.

    Args:
        lengths: whether the lengths of the responses are wanted too.

    Raises:
        ArtifactError: a pair has no reward. NumericalError: a reward is not finite.
    """
    names = table.column("pair_id").to_pylist()
    chosen, rejected = (np.asarray(by_id(rewards, names, f"reward_{side}"), dtype=np.float64) for side in ("chosen", "rejected"))
    return evaluation_pairs.scored_pairs(table, chosen, rejected, lengths=lengths)


def reward_model_section(
    pairs: PairSet, activations: Activations, retrained: RetrainedMargins | None, spec: AuditSpec
) -> RewardModel:
    """The reward model, its hook point, and its margins on the audited pairs."""
    meta = activations.meta
    scored = scored_pairs(pairs.pairs, activations.rewards)
    apart = [] if retrained is None else retrained_slices(pairs.pairs, retrained, spec)
    return RewardModel(
        facts=_model_facts(meta, spec),
        hook=scalars(
            {
                "layer": meta["hook_layer"],
                "blocks": meta["n_blocks"],
                "name": meta["hook_name"],
                "width": meta["d_in"],
                "positions": spec.hook.positions,
                "region": spec.hook.region,
                "n_positions": meta["n_positions"],
                "flagged": meta.get("flags", {}),
            }
        ),
        invariance=scalars(meta.get("invariance") or {}),
        on_audited_pairs=[_measured(part) for part in evaluate(scored, spec.report.bootstrap, spec.seed).slices],
        retrained=apart,
        margins=margin_histograms(scored),
    )


def retrained_slices(table: pa.Table, retrained: RetrainedMargins, spec: AuditSpec) -> list[Measured]:
    """What the retrained models make of the pairs that they did not see and can read."""
    import pyarrow as pa

    margins = retrained.margins.filter(retrained.margins["margin"].is_valid())
    if not margins.num_rows:
        return []
    rewards = pa.table({"pair_id": margins["pair_id"], "reward_chosen": margins["margin"]})
    rewards = rewards.append_column("reward_rejected", pa.array(np.zeros(margins.num_rows)))
    scored = scored_pairs(table.take(margins["pair"]), rewards)
    return [_measured(part) for part in evaluate(scored, spec.report.bootstrap, spec.seed).slices]


def _model_facts(meta: dict[str, Any], spec: AuditSpec) -> Facts:
    facts = scalars(meta.get("reward_model") or {})
    named = {"dtype": meta["dtype"], "attention": meta.get("attention"), "max_length": spec.model.max_length}
    return {**facts, **scalars(named)}


def evaluation_section(found: EvaluationSet, spec: AuditSpec) -> Evaluation:
    """The reward model on the evaluation pairs."""
    scored = scored_pairs(found.pairs, found.rewards, lengths=True)
    scores = evaluate(scored, spec.report.bootstrap, spec.seed)
    return Evaluation(
        n_pairs=len(scored.pair_id),
        min_pairs=found.meta["min_pairs"],
        too_few=found.meta["too_few"],
        groups=[_measured(part) for part in scores.slices],
        length=[_length(part) for part in scores.length],
        margins=margin_histograms(scored),
        best_of_n=[_score(score) for score in scores.best_of_n] or None,
        styles=[_score(score) for score in scores.styles] or None,
        style_matrices=[
            StyleMatrix(axis=m.axis, subset=m.subset, n_prompts=m.n_prompts, accuracy=[list(row) for row in m.accuracy])
            for m in scores.matrices
        ]
        or None,
    )


def _measured(part: SliceScore) -> Measured:
    return Measured(
        axis=part.axis, subset=part.subset, accuracy=_estimate(part.accuracy), margin=_estimate(part.margin), ties=part.ties
    )


def _length(part: SliceLength) -> Length:
    names = ("longer_chosen", "longer_preferred", "excess", "accuracy_longer", "accuracy_shorter", "gap", "correlation")
    found = {name: getattr(part.bias, name) for name in names}
    figures = {name: None if interval is None else _estimate(interval) for name, interval in found.items()}
    return Length(axis=part.axis, subset=part.subset, n_equal=part.bias.n_equal, reasons=part.bias.reasons, **figures)


def _score(score: BenchmarkScore) -> Score:
    return Score(name=score.name, axis=score.axis, subset=score.subset, accuracy=_estimate(score.accuracy))


def _estimate(interval: Interval) -> Estimate:
    return Estimate(estimate=interval.estimate, lo=interval.lo, hi=interval.hi, n=interval.n, n_groups=interval.n_groups)


def margin_histograms(scored: ScoredPairs) -> list[Margins]:
    """Margins of each axis and subset, between edges common to all; a subset that is its whole axis is not repeated."""
    margins = scored.margin
    low, high = np.quantile(margins, [0.005, 0.995])
    reach = max(abs(float(low)), abs(float(high)), 1e-6)
    edges = np.linspace(-reach, reach, _BINS + 1)
    axis, subset = np.asarray(scored.axis), np.asarray(scored.subset)
    found = []
    for name in sorted(set(scored.axis)):
        within = axis == name
        inner = sorted(set(subset[within].tolist()))
        found.append(Margins(axis=name, subset=None, histogram=histogram(margins[within], edges)))
        if len(inner) > 1:
            found += [Margins(axis=name, subset=s, histogram=histogram(margins[within & (subset == s)], edges)) for s in inner]
    return found
