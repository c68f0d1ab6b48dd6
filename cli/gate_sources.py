"""Where the gate's audits come from: files of this machine, jobs of a service by id or label, or a new submission."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.output import console
from cli.profile import connect
from safer_engine.errors import SpecError
from safer_engine.gate.baselines import LABEL, label_of

if TYPE_CHECKING:
    from rich.console import Console

    from safer_engine.gate.documents import Audit
    from safer_engine.gate.power import SliceSize
    from safer_engine.gate.together import Together
    from service.client import AuditClient, Submission
    from service.schemas import JobView

_REPORT, _EVALUATION = "report.json", "evaluation.jsonl"
_AUDIT_FLAGS = ("model", "dataset", "eval_dataset", "spec_file")


def submits(flags: dict[str, Any]) -> bool:
    """Whether the flags describe an audit to be made."""
    return any(flags[name] is not None for name in _AUDIT_FLAGS)


def require_one_source(report: Path | None, audit: str | None, gate: str | None, flags: dict[str, Any]) -> None:
    """Raise SpecError unless exactly one audit, or gate on one, is named."""
    given = sum((report is not None, audit is not None, gate is not None, submits(flags)))
    if given != 1:
        raise SpecError(
            "no audit is given" if given == 0 else "more than one audit is given",
            "give --report (a report.json), or --audit (a job's id), or --model, --dataset and --eval-dataset to have one made; "
            "--gate names one that was posted",
        )


def submission(flags: dict[str, Any], labels: tuple[str, ...], callback: str | None) -> Submission:
    """The audit that flags describe. `callback`: is told of its end."""
    from cli.submit import audit_document, parse_labels
    from service.client import Submission

    return Submission(audit_document(flags, None), labels=parse_labels(labels), callback_url=callback)


def submitted(flags: dict[str, Any], labels: tuple[str, ...], callback: str | None, shown: Console | None) -> JobView:
    """Have a service do an audit, and wait for it. Raises the job's error where it failed."""
    from cli.live import outcome_error
    from cli.submit import send

    job = send(submission(flags, labels, callback), shown, wait=True)
    if (error := outcome_error(job)) is not None:
        raise error
    return job


def plan_data(
    report: Path | None,
    baseline: tuple[str, ...],
    dataset: Path | None,
    pairs: tuple[str, ...],
    **expected: Any,
) -> tuple[list[SliceSize], tuple[Together, ...]]:
    """The slices to plan with, and what was measured of them against a baseline.

    Args:
        expected: accuracy, correlation, design_effect, baselines (how many) and training_sd; None where not given.
    """
    from safer_engine.gate.power import Trainings

    count, sd = expected.pop("baselines"), expected.pop("training_sd")
    if (count is None) != (sd is None):
        raise SpecError("--baselines and --training-sd are one thing", "give both, for example --baselines 5 --training-sd 0.02")
    if len(baseline) > 1:
        raise SpecError(
            "gate plan measures on one --baseline",
            "for several give --baselines N --training-sd SD; a gate against them says the SD of each figure",
        )
    sizes, measured = _plan_sizes(report, next(iter(baseline), None), dataset, pairs, **expected)
    trainings = Trainings() if count is None else Trainings(count, sd)
    return [replace(size, trainings=trainings) for size in sizes], measured


def _plan_sizes(
    report: Path | None,
    baseline: str | None,
    dataset: Path | None,
    pairs: tuple[str, ...],
    **expected: float | None,
) -> tuple[list[SliceSize], tuple[Together, ...]]:
    from safer_engine.gate.counts import dataset_sizes, report_sizes, told_sizes
    from safer_engine.gate.documents import load_audit
    from safer_engine.gate.together import measured_together, with_pairing

    if sum(map(bool, (report, dataset, pairs))) != 1:
        raise SpecError("give one of --report, --dataset and --pairs", "for example --pairs safety=450")
    if baseline is not None and report is None:
        raise SpecError("--baseline is compared with --report, which is not given", "give both, or --correlation alone")
    accuracy, effect = expected["accuracy"], expected["design_effect"]
    if report is None:
        right, together = 0.9 if accuracy is None else accuracy, effect or 1.0
        return (told_sizes(pairs, right, together) if dataset is None else dataset_sizes(dataset, right, together)), ()
    audit = load_audit(report, "--report")
    sizes = report_sizes(audit, accuracy, effect)
    if baseline is None:
        return sizes, ()
    measured = measured_together(audit, baseline_of(baseline, None))
    return with_pairing(sizes, measured, expected["correlation"], effect), measured


def audit_of(report: Path | None, job_id: str | None, shown: Console | None) -> Audit:
    """A finished audit, of a file or of a job."""
    from safer_engine.gate.documents import load_audit

    if job_id is None:
        assert report is not None
        return load_audit(report, "--report")
    with connect() as client:
        return _of_job(client, job_id, shown, wait=True)


def baseline_of(text: str, job_id: str | None) -> Audit:
    """The audit that a model must not fall behind: a path, a job's id, `label:NAME=VALUE`, or `label:X` for `label:alias=X`.

    Args:
        job_id: the job under judgement, which is never its own baseline by label.
    """
    from safer_engine.gate.documents import load_audit

    if is_path(text):
        return load_audit(Path(text).expanduser(), "--baseline")
    label = label_of(text)
    with connect() as client:
        return _of_job(client, text if label is None else _labelled(client, label, job_id), None, wait=False)


def is_path(baseline: str) -> bool:
    """Whether a baseline is a file or folder of this machine."""
    path = Path(baseline).expanduser()
    return path.exists() or (not baseline.startswith(LABEL) and ("/" in baseline or path.suffix == ".json"))


def _labelled(client: AuditClient, label: tuple[str, str], job_id: str | None) -> str:
    """The newest finished audit with a label."""
    from service.client import JobFilter
    from service.errors import NotFound

    wanted = JobFilter(states=("succeeded",), kind="audit", labels=dict([label]))
    for job in client.jobs(wanted, limit=2):
        if job.id != job_id:
            return job.id
    raise NotFound(f"no finished audit has the label {label[0]}={label[1]}", "submit the baseline with --label, or name its job")


def _of_job(client: AuditClient, job_id: str, shown: Console | None, *, wait: bool) -> Audit:
    from cli.live import outcome_error, wait_for
    from safer_engine.gate.documents import read_audit
    from service.client import is_final
    from service.errors import Conflict

    job = client.job(job_id)  # a service that is away now is not waited for; one that goes away later is
    if wait and not is_final(job):
        job = wait_for(client, job_id, shown)
    if (error := outcome_error(job)) is not None:
        raise error
    if not job.kind.reports or job.state != "succeeded":
        raise Conflict(f"job {job_id} is no finished audit: {job.kind}, {job.state}", "wait for it with --wait")
    names = {artifact.name: artifact for artifact in client.artifacts(job_id)}
    report = client.read(job_id, names.get(_REPORT) or client.artifact(job_id, _REPORT))
    lines = client.read(job_id, names[_EVALUATION]) if _EVALUATION in names else None
    return read_audit(report, lines, f"job {job_id}")


def progress_console(*, quiet: bool) -> Console | None:
    """Where progress is shown; None shows nothing."""
    return None if quiet else console(err=True)
