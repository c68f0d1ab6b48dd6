"""The report in words: key figures, a plain paragraph, what to keep in mind. Shared by the HTML and the Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safer_engine.pair_tables import unusable
from safer_engine.report.doubt_text import estimated, not_told, unchecked
from safer_engine.report.harsh import mild_name
from safer_engine.report.label_words import label_cautions
from safer_engine.report.model import EditsReport, Estimate, Measured, ReportDocument, SuspiciousPair
from safer_engine.report.open_parts import departures, input_record, missing, spec_value
from safer_engine.report.text import (
    NARROW_SPACE,
    NONE,
    base_name,
    count,
    fact,
    number,
    percent,
    share_interval,
    signed,
    small_percent,
    visible,
    words,
)
from safer_engine.science.edits import RANK_BUDGET

_DEPARTURES = 8
_SMALL_GROUPS = 100
_MANY_DEAD = 0.3
_LENGTH_SKEW = 0.15
_MANY_UNLABELLED = 0.2
_LEARNT_GAP = 0.1


@dataclass(frozen=True)
class KeyFigure:
    """One of the figures at the top: what, how much, of what, and the section that says more."""

    name: str
    value: str
    detail: str
    anchor: str


@dataclass(frozen=True)
class Caution:
    """Something that limits what the figures mean."""

    level: Literal["stop", "care"]
    text: str


def title(report: ReportDocument) -> str:
    """What was audited on what, in one line."""
    model, dataset = (base_name(input_record(report, name).origin) for name in ("model", "dataset"))
    return f"{model} on {dataset}"


def key_figures(report: ReportDocument) -> list[KeyFigure]:
    """The figures to see first; those not computed show a dash and why."""
    return [
        _pairs_figure(report),
        _accuracy_figure(report),
        *_sae_figures(report),
        _features_figure(report),
        *_edit_figures(report),
    ]


def overall(groups: list[Measured]) -> Measured:
    """The row of all axes. Raises InputRefused where there is none."""
    found = next((row for row in groups if row.axis is None), None)
    if found is None:
        raise missing("figure over all axes")
    return found


def _missing(report: ReportDocument, name: str, path: str, anchor: str) -> KeyFigure:
    return KeyFigure(name, NONE, visible(_why(report, path)), anchor)


def _why(report: ReportDocument, path: str) -> str:
    return report.provenance.not_computed.get(path, "not computed")


def _pairs_figure(report: ReportDocument) -> KeyFigure:
    data = report.dataset
    if data is None:
        return _missing(report, "Pairs", "dataset", "data")
    dropped = data.health.n_in - data.health.n_kept
    return KeyFigure("Pairs", count(data.n_pairs), f"in {count(data.n_groups)} groups, {count(dropped)} dropped", "data")


def _accuracy_figure(report: ReportDocument) -> KeyFigure:
    if report.evaluation is not None:
        found = overall(report.evaluation.groups).accuracy
        return KeyFigure("Pair accuracy", percent(found.estimate), _measured_on(found, "on evaluation pairs"), "accuracy")
    if report.reward_model is not None:
        found = overall(report.reward_model.on_audited_pairs).accuracy
        return KeyFigure("Pair accuracy", percent(found.estimate), _measured_on(found, "on the audited pairs"), "accuracy")
    return _missing(report, "Pair accuracy", "reward_model", "accuracy")


def _measured_on(found: Estimate, where: str) -> str:
    ends = share_interval(found)
    return where if ends == NONE else f"{ends} {where}"


def _sae_figures(report: ReportDocument) -> list[KeyFigure]:
    sae = report.sae
    if sae is None:
        return [_missing(report, "Variance explained", "sae", "sae"), _missing(report, "Reward recovered", "sae", "sae")]
    share = percent(1 - sae.fvu) if sae.fvu <= 1 else "none"
    explained = KeyFigure("Variance explained", share, f"FVU {sae.fvu:.3f} on held-out groups", "sae")
    covered = (sae.recovered or {}).get("covered", {})
    if "margin_variance" not in covered:
        return [explained, _missing(report, "Reward recovered", "sae.recovered", "sae")]
    kept = covered.get("preference_kept")
    detail = "of the margin variance" + (f", {percent(kept)} of preferences kept" if kept is not None else "")
    return [explained, KeyFigure("Reward recovered", percent(covered["margin_variance"]), detail, "sae")]


def _features_figure(report: ReportDocument) -> KeyFigure:
    features = report.features
    if features is None:
        return _missing(report, "Safety features", "features", "features")
    named = [f for f in features if f.safety_feature]
    if "features[].safety_feature" in report.provenance.not_computed:
        return _missing(report, "Safety features", "features[].safety_feature", "features")
    return KeyFigure("Safety features", count(len(named)), f"of {count(len(features))} candidate latents", "features")


def _edit_figures(report: ReportDocument) -> list[KeyFigure]:
    edits = report.edits
    if edits is None or edits.actions is None:
        path = "edits" if edits is None else "edits.actions"
        return [_missing(report, "Edits and reviews", path, "pairs"), _missing(report, "Recommended drops", path, "pairs")]
    removed, reviewed = _removed(edits), edits.actions.get("review", 0)
    drops = [
        f"{words(row.axis)} {count(row.actions.get('drop', 0) + row.actions.get('flip', 0))}"
        for row in edits.by_axis
        if row.subset is None
    ]
    name = "Recommended flips" if edits.actions.get("flip") else "Recommended drops"
    return [
        KeyFigure("Edits and reviews", count(removed + reviewed), f"{count(reviewed)} of them for review", "pairs"),
        KeyFigure(name, count(removed), " · ".join(drops), "pairs"),
    ]


def _removed(edits: EditsReport) -> int:
    actions = edits.actions or {}
    return actions.get("drop", 0) + actions.get("flip", 0)


def paragraph(report: ReportDocument) -> str:
    """The findings in a few sentences, each only where its figures are there."""
    said = (_say_accuracy(report), _say_sae(report), _say_features(report), _say_edits(report))
    return " ".join(sentence for sentence in said if sentence) or "Nothing has been measured yet."


def _with_interval(estimate: Estimate) -> str:
    ends = share_interval(estimate)
    return percent(estimate.estimate) + (f" ({ends})" if ends != NONE else "")


def _say_accuracy(report: ReportDocument) -> str:
    if report.reward_model is None:
        return ""
    audited = overall(report.reward_model.on_audited_pairs).accuracy
    text = f"The reward model agrees with the label of {_with_interval(audited)} of the {count(audited.n)} audited pairs"
    if report.evaluation is not None:
        tested = overall(report.evaluation.groups).accuracy
        return f"{text}, and of {_with_interval(tested)} of {count(tested.n)} evaluation pairs."
    return f"{text}."


def _say_sae(report: ReportDocument) -> str:
    sae = report.sae
    if sae is None:
        return ""
    share = percent(1 - sae.fvu) if sae.fvu <= 1 else "none"
    text = f"A sparse autoencoder of {count(sae.d_sae)} latents explains {share} of the variance of its activations"
    kept = (sae.recovered or {}).get("covered", {}).get("preference_kept")
    return f"{text}, and {percent(kept)} of preferences survive its reconstruction." if kept is not None else f"{text}."


def _say_features(report: ReportDocument) -> str:
    named = [f for f in report.features or [] if f.safety_feature]
    if not named:
        return ""
    first = max(named, key=lambda f: abs(f.salience))
    quote = f" (“{mild_name(first)}”)" if mild_name(first) else ""
    chosen = sum(f.fires_on == "chosen" for f in named)
    rated = "a safety feature" if len(named) == 1 else "safety features"
    return (
        f"{_are(len(named), 'latent')} rated as {rated}, {count(chosen)} firing more on chosen and "
        f"{count(len(named) - chosen)} on rejected responses; the most salient is latent {first.latent_id}{quote}, "
        f"which fires more on {first.fires_on} responses (salience {signed(first.salience, 2)})."
    )


def _say_edits(report: ReportDocument) -> str:
    edits = report.edits
    if edits is None or edits.actions is None:
        return ""
    if edits.n_scored == 0:
        return "No pair has a suspicion, so nothing is recommended."
    removed, reviewed = _removed(edits), edits.actions.get("review", 0)
    share = f" ({small_percent(removed / edits.n_scored)})" if edits.n_scored else ""
    verb = "flipping" if edits.actions.get("flip") else "dropping"
    text = f"{estimated(edits.axes)}{_are(removed, 'pair', share)} recommended for {verb} and {count(reviewed)} for review"
    if report.verification is None:
        return f"{text}; no retraining has tested that."
    return f"{text}; retraining with these edits: {report.verification.outcome}."


def _are(n: int, noun: str, aside: str = "") -> str:
    return f"{count(n)} {noun}{aside} is" if n == 1 else f"{count(n)} {noun}s{aside} are"


def _undoubted_share(edits: EditsReport) -> str:
    """How many recommended removals rest on their rank alone; empty where none does."""
    n, removed = edits.n_removed_undoubted, edits.n_removed
    if not n or not removed:
        return ""
    kind = "flip" if (edits.actions or {}).get("flip") else "drop"
    return f"{count(n)} of {count(removed)} recommended {kind}s {'has' if n == 1 else 'have'} no signal against their label."


def undoubted(pair: SuspiciousPair, budget: float | None) -> str:
    """Why a pair is listed though no signal speaks against its label."""
    if pair.action in ("drop", "flip") and (budget is not None or pair.suspicion_kind == "rank"):
        share = RANK_BUDGET if budget is None else budget
        why = f"it is here because the budget takes the top {fact(100 * share)}{NARROW_SPACE}% of its axis"
    elif pair.both_orders and pair.action == "review":
        why = "it is for review because it also occurs the other way round"
    else:
        why = "it is here for its rank alone"
    return f"No signal speaks against this label; {why}."


def cautions(report: ReportDocument) -> list[Caution]:
    """What a reader must know before acting on the figures. Raises InputRefused: the report is not as an audit wrote it."""
    measured = [*_about_preset(report), *_about_data(report), *_about_evaluation(report), *_about_rewards(report)]
    found = [*measured, *_about_sae(report), *_about_labels(report), *_about_edits(report)]
    return sorted(found, key=lambda warning: warning.level != "stop")


def _about_preset(report: ReportDocument) -> list[Caution]:
    found = departures(report)
    if not found:
        return []
    shown = "; ".join(visible(text) for text in found[:_DEPARTURES])
    more = f"; and {len(found) - _DEPARTURES} more" if len(found) > _DEPARTURES else ""
    return [
        _care(f"The preset is {visible(spec_value(report, 'preset'))}, but these values were given otherwise: {shown}{more}.")
    ]


def _about_data(report: ReportDocument) -> list[Caution]:
    data = report.dataset
    if data is None:
        return []
    found = []
    for name, health in (("audited", data.health), ("evaluation", data.evaluation_health)):
        if health is not None and (marked := health.facts.get("marked_rows")):
            found.append(_care(f"{count(int(marked))} rows of the {name} data are marked as poisoned by a red-team drill."))
    dropped = unusable(data.health.n_in, data.health.n_kept, data.health.dropped)
    if dropped:
        found.append(_care(f"{count(dropped)} of {count(data.health.n_in)} pairs could not be used: see data health."))
    if data.n_groups < _SMALL_GROUPS:
        found.append(_care(f"There are only {count(data.n_groups)} groups: intervals are wide, and salience is unsure."))
    if abs(data.longer_chosen - 0.5) > _LENGTH_SKEW:
        side = "longer" if data.longer_chosen > 0.5 else "shorter"
        share = max(data.longer_chosen, 1 - data.longer_chosen)
        found.append(
            _care(f"The chosen response is the {side} one in {percent(share, 0)} of pairs: some features may be about length.")
        )
    if data.n_both_orders:
        found.append(
            _care(f"{count(data.n_both_orders)} pairs also occur with the labels the other way round; they are for review.")
        )
    return found


def _about_evaluation(report: ReportDocument) -> list[Caution]:
    found = []
    read = report.dataset.evaluation_health if report.dataset is not None else None
    leaked = read.dropped.get("in_training_data", 0) if read is not None else 0
    if leaked:
        found.append(_care(f"{count(leaked)} evaluation pairs were left out because their prompt is in the audited data."))
    measured, stages = report.evaluation, report.provenance.stages
    if measured is not None and measured.too_few:
        few = (
            "is only one usable evaluation pair"
            if measured.n_pairs == 1
            else f"are only {count(measured.n_pairs)} evaluation pairs"
        )
        found.append(_care(f"There {few}, fewer than {count(measured.min_pairs)}: figures on them are unsure."))
    given = "evaluation" in report.provenance.inputs
    if given and any(stage.stage == "evaluation" and stage.state == "absent" for stage in stages):
        found.append(_care(f"Nothing was measured on evaluation pairs: {visible(_why(report, 'evaluation'))}."))
    return found


def _about_rewards(report: ReportDocument) -> list[Caution]:
    model = report.reward_model
    if model is None:
        return []
    found = []
    drifts = [drift for name, drift in model.invariance.items() if name.endswith("_drift") and isinstance(drift, float)]
    if model.invariance.get("status") == "warning" and drifts:
        moved = f"Rewards move by up to {number(max(drifts), 3)} SD of the margins with batching and padding"
        found.append(_care(f"{moved}: figures near a tie are unsure."))
    audited = overall(model.on_audited_pairs).accuracy
    if audited.lo is not None and audited.lo <= 0.5:
        found.append(
            Caution("stop", "The reward model does not agree with the labels better than chance: there is little to explain.")
        )
    if report.evaluation is not None and not report.evaluation.too_few:
        tested = overall(report.evaluation.groups).accuracy
        if audited.estimate - tested.estimate > _LEARNT_GAP:
            gap = f"{count(100 * (audited.estimate - tested.estimate))} percentage points"
            text = f"Accuracy on the audited pairs is {gap} above that on evaluation pairs: margins have learnt the labels,"
            found.append(_care(f"{text} wrong ones too."))
    return found


def _about_sae(report: ReportDocument) -> list[Caution]:
    sae = report.sae
    if sae is None:
        return []
    found = []
    if sae.fvu > 1:
        text = f"The SAE explains less of the activations than their mean does (FVU {number(sae.fvu, 2)}): do not interpret its"
        found.append(Caution("stop", f"{text} features."))
    if sae.recovered is None:
        found.append(_care("Reward recovered was not measured: nothing says that the features are what the reward is made of."))
    elif sae.interpretable is False:
        found.append(
            Caution("stop", "Too little of the reward survives the SAE's reconstruction: do not interpret its features.")
        )
    if sae.dead_share > _MANY_DEAD:
        found.append(_care(f"{percent(sae.dead_share, 0)} of latents are dead: they did not fire at the end of training."))
    chance = sum(f.safety_feature is True and f.discovery is False for f in report.features or [])
    if chance:
        found.append(_care(f"{_are(chance, 'safety feature')} not significant: chance may explain how differently they fire."))
    if report.features and report.provenance.not_computed.get("features[].causal_effect"):
        found.append(_care("Features are correlational: salience says how they fire, not that they move the reward."))
    return found


def _about_labels(report: ReportDocument) -> list[Caution]:
    features = [f for f in report.features or [] if f.safety_feature is not None]
    if not features:
        return []
    found = []
    if not any(f.safety_feature for f in features):
        found.append(_care("No candidate was rated as a safety feature."))
    failed = sum(f.status in ("unparsed", "error", "skipped") for f in features)
    if failed / len(features) > _MANY_UNLABELLED:
        found.append(_care(f"{count(failed)} of {count(len(features))} candidates have no label: unparsed, failed or skipped."))
    if any(f.labeller == "lexicon" for f in features):
        found.append(_care("Labels come from a word list, not from a reader: check the contexts before you trust a name."))
    return [*found, *map(_care, label_cautions(report))]


def _about_edits(report: ReportDocument) -> list[Caution]:
    edits = report.edits
    if edits is None:
        return []
    found = [_care(f"Signal {visible(name)} is left out: {visible(reason)}") for name, reason in edits.left_out.items()]
    if edits.n_scored == 0:
        found.append(Caution("stop", _nothing_scored(report)))
    found += [_care(not_told(axis)) for axis in edits.axes if axis.kind == "rank"]
    found += map(_care, unchecked(edits.axes))
    rank_alone = _undoubted_share(edits)
    return [*found, _care(rank_alone)] if rank_alone else found


def _nothing_scored(report: ReportDocument) -> str:
    """Why no pair has a suspicion, and what to do."""
    if spec_value(report, "suspicion", "estimator") == "paper" and not any(f.safety_feature for f in report.features or []):
        return (
            "No pair has a suspicion: the paper's pair score is made of safety features, and no latent was rated "
            f"{spec_value(report, 'labels', 'min_rating')} or higher with a label that holds. Use a labeller that asks a model "
            "(labels.labeller), or lower labels.min_rating or labels.detection_floor."
        )
    return "No pair has a suspicion: see which signals are left out and why, and give the audit more pairs or other signals."


def _care(text: str) -> Caution:
    return Caution("care", text)
