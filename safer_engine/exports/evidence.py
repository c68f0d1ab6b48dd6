"""An audit in short, to be cited: what was tested, on what, by which version, with which result and limits.

Everything comes from report.json and the files beside it; no clock is read, so the same files give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from safer_engine.errors import InputRefused
from safer_engine.exports.finished_audit import FinishedAudit, cautions_of, finished_audit
from safer_engine.gate.documents import MAX_EVALUATION, REPORT
from safer_engine.report.markdown import code, escaped
from safer_engine.report.model import Health, Length, Measured, ReportDocument
from safer_engine.report.model_causal import SAFETY_SET, SetAblation
from safer_engine.report.model_verification import ArmEffect
from safer_engine.report.nodes import Count, Node, Rate
from safer_engine.report.provenance import InputRecord, Provenance

_CITED = ("report.html", "report.md", "evaluation.jsonl", "edits.jsonl", "features.parquet", "pair_scores.parquet")
_NOT_SAID = (
    "The figures hold for the data named here, as sampled; other prompts may give other figures.",
    "Intervals cover the sampling of groups of pairs, not the choice of the data nor of the labels that are taken as right.",
    "This file states what was measured. It states no compliance with any rule.",
)


class CitedFile(Node):
    """A file of the audit."""

    name: str
    sha256: str = Field(description="Of its bytes, in hexadecimal digits.")
    bytes: Count


class StageMade(Node):
    """A stage that was computed."""

    stage: str
    version: int | None
    content_digest: str | None = Field(description="Of the artifact it left.")


class NotMade(Node):
    """A check that was not made."""

    what: str = Field(description="`stage` and its name, or the path of a null in report.json.")
    reason: str


class Doubtful(Node):
    """Estimated share of wrong labels of an axis, with its 95 % interval; null where there is no estimate."""

    axis: str
    n: Count
    share: Rate | None
    lo: Rate | None
    hi: Rate | None


class Ablated(Node):
    """Which features the reward rests on, by ablation; sets: all safety features at once, on each slice."""

    n_pairs: Count
    n_features: Count
    n_verified: Count
    n_safety: Count
    n_safety_verified: Count
    safety_set: list[SetAblation]


class Retrained(Node):
    """What retraining with the recommended edits changed."""

    outcome: str
    harmed: list[str]
    seeds: Count
    planned: Count
    n_evaluated: Count
    effects: list[ArmEffect] = Field(description="Of the edits, against the data as given and each control, by slice.")
    sweep_chosen: float | None = Field(description="Budget that a sweep chose; null without a sweep.")
    sweep_outcome: str | None


class EvidenceDocument(Node):
    """The evidence file. Estimates carry 95 % intervals."""

    schema_version: Literal[1] = 1
    tool: str
    tool_version: str
    report_created: str = Field(description="UTC time at which report.json was written, as it says.")
    seed: int
    inputs: dict[str, InputRecord] = Field(description="Model, dataset and evaluation set as they were found.")
    stages: list[StageMade]
    read: dict[str, Health] = Field(description="Pairs read, kept and dropped by reason: of the dataset and the evaluation set.")
    accuracy: list[Measured] | None = Field(description="By axis and subset; null: see not_made.")
    length: list[Length] | None = Field(description="How rewards follow length, in the same slices; null: see not_made.")
    doubtful: list[Doubtful] | None = Field(description="By axis; null: see not_made.")
    recommended: dict[str, Count] | None = Field(description="Rows by recommended action; null: not recommended, see not_made.")
    ablated: Ablated | None = Field(description="Null: see not_made.")
    retrained: Retrained | None = Field(description="Null: see not_made.")
    not_made: list[NotMade]
    limits: list[str]
    files: list[CitedFile] = Field(description="report.json, and those of the audit's files that lie beside it.")


def evidence(path: Path, what: str) -> EvidenceDocument:
    """The evidence file of a finished audit.

    Args:
        path: report.json, or the folder that holds it.
        what: the option that named it, for messages.

    Raises:
        InputRefused: it is no finished audit, or a file beside it is not of the same one or cannot be read.
    """
    return evidence_of(finished_audit(path, what))


def evidence_of(audit: FinishedAudit) -> EvidenceDocument:
    """As `evidence`, of an audit that was read. Raises InputRefused: a file beside it cannot be read."""
    return _document(audit.report, _files(audit))


def evidence_text(document: EvidenceDocument) -> str:
    """What evidence.json holds."""
    return document.model_dump_json(indent=2) + "\n"


def _document(report: ReportDocument, files: list[CitedFile]) -> EvidenceDocument:
    found, data, measured, edits = report.provenance, report.dataset, report.evaluation, report.edits
    health = {} if data is None else {"dataset": data.health, "evaluation": data.evaluation_health}
    computed = [stage for stage in found.stages if stage.state == "computed"]
    return EvidenceDocument(
        tool=found.tool,
        tool_version=found.tool_version,
        report_created=found.timing.created,
        seed=found.seed,
        inputs={str(name): record for name, record in found.inputs.items()},
        stages=[StageMade(stage=s.stage, version=s.version, content_digest=s.content_digest) for s in computed],
        read={name: counts for name, counts in health.items() if counts is not None},
        accuracy=None if measured is None else measured.groups,
        length=None if measured is None else measured.length,
        doubtful=None
        if edits is None
        else [
            Doubtful(axis=a.axis, n=a.n, share=a.doubtful_share, lo=a.doubtful_share_lo, hi=a.doubtful_share_hi)
            for a in edits.axes
        ],
        recommended=None if edits is None else edits.actions,
        ablated=_ablated(report),
        retrained=_retrained(report),
        not_made=_not_made(found),
        limits=[*cautions_of(report), *_NOT_SAID],
        files=files,
    )


def _not_made(found: Provenance) -> list[NotMade]:
    """Stages that were not computed, then nulls that do not bear a listed stage's name."""
    stages = {s.stage: s.reason or "no reason was recorded" for s in found.stages if s.state != "computed"}
    nulls = [(what, why) for what, why in sorted(found.not_computed.items()) if what not in stages]
    listed = [*((f"stage {stage}", why) for stage, why in stages.items()), *nulls]
    return [NotMade(what=what, reason=why) for what, why in listed]


