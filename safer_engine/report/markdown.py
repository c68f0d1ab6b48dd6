"""The report as a short Markdown text, for a pull request or a terminal: the same figures, no text of the data.

Names that come from labellers or data stand in code spans, which no renderer reads as markup, links or mentions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from safer_engine.report import summary, text
from safer_engine.report.doubt_text import sae_adds
from safer_engine.report.label_words import about_labels, detection_words
from safer_engine.report.model import Evidence, Feature, Length, Measured, ReportDocument, SuspiciousPair
from safer_engine.report.plots_causal import disagreements_first
from safer_engine.report.provenance import NO_PLAN, PlannedCost

_FEATURES = 12
_PAIRS = 15
_SLICES = 60


def render_markdown(report: ReportDocument) -> str:
    """The report in GitHub-flavoured Markdown."""
    parts = [
        f"# Reward model audit: {code(summary.title(report))}",
        _progress(report),
        _table(("figure", "value", ""), [(f.name, f"**{f.value}**", escaped(f.detail)) for f in summary.key_figures(report)]),
        escaped(summary.paragraph(report)),
        "\n".join(f"- {escaped(caution.text)}" for caution in summary.cautions(report)),
        *_features(report),
        *_causal(report),
        *_accuracy(report),
        *_pairs(report),
        *_data(report),
        *_cost(report),
        *_provenance(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def code(value: str, limit: int = 160) -> str:
    """A foreign name as a code span on one line; pipes are escaped for tables."""
    line = " ".join(text.visible(value).split())
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    if not line:
        return text.NONE
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line.replace('|', chr(92) + '|')}{pad}{fence}"


def escaped(value: str) -> str:
    """A sentence of ours that may quote foreign words: whatever Markdown or HTML could read is escaped."""
    line = " ".join(text.visible(value).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_\[\]|#!~])", r"\\\1", line)
    return line.replace("@", "&#64;\u200b").replace("://", ":&#47;&#47;")


def _progress(report: ReportDocument) -> str:
    progress = report.provenance.progress
    if progress is None:
        return ""
    if progress.stopped is not None:
        return f"> Stopped at {text.words(progress.following)}: {escaped(progress.stopped)}"
    where = f"{progress.done} of {progress.total} stages are finished, next: {text.words(progress.following)}"
    return f"> Unfinished audit: {where}. If it is not running any more, the same command goes on from there."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


_CAUSAL = ("ablated: change of margin", "verified")


def _features(report: ReportDocument) -> list[str]:
    if report.features is None:
        return ["## Features", _absent(report, "features")]
    shown = [f for f in report.features if f.safety_feature] or report.features
    head = ("latent", "about", "rating", "detection", "fires on", "salience", "95 % interval", "q", "marks", "fires at", *_CAUSAL)
    rest = len(report.features) - len(shown[:_FEATURES])
    stability = report.sae.latents.stability if report.sae and report.sae.latents else None
    return [
        "## Features",
        _table(head, [_feature_row(feature) for feature in shown[:_FEATURES]]),
        f"{text.count(rest)} more candidates are in features.parquet." if rest > 0 else "",
        escaped(about_labels(report.labels)) if report.labels is not None else "",
        escaped(stability.words) if stability is not None else "",
    ]


def _causal(report: ReportDocument) -> list[str]:
    """Which features the reward rests on, those against the labels first; how salience goes with effect; the set of all."""
    found, features = report.causal, report.features or []
    if found is None:
        return []
    measured = disagreements_first(features)
    held, tested = ([f for f in measured if f.causal_verified in words] for words in (("yes",), ("yes", "no")))
    named = ", ".join(f"{f.latent_id} ({text.signed(f.causal_effect, 3)})" for f in held[:_FEATURES])
    said = [f"Verified by ablation: {len(held)} of {len(tested)} tested" + (f": {named}" if named else "") + "."]
    if found.correlation is not None:
        ends = text.interval(found.correlation.lo, found.correlation.hi)
        said.append(f"Rank correlation of the sizes of salience and effect: {text.signed(found.correlation.rho)} ({ends}).")
    whole = next((one for one in found.sets if (one.name, one.axis, one.subset) == ("safety", None, None)), None)
    if whole is not None:
        ends = f"{text.signed(whole.change, 3)} ({text.interval(whole.change_lo, whole.change_hi, 3)})"
        said.append(f"Without all {whole.n_latents} safety features at once pair accuracy changes by {ends}.")
    return ["## Causal effects", *map(escaped, said)]


def _marks(feature: Feature) -> list[str]:
    found = {
        "discovery": feature.discovery,
        "not significant": feature.discovery is False,
        "found again": feature.replicated,
        "in a second SAE": feature.second_seed is not None and feature.second_seed.found_again,
        "length-bound": feature.length_bound,
        "mixed sign": feature.mixed,
    }
    return [name for name, holds in found.items() if holds]


def _feature_row(feature: Feature) -> tuple[str, ...]:
    return (
        str(feature.latent_id),
        code(text.name_of(feature) or f"latent {feature.latent_id}"),
        str(feature.rating) if feature.rating is not None else text.NONE,
        detection_words(feature) + (" unverified" if feature.status == "unverified" else ""),
        feature.fires_on,
        text.signed(feature.salience),
        text.interval(feature.salience_lo, feature.salience_hi),
        text.number(feature.q),
        ", ".join(_marks(feature)) or text.NONE,
        text.small_percent(feature.firing_rate),
        text.signed(feature.causal_effect, 4) + " " + text.interval(feature.causal_effect_lo, feature.causal_effect_hi)
        if feature.causal_effect is not None
        else text.NONE,
        feature.causal_verified or text.NONE,
    )


def _accuracy(report: ReportDocument) -> list[str]:
    parts = ["## Accuracy"]
    if report.evaluation is not None:
        parts += ["On evaluation pairs:", _measured(report.evaluation.groups)]
        scores = [*(report.evaluation.best_of_n or []), *(report.evaluation.styles or [])]
        rows = [
            (
                text.words(s.name),
                code(s.subset or s.axis or "all pairs"),
                text.count(s.accuracy.n),
                text.percent(s.accuracy.estimate),
            )
            for s in scores[:_SLICES]
        ]
        parts += [_table(("score", "slice", "comparisons", "accuracy"), rows), *_lengths(report.evaluation.length)]
    if report.reward_model is None:
        return [*parts, _absent(report, "reward_model")]
    parts += ["On the audited pairs:", _measured(report.reward_model.on_audited_pairs)]
    if report.reward_model.retrained:
        parts += ["On the same pairs, by models trained without them:", _measured(report.reward_model.retrained)]
    return parts


def _lengths(rows: Sequence[Length]) -> list[str]:
    head = ("slice", "longer chosen", "longer preferred", "accuracy, chosen longer", "chosen shorter", "gap within subsets")
    shares = ("longer_chosen", "longer_preferred", "accuracy_longer", "accuracy_shorter")
    lines = []
    for row in rows[:_SLICES]:
        figures = [text.NONE if (share := getattr(row, name)) is None else text.percent(share.estimate) for name in shares]
        gap = text.NONE if row.gap is None else text.signed(row.gap.estimate, 2)
        interval = text.NONE if row.gap is None else text.interval(row.gap.lo, row.gap.hi)
        lines.append((_slice(row), *figures, gap if interval == text.NONE else f"{gap} ({interval})"))
    return ["Length of the responses, in tokens:", _table(head, lines)] if rows else []


def _slice(row: Measured | Length) -> str:
    return code(f"{row.axis} / {row.subset}" if row.subset is not None else row.axis or "all pairs")


def _measured(rows: Sequence[Measured]) -> str:
    head = ("slice", "pairs", "accuracy", "95 % interval", "mean margin")
    return _table(
        head,
        [
            (
                _slice(row),
                text.count(row.accuracy.n),
                text.percent(row.accuracy.estimate),
                text.share_interval(row.accuracy),
                text.signed(row.margin.estimate),
            )
            for row in rows[:_SLICES]
        ],
    )


def _recommended(pair: SuspiciousPair) -> str:
    asides = [" (contested)" if pair.disputed_by else "", " (no signal against the label)" if pair.undoubted else ""]
    return f"{pair.action or text.NONE}{''.join(asides)}"


def _pairs(report: ReportDocument) -> list[str]:
    edits = report.edits
    if edits is None:
        return ["## Suspicious pairs", _absent(report, "edits")]
    head = ("pair", "axis", "suspicion", "reward margin", "recommended", "evidence against the label", "evidence for the label")
    rows = [
        (
            code(pair.pair_id, 80),
            code(pair.axis, 40),
            text.number(pair.suspicion, 3),
            text.signed(pair.reward_margin),
            _recommended(pair),
            _evidence([part for part in pair.evidence if part.contribution < 0]),
            _evidence([part for part in pair.evidence if part.contribution > 0]),
        )
        for pair in edits.pairs[:_PAIRS]
    ]
    rest = max(0, edits.n_scored - len(rows))
    return [
        "## Suspicious pairs",
        _table(head, rows),
        f"{text.count(rest)} more pairs are in pair_scores.parquet." if rest else "",
        "\n".join(f"- {escaped(said)}" for said in sae_adds(edits.axes)),
    ]


def _evidence(parts: Sequence[Evidence]) -> str:
    strongest = sorted(parts, key=lambda part: -abs(part.contribution))[:3]
    return ", ".join(f"latent {part.latent_id} ({text.signed(part.contribution, 2)})" for part in strongest) or text.NONE


def _data(report: ReportDocument) -> list[str]:
    data = report.dataset
    if data is None:
        return ["## Data health", _absent(report, "dataset")]
    parts = [("Audited pairs", data.health)] + ([("Evaluation pairs", data.evaluation_health)] if data.evaluation_health else [])
    lines = []
    for name, health in parts:
        dropped = "".join(f" + {text.count(n)} {escaped(text.words(reason))}" for reason, n in health.dropped.items())
        lines.append(f"- {name}: {text.count(health.n_in)} read = {text.count(health.n_kept)} kept{dropped}")
    return ["## Data health", "\n".join(lines)]


def _cost(report: ReportDocument) -> list[str]:
    timing = report.provenance.timing
    total = ("**total**", timing.total_seconds, timing.peak_memory_bytes, timing.disk_bytes, timing.planned)
    stages = [(text.words(c.stage), c.seconds, c.peak_memory_bytes, c.disk_bytes, c.planned) for c in timing.stages]
    rows = [_cost_row(*row) for row in [*stages, total]] if stages else []
    head = ("stage", "time planned", "time", "peak memory planned", "peak memory", "disk planned", "disk")
    return [
        f"<!-- timing -->\n## Cost\n\n{text.duration(timing.total_seconds)} of computing; written {timing.created}.\n\n"
        f"{_table(head, rows)}\n<!-- end of timing -->"
    ]


def _cost_row(name: str, seconds: float, memory: int | None, disk: int, planned: PlannedCost | None) -> tuple[str, ...]:
    expected = planned or NO_PLAN
    times = text.duration(expected.seconds), text.duration(seconds)
    memories = text.size(expected.peak_memory_bytes), text.size(memory)
    return (name, *times, *memories, text.size(expected.disk_bytes), text.size(disk))


def _provenance(report: ReportDocument) -> list[str]:
    found = report.provenance
    inputs = [f"- {name}: {code(record.origin)} sha256 `{record.digest[:16]}`" for name, record in found.inputs.items()]
    missing = [f"- `{path}`: {escaped(reason)}" for path, reason in found.not_computed.items()]
    return [
        "## Provenance",
        "\n".join([f"- {found.tool} {found.tool_version}, seed {found.seed}", *inputs]),
        "Not in this report:" if missing else "",
        "\n".join(missing),
    ]


def _absent(report: ReportDocument, path: str) -> str:
    return f"Not in this report: {escaped(report.provenance.not_computed.get(path, 'not computed'))}."
