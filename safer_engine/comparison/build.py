"""From two audits to the document of their comparison."""

from __future__ import annotations

from dataclasses import asdict
from importlib import metadata

from safer_engine.comparison.features import compare_features, not_shared
from safer_engine.comparison.model import ChangedPair, ComparisonDocument, PairsComparison, SideRecord, SliceComparison
from safer_engine.comparison.sides import Side
from safer_engine.errors import InputRefused
from safer_engine.gate.compared import compared_slices, margins_of
from safer_engine.gate.documents import Audit
from safer_engine.gate.paired import same_evaluation, shared_pairs
from safer_engine.science.comparison import PairMargins, changed_pairs, margin_scales, moved_by

MOST_PAIRS = 1000


def compare_sides(a: Side, b: Side) -> ComparisonDocument:
    """What changed from A to B.

    Raises:
        InputRefused: a report is damaged, or the two have no pair in common at all. NumericalError: a model's margins are all 0.
    """
    reasons: dict[str, str] = {}
    evaluation = _pairs(a.audit, b.audit, "evaluation", reasons)
    audited = _audited(a, b, reasons)
    if evaluation is None and audited is None:
        raise InputRefused(
            f"the two audits have no pairs to compare: of evaluation pairs, {reasons['evaluation']}; of audited ones, "
            f"{reasons['audited']}",
            "give two audits of the same data, with evaluation.jsonl or pair_scores.parquet beside each report.json",
        )
    if reason := not_shared(a, b):
        reasons["features"] = reason
    records = _record(a), _record(b)
    return ComparisonDocument(
        tool_version=_version(),
        a=records[0],
        b=records[1],
        same_model=records[0].model_digest == records[1].model_digest,
        evaluation=evaluation,
        audited=audited,
        features=None if reason else compare_features(a, b, _changed_ids(a, b)),
        not_computed=reasons,
    )


def _audited(a: Side, b: Side, reasons: dict[str, str]) -> PairsComparison | None:
    first, second = a.audited, b.audited
    if first is None or second is None:
        which = "A" if first is None else "B"
        reasons["audited"] = f"{which} has no pair_scores.parquet at hand"
        return None
    return _pairs(first, second, "audited", reasons)


def _pairs(a: Audit, b: Audit, name: str, reasons: dict[str, str]) -> PairsComparison | None:
    """The common pairs of one kind; None, and a reason, where there are none."""
    shared = shared_pairs(b, a)
    if shared.reason or not shared.pairs:
        for letter, audit in (("A", a), ("B", b)):
            if audit.pairs is None:
                reasons[name] = f"{letter} has no evaluation.jsonl at hand"
        reasons.setdefault(name, shared.reason or "no pair is in both")
        return None
    pairs = margins_of(shared)
    scales = margin_scales(pairs)
    changed = changed_pairs(pairs, scales)
    slices = [
        SliceComparison.model_validate({"axis": axis, "subset": subset, **asdict(found)})
        for (axis, subset), found in compared_slices(shared)
    ]
    return PairsComparison(
        same_data=same_evaluation(b, a),
        n_common=len(pairs),
        n_only_a=shared.only_old,
        n_only_b=shared.only_new,
        scale_a=scales.a,
        scale_b=scales.b,
        slices=slices,
        n_changed=len(changed),
        changed_pairs=[_changed(pair, moved_by(pair, scales)) for pair in changed[:MOST_PAIRS]],
        n_omitted=max(0, len(changed) - MOST_PAIRS),
    )


def _changed(pair: PairMargins, moved: float) -> ChangedPair:
    names = ("pair_id", "group", "axis", "subset", "margin_a", "margin_b")
    return ChangedPair(**{name: getattr(pair, name) for name in names}, moved=moved)


def _changed_ids(a: Side, b: Side) -> list[str]:
    """Audited pairs whose preference changed, all of them."""
    first, second = a.audited, b.audited
    if first is None or second is None:
        return []
    return [pair.pair_id for pair in margins_of(shared_pairs(second, first)) if pair.changed]


def _record(side: Side) -> SideRecord:
    report, digest = side.report, side.audit.digest
    model = report.provenance.inputs.get("model")
    architecture = report.reward_model.facts.get("architecture") if report.reward_model is not None else None
    return SideRecord(
        origin=side.origin,
        model="" if model is None else model.origin,
        model_digest=digest("model") or "",
        dataset_digest=digest("dataset") or "",
        evaluation_digest=digest("evaluation"),
        sae_digest=report.sae.digest if report.sae is not None else None,
        architecture=architecture if isinstance(architecture, str) else None,
    )


def _version() -> str:
    try:
        return metadata.version("safer-audit")
    except metadata.PackageNotFoundError:
        return "not installed"