def _ablated(report: ReportDocument) -> Ablated | None:
    if report.causal is None:
        return None
    features = [feature for feature in report.features or [] if feature.causal_verified is not None]
    named = [feature for feature in features if feature.safety_feature]
    return Ablated(
        n_pairs=report.causal.n_pairs,
        n_features=len(features),
        n_verified=sum(feature.causal_verified == "yes" for feature in features),
        n_safety=len(named),
        n_safety_verified=sum(feature.causal_verified == "yes" for feature in named),
        safety_set=[one for one in report.causal.sets if one.name == SAFETY_SET],
    )


def _retrained(report: ReportDocument) -> Retrained | None:
    found = report.verification
    if found is None:
        return None
    return Retrained(
        outcome=found.outcome,
        harmed=found.harmed,
        seeds=found.seeds,
        planned=found.planned,
        n_evaluated=found.n_evaluated,
        effects=[effect for effect in found.effects if effect.arm == "edits"],
        sweep_chosen=None if found.sweep is None else found.sweep.chosen,
        sweep_outcome=None if found.sweep is None else found.sweep.outcome,
    )


def _files(audit: FinishedAudit) -> list[CitedFile]:
    """report.json and what lies beside it. Files that the audit was read from are cited as they were then."""
    read = {name: CitedFile(name=name, sha256=digest, bytes=size) for name, (digest, size) in audit.read.items()}
    found = [read[REPORT]]
    try:
        for file in (audit.path.parent / name for name in _CITED):
            if file.name in read:
                found.append(read[file.name])
            elif file.is_file():
                found.append(_cited(file, MAX_EVALUATION))
    except OSError as error:
        raise InputRefused(
            f"cannot read a file beside {audit.path}: {error.strerror}", "make the audit's files readable"
        ) from None
    return found


def _cited(path: Path, most: int) -> CitedFile:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
            size += len(block)
            if size > most:
                raise InputRefused(f"{path} has more than {most:,} bytes", "give the file as the audit wrote it")
    return CitedFile(name=path.name, sha256=digest.hexdigest(), bytes=size)


