"""Labels in words: for the page and for Markdown."""

from __future__ import annotations

from safer_engine.report import text
from safer_engine.report.model import Feature, ReportDocument
from safer_engine.report.model_labels import LabelAgreement, LabelsReport

_POOR = 0.4


def detection_words(feature: Feature) -> str:
    """Detection of a feature with its interval, or a dash."""
    found = feature.detection
    return text.NONE if found is None else f"{found.score:.2f} ({found.lo:.2f}–{found.hi:.2f})"


def about_labels(labels: LabelsReport) -> str:
    """Who labelled, what was checked, how far it held."""
    parts = [f"Labels by {text.visible(labels.labeller)}, rubric {text.visible(text.base_name(labels.rubric))}."]
    if labels.detection_floor is None:
        parts.append("They were not checked on held-out contexts.")
    else:
        parts.append(
            "Detection: balanced accuracy with which the labeller, from the label alone, tells held-out contexts in which the "
            "latent fires from matched ones in which it does not; 0.5 is guessing."
        )
        if labels.detection_floor:
            parts.append(f"Labels below {labels.detection_floor:g}, or not to be checked, are unverified and no safety features.")
    if labels.agreement is not None:
        parts.append(_agreement_words(labels.agreement, labels.n_again_unrated))
    elif labels.no_agreement:
        parts.append(f"No agreement of two readings: {text.visible(labels.no_agreement)}.")
    if labels.n_corrected:
        parts.append(f"{_counted(labels.n_corrected, 'label')} as a person corrected it.")
    if labels.n_corrections_unused:
        parts.append(f"{_counted(labels.n_corrections_unused, 'correction')} about other latents, not used.")
    if any(spent.calls for spent in labels.spent.values()):
        parts.append(_spent_words(labels))
    return " ".join(parts)


def label_cautions(report: ReportDocument) -> list[str]:
    """What a reader must know before trusting the labels."""
    labels = report.labels
    if labels is None:
        return []
    found = []
    rated = [f for f in report.features or [] if f.status == "unverified" and (f.rating or 0) >= labels.min_rating]
    if rated:
        found.append(
            f"{_counted(len(rated), 'candidate')} rated {labels.min_rating} or higher, but unverified and so no safety feature: "
            "the label does not tell where the latent fires, or could not be checked."
        )
    agreed = labels.agreement
    if agreed is not None and agreed.kappa is not None and agreed.kappa < _POOR:
        found.append(f"Two readings of the same latents agree poorly (weighted kappa {agreed.kappa:.2f}): ratings are unsure.")
    return found


def _counted(n: int, what: str) -> str:
    return f"{text.count(n)} {what}{'' if n == 1 else 's'}"


def _agreement_words(found: LabelAgreement, unrated: int) -> str:
    ends = "" if found.lo is None or found.hi is None else f" ({found.lo:.2f} … {found.hi:.2f})"
    kappa = "no kappa, all ratings are the same" if found.kappa is None else f"weighted kappa {found.kappa:.2f}{ends}"
    failed = f"; {text.count(unrated)} second readings gave no rating" if unrated else ""
    return f"{text.count(found.n)} latents were rated twice: {kappa}, {text.percent(found.same, 0)} rated alike{failed}."


def _spent_words(labels: LabelsReport) -> str:
    calls = ", ".join(f"{name} {text.count(spent.calls)}" for name, spent in labels.spent.items())
    cost = sum(spent.cost for spent in labels.spent.values())
    return f"Requests: {calls}" + (f"; cost {cost:.2f}." if cost else ".")
