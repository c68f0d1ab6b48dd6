"""The report's facts on causal effects."""

from __future__ import annotations

from safer_engine.artifacts import CausalEffects
from safer_engine.report.columns import maybe_finite
from safer_engine.report.model import Feature
from safer_engine.report.model_causal import CausalEffect, CausalReport, RankCorrelation, SetAblation


def causal_section(causal: CausalEffects) -> CausalReport:
    """What stands beside the features' own effects."""
    meta = causal.meta
    counts = {name: meta[name] for name in ("n_pairs", "n_features", "n_controls")}
    found = meta["correlation"]
    rows = causal.table("sets.arrow").drop_columns(["n_groups"]).to_pylist()
    effects = [row for row in causal.effects.to_pylist() if row["role"] != "control"]
    return CausalReport(
        **counts,
        margin_mean=meta["margin"]["mean"],
        margin_sd=meta["margin"]["sd"],
        null_pooled=meta["null"]["pooled"],
        null_reason=meta["null"]["reason"],
        correlation=None if found is None else RankCorrelation(**found),
        effects=[CausalEffect(**{name: row[name] for name in CausalEffect.model_fields}) for row in effects],
        sets=[SetAblation(name=row.pop("set"), **row) for row in rows],
    )


def with_effects(features: list[Feature], causal: CausalEffects) -> list[Feature]:
    """The features with what ablating them does, over all pairs."""
    found = {row["latent_id"]: row for row in causal.effects.to_pylist() if row["axis"] is None and row["role"] != "control"}

    def joined(feature: Feature) -> Feature:
        row = found.get(feature.latent_id)
        if row is None:
            return feature
        what = "a causal effect"
        names = {"": "margin", "_lo": "margin_lo", "_hi": "margin_hi"}
        effect = {f"causal_effect{end}": maybe_finite(row[name], what) for end, name in names.items()}
        judged = {"causal_p": maybe_finite(row["p_adjusted"], what), "causal_verified": row["verified"]}
        return feature.model_copy(update={**effect, **judged})

    return [joined(feature) for feature in features]
