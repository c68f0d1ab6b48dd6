"""`safer-audit submit`: have a service do an audit, or train a reward model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import Amount, build_from_flags, document_of_flags, flag_options, json_option, quiet_option
from cli.output import console, print_json
from cli.profile import connect
from safer_engine.errors import SpecError

if TYPE_CHECKING:
    from rich.console import Console

    from service.client import AuditClient, Submission
    from service.schemas import JobView

Document = dict[str, Any]
_ONLY_AUDIT = {"model": "--model", "sample": "--sample", "stratify": "--stratify", "no_text": "--no-text"}


@click.command("submit")
@flag_options
@click.option(
    "--kind",
    type=click.Choice(["audit", "verify", "train-rm", "compare", "drill"]),
    default="audit",
    show_default=True,
    help="What to do.",
)
@click.option(
    "--base", "-b", help="With --kind train-rm, verify or drill: the model to train from; other values with --spec and --set."
)
@click.option(
    "--audit", metavar="JOB", help="With --kind verify: the audit whose edits are verified; with compare: the first audit."
)
@click.option("--against", metavar="JOB", help="With --kind compare: the audit that is held against --audit.")
@click.option("--wait", "wait", flag_value=True, default=False, help="Show its stages until it ends.")
@click.option("--detach", "wait", flag_value=False, help="Print the job's id and leave (default).")
@click.option("--priority", type=click.IntRange(-100, 100), default=0, help="Higher goes first within the project.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="For finding the job again.")
@click.option("--callback", metavar="URL", help="Is told of the end by a POST.")
@click.option("--gpu-hours", type=Amount(), help="GPU time after which the job fails.")
@click.option("--idempotency-key", help="The same key and request always give the same job.")
@json_option
@quiet_option
def submit_command(  # noqa: PLR0913, PLR0917 - one parameter per flag
    flags: Document,
    kind: str,
    base: str | None,
    audit: str | None,
    against: str | None,
    wait: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Have a service do an audit, verify the edits of one by retraining, train a reward model, or compare two audits.

    Takes the flags of `run`. Models and datasets on this machine are uploaded, unless the service has them; an interrupted
    upload goes on when the command is given again. Ctrl-C during --wait leaves the job running.
    """
    from cli.live import outcome_error

    if audit is not None and kind not in {"verify", "compare"}:
        raise SpecError("--audit belongs to --kind verify or compare", "a job of another kind names its model and dataset")
    if against is not None and kind != "compare":
        raise SpecError("--against belongs to --kind compare", "give --kind compare --audit A --against B")
    writers: dict[str, Callable[[Document, str | None], Document]] = {
        "audit": audit_document,
        "verify": partial(_verification, audit=audit),
        "train-rm": _training,
        "compare": partial(_comparison, a=audit, b=against),
        "drill": _drill,
    }
    named = {**given, "audit": audit if kind == "verify" else None}
    wanted = _submission(writers[kind](flags, base), kind, parse_labels(given["labels"]), named)
    shown = None if quiet or as_json else console(err=True)
    job = send(wanted, shown, wait=wait)
    if as_json:
        print_json(job.model_dump(mode="json"))
    elif wait:
        _tell_end(job.id, kind, job.state == "succeeded")
    else:
        _tell_start(job.id, quiet)
    if wait and (error := outcome_error(job)) is not None:
        raise error


def send(wanted: Submission, shown: Console | None, *, wait: bool) -> JobView:
    """Upload what is on this machine, submit, and wait for the end where that is asked for. `shown`: None shows nothing."""
    from cli.live import wait_for

    with uploaded(wanted, shown) as (client, ready):
        job = client.submit(ready)
        if shown is not None:
            shown.print(f"job {job.id}", markup=False)
        return wait_for(client, job.id, shown) if wait else job


@contextmanager
def uploaded(wanted: Submission, shown: Console | None) -> Iterator[tuple[AuditClient, Submission]]:
    """A client, and the submission as it may be sent: what it names on this machine is uploaded. `shown`: None shows nothing."""
    from cli.inputs import bare_names, local_inputs, send_inputs, with_corrections, with_decisions, with_rubric

    wanted.body()  # what is wrong with it is said before gigabytes are read
    document = with_rubric(with_decisions(with_corrections(dict(wanted.spec))))
    inputs = local_inputs(document)
    if shown is not None:
        for name in bare_names(document):
            shown.print(f"{name}: no folder here has this name; the service will look for it on its hub", markup=False)
    with connect() as client:
        if inputs:
            client.me()  # a key that is refused is refused before gigabytes are read
        yield client, replace(wanted, spec=send_inputs(client, document, inputs, shown))