def evidence_markdown(document: EvidenceDocument) -> str:
    """The same to be read, in GitHub-flavoured Markdown; foreign names stand in code spans."""
    inputs = [(n, code(r.origin), code(r.revision or ""), code(r.digest)) for n, r in document.inputs.items()]
    read = [(n, h.n_in, h.n_kept, _counts(h.dropped)) for n, h in document.read.items()]
    accuracy = [
        (
            _name(m.axis),
            _name(m.subset),
            m.accuracy.n,
            _interval(m.accuracy.estimate, m.accuracy.lo, m.accuracy.hi),
        )
        for m in document.accuracy or []
    ]
    length = [
        (
            _name(e.axis),
            _name(e.subset),
            escaped(e.reasons.get("gap", "–")) if e.gap is None else _interval(e.gap.estimate, e.gap.lo, e.gap.hi),
        )
        for e in document.length or []
    ]
    doubtful = [(code(d.axis), d.n, _interval(d.share, d.lo, d.hi)) for d in document.doubtful or []]
    made = [(code(s.stage), s.version or "–", code(s.content_digest or "")) for s in document.stages]
    parts = [
        "# Evidence of a reward model audit",
        f"{code(document.tool)} {code(document.tool_version)}, seed {document.seed}; "
        f"report written {code(document.report_created)}.",
        _table("What was tested", ("input", "origin", "revision", "digest"), inputs),
        _table("Pairs read", ("set", "read", "kept", "dropped"), read),
        _table("Pair accuracy", ("axis", "subset", "pairs", "accuracy (95 %)"), accuracy),
        _table(
            "Accuracy where the chosen response is longer, less where it is shorter", ("axis", "subset", "gap (95 %)"), length
        ),
        _table("Doubtful labels, estimated share", ("axis", "pairs", "share (95 %)"), doubtful),
        "" if document.recommended is None else f"Recommended: {_counts(document.recommended)}.",
        *_ablated_parts(document.ablated),
        *_retrained_parts(document.retrained),
        _table("Stages", ("stage", "version", "digest"), made),
        _table("Checks not made", ("what", "why"), _by_reason(document.not_made)),
        "## Limits\n\n" + "\n".join(f"- {escaped(limit)}" for limit in document.limits),
        _table("Files", ("file", "SHA-256", "bytes"), [(code(f.name), code(f.sha256), f.bytes) for f in document.files]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _ablated_parts(found: Ablated | None) -> list[str]:
    """How many features the reward rests on, and what becomes of accuracy without all safety features at once."""
    heads = ("features", "pairs", "the reward rests on", "safety features", "on")
    rows = [] if found is None else [(found.n_features, found.n_pairs, found.n_verified, found.n_safety, found.n_safety_verified)]
    sets = [
        (
            one.n_latents,
            _name(one.axis),
            _name(one.subset),
            one.n_pairs,
            _three(one.accuracy),
            _three(one.ablated),
            _interval(*map(_points, (one.change, one.change_lo, one.change_hi))),
        )
        for one in ([] if found is None else found.safety_set)
    ]
    columns = ("features", "axis", "subset", "pairs", "accuracy", "without them", "points (95 %)")
    together = [_table("All safety features ablated at once", columns, sets)] if sets else []
    return [_table("Ablation of features", heads, rows), *together]


def _retrained_parts(found: Retrained | None) -> list[str]:
    """What retraining changed, where it harmed, and what a sweep of budgets came to."""
    rows = [
        (found.outcome, e.reference, _name(e.axis), _name(e.subset), _interval(*map(_points, (e.change, e.lo, e.hi))))
        for e in found.effects
    ] if found is not None else []  # fmt: skip
    parts = [_table("Retraining with the recommended edits", ("outcome", "against", "axis", "subset", "points (95 %)"), rows)]
    if found is None:
        return parts
    said = f"{found.seeds} of {found.planned} seeds, {found.n_evaluated} evaluation pairs."
    where = f"Harm is shown on {', '.join(map(code, found.harmed))}." if found.harmed else "Harm is shown on no subset."
    parts.append(f"{said} {where}")
    if found.sweep_outcome is not None:
        chosen = (
            "no budget was chosen" if found.sweep_chosen is None else f"{100 * found.sweep_chosen:g} % of the rows was chosen"
        )
        parts.append(f"Of the budgets tried {chosen}; on pairs that it was not chosen by: {found.sweep_outcome}.")
    return parts


def _by_reason(not_made: list[NotMade]) -> list[tuple[str, str]]:
    """Checks that were not made for the same reason on one line."""
    grouped: dict[str, list[str]] = {}
    for one in not_made:
        grouped.setdefault(one.reason, []).append(code(one.what))
    return [(", ".join(names), escaped(reason)) for reason, names in grouped.items()]


def _name(part: str | None) -> str:
    """A part of the data; `all` outside a code span is no name that the data gave."""
    return "all" if part is None else code(part)


def _interval(estimate: float | None, lo: float | None, hi: float | None) -> str:
    if estimate is None:
        return "–"
    return _three(estimate) if lo is None or hi is None else f"{_three(estimate)} ({_three(lo)} to {_three(hi)})"


def _points(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _three(value: float) -> str:
    """Three digits; what rounds to 0 has no sign."""
    return f"{round(value, 3) + 0.0:.3f}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{code(name)} {n}" for name, n in counts.items()) or "0"


def _table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    body = rows or [("none", *("" for _ in columns[1:]))]
    lines = [columns, tuple("---" for _ in columns), *body]
    return f"## {title}\n\n" + "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def schema_text() -> str:
    """The published JSON Schema: `python -m safer_engine.exports.evidence docs/evidence.schema.json`."""
    return json.dumps(EvidenceDocument.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(schema_text(), encoding="utf-8")
