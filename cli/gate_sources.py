"""Where the gate's audits come from: files of this machine, jobs of a service by id or label, or a new submission."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.output import console
from cli.profile import connect
from safer_engine.errors import SpecError

if TYPE_CHECKING:
    from rich.console import Console

    from safer_engine.gate.documents import Audit
    from service.client import AuditClient
    from service.schemas import JobView

LABEL = "label:"
_ALIAS = "alias"
_REPORT, _EVALUATION = "report.json", "evaluation.jsonl"
_AUDIT_FLAGS = ("model", "dataset", "eval_dataset", "spec_file")


def submits(flags: dict[str, Any]) -> bool:
    """Whether the flags describe an audit to be made."""
    return any(flags[name] is not None for name in _AUDIT_FLAGS)


def require_one_source(report: Path | None, audit: str | None, flags: dict[str, Any]) -> None:
    """Raise SpecError unless exactly one audit is named."""
    given = sum((report is not None, audit is not None, submits(flags)))
    if given != 1:
        raise SpecError(
            "no audit is given" if given == 0 else "more than one audit is given",
            "give --report (a report.json), or --audit (a job's id), or --model, --dataset and --eval-dataset to have one made",
        )


def submitted(
    flags: dict[str, Any], labels: tuple[str, ...], callback: str | None, shown: Console | None, *, wait: bool
) -> JobView:
    """Have a service do an audit. Raises the job's error where it failed."""
    from cli.live import outcome_error
    from cli.submit import audit_document, parse_labels, send
    from service.client import Submission

    wanted = Submission(audit_document(flags, None), labels=parse_labels(labels), callback_url=callback)
    job = send(wanted, shown, wait=wait)
    if (error := outcome_error(job)) is not None:
        raise error
    return job


def audit_of(report: Path | None, job_id: str | None, shown: Console | None, *, wait: bool) -> Audit:
    """A finished audit, of a file or of a job."""
    from safer_engine.gate.documents import load_audit

    if job_id is None:
        assert report is not None
        return load_audit(report, "--report")
    with connect() as client:
        return _of_job(client, job_id, shown, wait=wait)


def baseline_of(text: str, job_id: str | None) -> Audit:
    """The audit that a model must not fall behind: a path, a job's id, `label:NAME=VALUE`, or `label:X` for `label:alias=X`.

    Args:
        job_id: the job under judgement, which is never its own baseline by label.
    """
    from safer_engine.gate.documents import load_audit

    path = Path(text).expanduser()
    if path.exists() or "/" in text or path.suffix == ".json":
        return load_audit(path, "--baseline")
    with connect() as client:
        found = _labelled(client, text.removeprefix(LABEL), job_id) if text.startswith(LABEL) else text
        return _of_job(client, found, None, wait=False)


def _labelled(client: AuditClient, label: str, job_id: str | None) -> str:
    """The newest finished audit with a label."""
    from service.client import JobFilter
    from service.errors import NotFound

    name, separator, value = label.partition("=")
    name, value = (name, value) if separator else (_ALIAS, name)
    if not name or not value:
        raise SpecError(
            f"cannot read --baseline {LABEL}{label}", f"write {LABEL}NAME=VALUE, or {LABEL}production for {LABEL}alias=production"
        )
    wanted = JobFilter(states=("succeeded",), kind="audit", labels={name: value})
    for job in client.jobs(wanted, limit=2):
        if job.id != job_id:
            return job.id
    raise NotFound(f"no finished audit has the label {name}={value}", "submit the baseline with --label, or name its job")


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
    if job.kind != "audit" or job.state != "succeeded":
        raise Conflict(f"job {job_id} is no finished audit: {job.kind}, {job.state}", "wait for it with --wait")
    names = {artifact.name: artifact for artifact in client.artifacts(job_id)}
    report = client.read(job_id, names.get(_REPORT) or client.artifact(job_id, _REPORT))
    lines = client.read(job_id, names[_EVALUATION]) if _EVALUATION in names else None
    return read_audit(report, lines, f"job {job_id}")


def progress_console(*, quiet: bool) -> Console | None:
    """Where progress is shown; None shows nothing."""
    return None if quiet else console(err=True)
