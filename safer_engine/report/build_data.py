"""The report's sections about the pairs, the reward model's rewards on them, and the evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from safer_engine.artifacts import Activations, PairSet
from safer_engine.errors import NumericalError
from safer_engine.report.columns import Floats, by_id, histogram, scalars
from safer_engine.report.model import Dataset, Estimate, Evaluation, Facts, Health, Margins, Measured, RewardModel
from safer_engine.science.stats import group_bootstrap_mean
from safer_engine.spec import AuditSpec

if TYPE_CHECKING:
    import pyarrow as pa

_BINS = 44
_COLUMNS = ("pair_id", "group", "axis", "subset", "style")


def dataset_section(pairs: PairSet) -> Dataset:
    """What was read, kept and dropped."""
    table, meta = pairs.pairs, pairs.meta
    lengths = [_lengths(table, side) for side in ("chosen", "rejected")]
    evaluation = pairs.health.get("evaluation")
    return Dataset(
        health=_health(pairs.health["dataset"]),
        evaluation_health=None if evaluation is None else _health(evaluation),
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


def _health(counts: dict[str, Any]) -> Health:
    others = {name: value for name, value in counts.items() if name not in ("n_in", "n_kept", "dropped")}
    facts = {name: value for name, value in scalars(others).items() if isinstance(value, (bool, int, float))}
    return Health(n_in=counts["n_in"], n_kept=counts["n_kept"], dropped=counts["dropped"], facts=facts)


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs with their reward margins, joined by pair_id.

    Attributes:
        rows: pair_id, group, axis, subset, style of each pair.
        margins: [P] reward of the chosen minus that of the rejected response.
    """

    rows: list[dict[str, Any]]
    margins: Floats


def scored_pairs(table: pa.Table, rewards: pa.Table) -> ScoredPairs:
    """Join a table of pairs with its table of rewards.

    Raises:
        ArtifactError: a pair has no reward. NumericalError: a reward is not finite.
    """
    rows = table.select([name for name in _COLUMNS if name in table.column_names]).to_pylist()
    ids = [row["pair_id"] for row in rows]
    sides = [np.asarray(by_id(rewards, ids, f"reward_{side}"), dtype=np.float64) for side in ("chosen", "rejected")]
    margins = sides[0] - sides[1]
    if not np.isfinite(margins).all():
        raise NumericalError("a reward is not finite", "run the audit again in float32: --set model.dtype=float32")
    return ScoredPairs(rows, margins)


def reward_model_section(pairs: PairSet, activations: Activations, spec: AuditSpec) -> RewardModel:
    """The reward model, its hook point, and its margins on the audited pairs."""
    meta = activations.meta
    scored = scored_pairs(pairs.pairs, activations.rewards)
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
        on_audited_pairs=measured(scored, spec),
        margins=margin_histograms(scored),
    )


def _model_facts(meta: dict[str, Any], spec: AuditSpec) -> Facts:
    facts = scalars(meta.get("reward_model") or {})
    named = {"dtype": meta["dtype"], "attention": meta.get("attention"), "max_length": spec.model.max_length}
    return {**facts, **scalars(named)}


def evaluation_section(table: pa.Table, rewards: pa.Table, spec: AuditSpec) -> Evaluation:
    """The reward model on the evaluation pairs."""
    scored = scored_pairs(table, rewards)
    return Evaluation(groups=measured(scored, spec), margins=margin_histograms(scored))


def measured(scored: ScoredPairs, spec: AuditSpec) -> list[Measured]:
    """Accuracy and margin of all pairs, of each axis and of each subset."""
    return [
        Measured(
            axis=axis,
            subset=subset,
            accuracy=_estimate((scored.margins[kept] > 0).astype(float), scored, kept, spec),
            margin=_estimate(scored.margins[kept], scored, kept, spec),
        )
        for axis, subset, kept in _slices(scored.rows)
    ]


def _estimate(values: Floats, scored: ScoredPairs, kept: NDArray[np.int64], spec: AuditSpec) -> Estimate:
    groups = [scored.rows[i]["group"] for i in kept]
    rng = np.random.default_rng(_seed(spec.seed))
    interval = group_bootstrap_mean(values, groups, spec.report.bootstrap, rng)
    return Estimate(estimate=interval.estimate, lo=interval.lo, hi=interval.hi, n=interval.n, n_groups=interval.n_groups)


def _seed(base: int) -> int:
    """The same for every slice, so that a slice's interval does not depend on which others there are."""
    return int.from_bytes(hashlib.sha256(f"{base}/report/bootstrap".encode()).digest()[:8], "big")


def _slices(rows: list[dict[str, Any]]) -> Iterator[tuple[str | None, str | None, NDArray[np.int64]]]:
    """All pairs, then each axis followed by its subsets; a subset that is its whole axis is not repeated."""
    everything: dict[str, dict[str, list[int]]] = {}
    for index, row in enumerate(rows):
        everything.setdefault(row["axis"], {}).setdefault(row["subset"], []).append(index)
    yield None, None, np.arange(len(rows))
    for axis, subsets in sorted(everything.items()):
        yield axis, None, np.sort(np.concatenate([np.asarray(part) for part in subsets.values()]))
        if len(subsets) > 1:
            for subset, part in sorted(subsets.items()):
                yield axis, subset, np.asarray(part)


def margin_histograms(scored: ScoredPairs) -> list[Margins]:
    """Margins of each axis and subset, between edges common to all."""
    low, high = np.quantile(scored.margins, [0.005, 0.995])
    reach = max(abs(float(low)), abs(float(high)), 1e-6)
    edges = np.linspace(-reach, reach, _BINS + 1)
    return [
        Margins(axis=axis, subset=subset, histogram=histogram(scored.margins[kept], edges))
        for axis, subset, kept in _slices(scored.rows)
        if axis is not None
    ]
