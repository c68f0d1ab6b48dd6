"""A section of a Hugging Face model card, and the evaluation metadata that the Hub reads (`model-index`).

Names that come from data stand in code spans; metadata is written by huggingface_hub. What else a card holds is left as it is.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from safer_engine.errors import InputRefused, ResourceError
from safer_engine.exports.finished_audit import FinishedAudit, cautions_of
from safer_engine.report import summary
from safer_engine.report.markdown import code, escaped
from safer_engine.report.model import Measured, ReportDocument
from safer_engine.report.provenance import InputRecord
from safer_engine.report.text import interval, percent, signed

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

BEGIN, END = "<!-- safer-audit: begin -->", "<!-- safer-audit: end -->"
TASK = "preference ranking, audited by safer-audit"
"""What marks results of ours in the metadata: those of an earlier audit are replaced."""
_TYPE = "reward-modeling"
MAX_CARD = 1 << 24


def card(audit: FinishedAudit, given: str | None) -> str:
    """The text of a model card with the audit in it.

    Args:
        given: the card as it is; None: a new one. Results and section of an earlier audit are replaced.

    Raises:
        InputRefused: the card's metadata cannot be read, or its markers do not pair. ResourceError: huggingface_hub is missing.
    """
    try:
        from huggingface_hub import ModelCard
    except ImportError:
        raise ResourceError("huggingface_hub is not installed", "pip install 'safer-audit[engine]'") from None
    start = (
        f"---\nlibrary_name: transformers\n---\n\n# {_title(audit.report)}\n" if given is None else given.replace("\r\n", "\n")
    )
    try:
        found = ModelCard(start)
        earlier = [one for one in found.data.eval_results or [] if one.task_name != TASK]
    except Exception as error:  # whatever somebody's metadata makes the library raise
        raise InputRefused(f"the metadata of the card cannot be read: {error}", "mend the block between the --- lines") from None
    found.data.eval_results = [*earlier, *results(audit.report)]
    found.data.model_name = found.data.model_name or _title(audit.report)
    found.text = _with_section(found.text, section(audit.report))
    text = _text(found)
    if given is not None:
        _require_kept(start, text)
    return text.replace("\n", "\r\n") if given is not None and "\r\n" in given else text


def _require_kept(before: str, after: str) -> None:
    """Raise InputRefused where metadata of the card are not what they were, but for our own results and comments."""
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    def theirs(text: str) -> tuple[dict[str, Any], list[Any]]:
        block = REGEX_YAML_BLOCK.search(text)
        metadata = dict((yaml.safe_load(block.group(2)) if block else None) or {})
        index = metadata.pop("model-index", None) or []
        results = [result for model in index for result in model.get("results", [])]
        return metadata, [one for one in results if (one.get("task") or {}).get("name") != TASK]

    models = (yaml.safe_load(block.group(2)) or {}).get("model-index") if (block := REGEX_YAML_BLOCK.search(before)) else None
    if len(models or []) > 1 or theirs(before) != theirs(after):
        raise InputRefused(
            "the card's metadata hold what would be lost: several models, or fields that huggingface_hub does not know",
            "leave --card out, and copy the section and the results from model-card.md",
        )


def _text(found: ModelCard) -> str:
    try:
        return str(found)
    except ValueError as error:
        raise InputRefused(f"the card's metadata cannot be written: {error}", "mend the block between the --- lines") from None


def results(report: ReportDocument) -> list[EvalResult]:
    """Pair accuracy on every slice of the evaluation pairs (without such, of the audited pairs), and the doubtful shares."""
    from huggingface_hub import EvalResult

    name, slices = measured(report)
    record = report.provenance.inputs.get("evaluation" if name == "evaluation" else "dataset")
    origin = "unknown" if record is None else _origin(record)
    hub = record is not None and record.revision is not None
    common: dict[str, Any] = {
        "task_type": _TYPE,
        "task_name": TASK,
        "dataset_type": origin if hub else "local",
        "dataset_name": f"{origin} ({_WORDS[name]})",
        "dataset_revision": record.revision if record is not None and hub else None,
    }
    digest = {} if record is None else {"sha256": record.digest}
    return [
        EvalResult(
            **common,
            dataset_config=_slice(one),
            dataset_args=digest,
            metric_type="accuracy",
            metric_name="pair accuracy",
            metric_value=round(one.accuracy.estimate, 4),
            metric_args={"n": one.accuracy.n, "lo_95": one.accuracy.lo, "hi_95": one.accuracy.hi},
        )
        for one in slices
    ]


_WORDS = {"evaluation": "evaluation pairs", "audited": "audited pairs, which it may have been trained on"}


def measured(report: ReportDocument) -> tuple[str, list[Measured]]:
    """What accuracy was measured on, `evaluation` or `audited`, and the slices."""
    if report.evaluation is not None:
        return "evaluation", report.evaluation.groups
    return "audited", [] if report.reward_model is None else report.reward_model.on_audited_pairs


def _slice(one: Measured) -> str:
    return "all" if one.axis is None else one.axis if one.subset is None else f"{one.axis}/{one.subset}"


def _title(report: ReportDocument) -> str:
    record = report.provenance.inputs.get("model")
    origin = "" if record is None else _origin(record)
    return origin if record is not None and record.revision else re.sub(r"[^\w.-]+", "-", origin).strip("-.") or "reward model"


def section(report: ReportDocument) -> str:
    """The section, between its markers."""
    name, slices = measured(report)
    found = report.provenance
    rows = [(_code(one.axis), _code(one.subset), one.accuracy.n, _share(one)) for one in slices]
    inputs = [(what, code(_origin(record)), code(record.revision or ""), code(record.digest[:16]))
              for what, record in found.inputs.items()]  # fmt: skip
    parts = [
        BEGIN,
        "## Reward model audit",
        f"By {code(found.tool)} {code(found.tool_version)}; report written {code(found.timing.created)}.",
        escaped(summary.paragraph(report)),
        _table(f"Pair accuracy ({_WORDS[name]})", ("axis", "subset", "pairs", "accuracy (95 %)"), rows),
        _doubtful(report),
        _features(report),
        _verification(report),
        "### Limits\n\n" + "\n".join(f"- {escaped(text)}" for text in cautions_of(report)),
        _table("What was audited", ("input", "origin", "revision", "digest"), inputs),
        END,
    ]
    return "\n\n".join(part for part in parts if part)


def _origin(record: InputRecord) -> str:
    """A hub id as it is; of a path the last part: where somebody keeps a file is nobody's business."""
    return record.origin if record.revision is not None else PurePath(record.origin).name