def parse_labels(texts: tuple[str, ...]) -> dict[str, str]:
    """`KEY=VALUE` texts as a dict. Raises SpecError."""
    labels = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise SpecError(f"cannot read --label {text!r}", "write KEY=VALUE")
        labels[name] = value
    return labels


def _submission(document: Document, kind: str, labels: dict[str, str], given: dict[str, Any]) -> Submission:
    from service.client import Submission

    hours = given["gpu_hours"]
    return Submission(
        spec=document,
        kind=kind,
        audit=given["audit"],
        priority=given["priority"],
        labels=labels,
        callback_url=given["callback"],
        gpu_seconds_budget=None if hours is None else 3600.0 * hours,
        idempotency_key=given["idempotency_key"],
    )


def audit_document(flags: Document, base: str | None) -> Document:
    """The audit spec, with the values that were given and no others: defaults are the service's."""
    if base is not None:
        raise SpecError("--base belongs to --kind train-rm, verify or drill", "an audit takes --model")
    return build_from_flags(**flags).spec.model_dump(mode="json", exclude_unset=True)


def _verification(flags: Document, base: str | None, *, audit: str | None) -> Document:
    """An audit spec with its verification; where an audit of the service is named, only what is to be other than there."""
    from cli.verify import with_verification
    from safer_engine.spec import merge
    from safer_engine.spec_layers import parse_assignments, read_document

    if audit is None:
        return with_verification(flags, base, None).spec.model_dump(mode="json", exclude_unset=True)
    document: Document = read_document(flags["spec_file"]) if flags["spec_file"] is not None else {}
    document = merge(document, document_of_flags(flags))
    document = merge(document, {} if base is None else {"retraining": {"base": base}})
    return merge(document, parse_assignments(flags["assignments"]))


def _comparison(flags: Document, base: str | None, *, a: str | None, b: str | None) -> Document:
    if base is not None or any(value not in (None, (), False) for value in flags.values()):
        raise SpecError("a comparison takes no flags of an audit", "give --kind compare --audit A --against B alone")
    if a is None or b is None:
        raise SpecError("a comparison needs two finished audits", "give --audit A --against B, ids of jobs")
    return {"a": a, "b": b}


def _drill(flags: Document, base: str | None) -> Document:
    from safer_engine.drill_spec import build_drill_spec

    return build_drill_spec(_trained(flags, base, "a drill")).model_dump(mode="json", exclude_unset=True)


def _training(flags: Document, base: str | None) -> Document:
    from safer_engine.train_spec import build_train_spec

    return build_train_spec(_trained(flags, base, "train-rm")).model_dump(mode="json", exclude_unset=True)


def _trained(flags: Document, base: str | None, what: str) -> Document:
    """The document of something that trains from a base. Raises SpecError for flags of an audit, and without base or dataset."""
    from safer_engine.spec import merge
    from safer_engine.spec_layers import parse_assignments, parse_source, read_document

    if wrong := [flag for name, flag in _ONLY_AUDIT.items() if flags[name]]:
        raise SpecError(
            f"{', '.join(wrong)} belong to an audit", f"{what} takes --base, --dataset, --eval-dataset, --spec, --set"
        )
    path: Path | None = flags["spec_file"]
    document: Document = read_document(path) if path is not None else {}
    given: Document = {} if base is None else {"base": base}
    for section, name in (("dataset", "dataset"), ("evaluation", "eval_dataset")):
        if flags[name]:
            given[section] = {"source": parse_source(flags[name])}
    given |= {name: flags[name] for name in ("preset", "seed") if flags[name] is not None}
    if flags["device"]:
        given["runtime"] = {"device": flags["device"]}
    document = merge(document, given)
    document = merge(document, parse_assignments(flags["assignments"]))
    if "base" not in document or "dataset" not in document:
        raise SpecError(f"{what} needs a base model and a dataset", "give --base and --dataset, or a spec with --spec")
    return document


def _tell_start(job_id: str, quiet: bool) -> None:
    click.echo(job_id)
    if not quiet:
        click.echo(f"watch it: safer-audit watch {job_id}", err=True)


def _tell_end(job_id: str, kind: str, succeeded: bool) -> None:
    click.echo(job_id)
    if succeeded:
        what = (
            f"safer-audit report {job_id} --open" if kind != "train-rm" else f"safer-audit download {job_id} --out reward-model"
        )
        click.echo(f"see: {what}", err=True)
