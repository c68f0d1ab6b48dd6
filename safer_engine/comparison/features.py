"""Latents of an SAE that two audits share: what each came to, and what they say of the pairs that changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from safer_engine.comparison.model import ChangeEvidence, Drift, FeaturesComparison, LatentDrift, LatentSide
from safer_engine.comparison.sides import LatentRow, Side
from safer_engine.gate.compared import drift, scaled_effect
from safer_engine.report.harsh import mild_name
from safer_engine.report.model import Feature

MOST_LATENTS, MOST_EVIDENCE = 256, 30
_NOT_KNOWN: dict[str, Any] = dict.fromkeys(LatentSide.model_fields)


def not_shared(a: Side, b: Side) -> str:
    """Why latents cannot be compared; empty where they can."""
    first, second = a.report, b.report
    if first.sae is None or second.sae is None:
        return f"{'A' if first.sae is None else 'B'} has no SAE"
    if first.sae.digest is not None and first.sae.digest == second.sae.digest:
        return ""
    names = ("architecture", "n_blocks", "d_in")
    facts = [report.reward_model.facts if report.reward_model is not None else {} for report in (first, second)]
    if differ := [name for name in names if facts[0].get(name) != facts[1].get(name)]:
        return f"the reward models differ in {', '.join(differ)}, so no SAE reads both: rewards alone are compared"
    return (
        "the two audits trained an SAE each, and latents of two SAEs are not the same; audit B with A's "
        "(`compare A-model B-model --dataset …`, or run --set sae.given=A/sae)"
    )


def compare_features(a: Side, b: Side, changed: Iterable[str]) -> FeaturesComparison:
    """Both audits' figures of each latent. Call where `not_shared` finds nothing.

    Args:
        changed: pair_ids of audited pairs whose preference changed.
    """
    first, second = a.report.sae, b.report.sae
    assert first is not None
    assert second is not None
    assert first.digest is not None
    sides = _figures(a), _figures(b)
    names = {**_names(b), **_names(a), **_names(b, safety=True), **_names(a, safety=True)}
    drifts = [
        _latent(latent, names.get(latent, ""), *(side[latent] for side in sides)) for latent in sorted(sides[0].keys() & sides[1])
    ]
    marked = [{latent for latent, found in side.items() if found["safety_feature"]} for side in sides]
    drifts += [
        _latent(latent, names.get(latent, ""), *(side.get(latent, _NOT_KNOWN) for side in sides))
        for latent in sorted((marked[0] | marked[1]) - (sides[0].keys() & sides[1]))
    ]
    drifts.sort(key=_order)
    return FeaturesComparison(
        sae_digest=first.digest,
        interpretable_a=first.interpretable is True,
        interpretable_b=second.interpretable is True,
        fvu_a=first.fvu,
        fvu_b=second.fvu,
        complete=a.latents is not None and b.latents is not None,
        n_safety_a=len(marked[0]),
        n_safety_b=len(marked[1]),
        n_safety_both=len(marked[0] & marked[1]),
        n_compared=sum(one.a.salience is not None and one.b.salience is not None for one in drifts),
        latents=drifts[:MOST_LATENTS],
        n_omitted=max(0, len(drifts) - MOST_LATENTS),
        evidence=_evidence(a, b, changed, names),
    )


def _figures(side: Side) -> dict[int, dict[str, Any]]:
    """Latent → fields of `LatentSide`: of candidates as the report has them, of others as the store does."""
    found = {latent: {**_NOT_KNOWN, **_of_row(row)} for latent, row in (side.latents or {}).items()}
    causal = side.report.causal
    sd = causal.margin_sd if causal is not None and causal.margin_sd > 0 else None
    for effect in causal.effects if causal is not None else []:
        if effect.axis is None and effect.latent_id in found:
            plain = {f"causal_effect{end}": getattr(effect, f"margin{end}") for end in ("", "_lo", "_hi")}
            found[effect.latent_id] |= scaled_effect(plain, sd)
    for feature in side.report.features or []:
        fields = ("safety_feature", "firing_rate", "axis", "salience", "salience_lo", "salience_hi")
        row = feature.model_dump()
        found[feature.latent_id] = {**{name: row[name] for name in fields}, **scaled_effect(row, sd)}
    return found


def _of_row(row: LatentRow) -> dict[str, Any]:
    names = ("firing_rate", "axis", "salience", "salience_lo", "salience_hi")
    return {name: getattr(row, name) for name in names}


def _names(side: Side, *, safety: bool = False) -> dict[int, str]:
    """Names of an audit's features that have one; `safety`: of its safety features alone."""
    named: list[Feature] = [feature for feature in side.report.features or [] if feature.safety_feature or not safety]
    return {feature.latent_id: name for feature in named if (name := mild_name(feature))}


def _latent(latent: int, name: str, a: dict[str, Any], b: dict[str, Any]) -> LatentDrift:
    rate_a, rate_b = a["firing_rate"], b["firing_rate"]
    same = a["axis"] == b["axis"]
    changes = {what: drift(what, a, b) for what in ("salience", "effect")}
    return LatentDrift(
        latent_id=latent,
        name=name,
        a=LatentSide(**a),
        b=LatentSide(**b),
        firing_ratio=rate_b / rate_a if rate_a and rate_b is not None else None,
        salience_change=_change(changes["salience"]) if same else None,
        effect_change=_change(changes["effect"]),
    )


def _change(found: dict[str, float | None] | None) -> Drift | None:
    return None if found is None else Drift.model_validate(found)


def _order(one: LatentDrift) -> tuple[bool, float, int]:
    moved = 0.0 if one.salience_change is None else abs(one.salience_change.estimate)
    return not (one.a.safety_feature or one.b.safety_feature), -moved, one.latent_id


def _evidence(a: Side, b: Side, changed: Iterable[str], names: dict[int, str]) -> list[ChangeEvidence] | None:
    """Latents by how far their contributions to the evidence of changed pairs moved."""
    if a.scored is None or b.scored is None:
        return None
    moved: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for pair_id in changed:
        first, second = a.scored.evidence.get(pair_id, {}), b.scored.evidence.get(pair_id, {})
        for latent in first.keys() | second.keys():
            moved[latent].append((first.get(latent, 0.0), second.get(latent, 0.0)))
    rows = []
    for latent, values in moved.items():
        before, after = (sum(value[place] for value in values) / len(values) for place in (0, 1))
        rows.append(
            ChangeEvidence(
                latent_id=latent, name=names.get(latent, ""), n_pairs=len(values),
                contribution_a=before, contribution_b=after, moved=after - before,
            )
        )  # fmt: skip
    return sorted(rows, key=lambda row: (-row.n_pairs * abs(row.moved), row.latent_id))[:MOST_EVIDENCE]