def _code(part: str | None) -> str:
    return "all" if part is None else code(part)


def _share(one: Measured) -> str:
    found = one.accuracy
    ends = "" if found.lo is None or found.hi is None else f" ({percent(found.lo)} … {percent(found.hi)})"
    return percent(found.estimate) + ends


def _doubtful(report: ReportDocument) -> str:
    rows = [
        (code(axis.axis), axis.n, percent(axis.doubtful_share),
         "" if axis.doubtful_share_lo is None or axis.doubtful_share_hi is None
         else f"{percent(axis.doubtful_share_lo)} … {percent(axis.doubtful_share_hi)}")
        for axis in (report.edits.axes if report.edits is not None else []) if axis.doubtful_share is not None
    ]  # fmt: skip
    return _table("Labels that are doubtful", ("axis", "pairs", "estimated share", "95 %"), rows) if rows else ""


def _features(report: ReportDocument) -> str:
    named = [feature for feature in report.features or [] if feature.safety_feature]
    if not named or report.causal is None:
        return ""
    held = sum(feature.causal_verified == "yes" for feature in named)
    return f"Safety features: {len(named)}; ablation shows that the reward rests on {held} of them."


def _verification(report: ReportDocument) -> str:
    found = report.verification
    if found is None:
        return ""
    ours = next((one for one in found.effects if (one.arm, one.reference, one.axis) == ("edits", "as given", None)), None)
    ends = "" if ours is None or ours.lo is None or ours.hi is None else f" ({interval(100 * ours.lo, 100 * ours.hi, 1)})"
    change = "" if ours is None else f": {signed(100 * ours.change, 1)} points of accuracy{ends}"
    return f"Retraining with the recommended edits, {found.seeds} seeds: {found.outcome}{change}."


def _table(title: str, columns: tuple[str, ...], rows: list[Any]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return f"### {title}\n\n" + "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _with_section(body: str, ours: str) -> str:
    """The card's text with our section in the place of an earlier one, else at its end."""
    if (body.count(BEGIN), body.count(END)) not in ((0, 0), (1, 1)) or body.find(END) < body.find(BEGIN):
        raise InputRefused("the card's markers of safer-audit do not pair", f"leave one {BEGIN} before one {END}, or neither")
    if BEGIN not in body:
        return f"{body.rstrip()}\n\n{ours}\n"
    before, rest = body.split(BEGIN)
    return before + ours + rest.split(END)[1]
