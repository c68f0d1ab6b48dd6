"""`safer-audit export`: an audit in the forms that others read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from cli.gate_sources import is_path
from cli.options import NamedPath
from cli.profile import connect

if TYPE_CHECKING:
    from safer_engine.exports.finished_audit import FinishedAudit

TARGETS = ("evidence", "hf-card", "mlflow", "label-studio")
_FILES = (
    "report.json", "report.html", "report.md", "evaluation.jsonl", "edits.jsonl", "features.parquet", "pair_scores.parquet",
)  # fmt: skip


@click.command("export")
@click.argument("audit", metavar="AUDIT")
@click.option("--to", "target", type=click.Choice(TARGETS), required=True, help="The form to write.")
@click.option("--out", "-o", type=NamedPath(path_type=Path), default=Path(), help="Folder to write to; default: this one.")
@click.option("--card", type=NamedPath(path_type=Path), help="hf-card: the README.md to put the section into; default a new one.")
@click.option("--tracking-uri", help="mlflow: the tracking server; default MLFLOW_TRACKING_URI.")
@click.option("--experiment", default="safer-audit", show_default=True, help="mlflow: made where there is none.")
@click.option("--run-name", help="mlflow: default: of model and dataset.")
@click.option("--dataset", "-d", help="label-studio: the audited dataset; default: where the audit found it.")
@click.option("--actions", default="review,drop,flip", show_default=True, help="label-studio: recommendations to be looked at.")
@click.option("--most", type=click.IntRange(1), help="label-studio: only so many, the most doubtful ones.")
def export_command(audit: str, target: str, out: Path, **given: Any) -> None:
    """Write AUDIT in a form that others read. AUDIT is a finished audit's folder or report.json, or a job's id.

    evidence: evidence.json and evidence.md, to be cited. hf-card: a section and metadata of a Hugging Face model card. mlflow: a
    run with figures and files on a tracking server. label-studio: review tasks with the dataset's texts, and their labeling
    configuration; `safer-audit decisions` brings the answers back.
    """
    with _audit(audit) as path:
        {"evidence": _evidence, "hf-card": _card, "mlflow": _mlflow, "label-studio": _tasks}[target](path, out, given)


@click.command("decisions")
@click.argument("export", type=NamedPath(path_type=Path, exists=True), metavar="EXPORT")
@click.option("--edits", "-e", type=NamedPath(path_type=Path, exists=True), required=True, help="edits.jsonl of the audit.")
@click.option("--out", "-o", type=NamedPath(path_type=Path), default=Path("decisions.jsonl"), help="Default decisions.jsonl.")
def decisions_command(export: Path, edits: Path, out: Path) -> None:
    """Decisions from EXPORT, what Label Studio exported of an audit's review tasks (JSON or JSON-MIN).

    The file is for `--set suspicion.decisions=decisions.jsonl`: it checks and recalibrates the probabilities. Rows that nobody
    could tell, or on which reviewers disagree, are left open.
    """
    from safer_engine.exports.label_studio import decisions_back

    found = decisions_back(export, edits)
    lines = (one.model_dump_json() for one in found.decisions)
    _write(out, "".join(f"{line}\n" for line in lines))
    wrong = sum(one.wrong is True for one in found.decisions)
    right = len(found.decisions) - wrong - found.open
    opened = f"{found.open} left open ({found.disagreed} by disagreement)"
    click.echo(
        f"{len(found.decisions)} rows: {wrong} labels wrong, {right} right, {opened}; {found.skipped} without an answer", err=True
    )
    click.echo(str(out.resolve()))


@contextmanager
def _audit(given: str) -> Iterator[Path]:
    """The audit's files; those of a job are fetched into a folder that is removed at the end."""
    if is_path(given):
        yield Path(given).expanduser()
        return
    from cli.transfers import fetch, into

    with TemporaryDirectory(prefix="safer-audit-") as folder, connect() as client:
        wanted = [artifact for artifact in client.artifacts(given) if artifact.name in _FILES]
        fetch(client, given, into(Path(folder), wanted), None)
        yield Path(folder)


def _read(path: Path) -> FinishedAudit:
    from safer_engine.exports.finished_audit import finished_audit

    return finished_audit(path, "AUDIT")


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all; one that is there keeps its mode, and a link to it stays a link."""
    from safer_engine.publishing import publishing

    target = path.resolve()
    mode = target.stat().st_mode & 0o777 if target.exists() else None
    with publishing(target) as staging:
        staging.write_text(text, encoding="utf-8", newline="")
        if mode is not None:
            staging.chmod(mode)


def _write_all(out: Path, texts: dict[str, str]) -> None:
    from safer_engine.publishing import require_writable

    require_writable(out, "--out")
    for name, text in texts.items():
        _write(out / name, text)
        click.echo(str((out / name).resolve()))


def _evidence(path: Path, out: Path, given: dict[str, Any]) -> None:
    from safer_engine.exports.evidence import evidence, evidence_markdown, evidence_text

    document = evidence(path, "AUDIT")
    _write_all(out, {"evidence.json": evidence_text(document), "evidence.md": evidence_markdown(document)})


def _card(path: Path, out: Path, given: dict[str, Any]) -> None:
    from safer_engine.errors import InputRefused
    from safer_engine.exports.model_card import MAX_CARD, card

    file: Path | None = given["card"]
    if file is None:
        _write_all(out, {"model-card.md": card(_read(path), None)})
        return
    try:
        with file.open("rb") as handle:
            raw = handle.read(MAX_CARD + 1)
        text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputRefused(f"cannot read --card {file}: {error}", "name a model card, a README.md in UTF-8") from None
    if len(raw) > MAX_CARD:
        raise InputRefused(f"--card {file} has more than {MAX_CARD:,} bytes", "name a model card")
    _write(file, card(_read(path), text))
    click.echo(str(file.resolve()))


def _mlflow(path: Path, out: Path, given: dict[str, Any]) -> None:
    from safer_engine.exports.mlflow_run import Tracking, log_audit

    found = log_audit(_read(path), Tracking.at(given["tracking_uri"]), given["experiment"], given["run_name"])
    if not found.made:
        click.echo("the audit is there already: nothing was changed", err=True)
    click.echo(found.url)


def _tasks(path: Path, out: Path, given: dict[str, Any]) -> None:
    from pydantic import ValidationError

    from safer_engine.errors import InputRefused, SpecError
    from safer_engine.exports.label_studio import CONFIG, review_tasks
    from safer_engine.science.edits import ACTIONS
    from safer_engine.spec import DatasetSpec

    audit = _read(path)
    actions = frozenset(part.strip() for part in given["actions"].split(",") if part.strip())
    if unknown := actions - set(ACTIONS):
        raise SpecError(f"--actions: {sorted(unknown)[0]!r} is no action", f"give some of {', '.join(ACTIONS)}")
    dataset = dict(audit.report.spec.get("dataset") or {})
    if given["dataset"] is not None:
        from safer_engine.spec_layers import parse_source

        dataset["source"] = parse_source(given["dataset"])
    try:
        spec = DatasetSpec.model_validate(dataset)
    except ValidationError:
        raise InputRefused(
            "the report does not say which dataset was audited", "give a report.json as the audit wrote it, or --dataset"
        ) from None
    found = review_tasks(audit.beside("edits.jsonl", "AUDIT"), spec, actions, given["most"])
    tasks = json.dumps(found.tasks, ensure_ascii=False, indent=1) + "\n"
    _write_all(out, {"label-studio-tasks.json": tasks, "label-studio-config.xml": CONFIG})
    aside = f"; {found.several} rows of several pairs are left out" if found.several else ""
    click.echo(f"{len(found.tasks)} tasks, with the texts of the dataset{aside}", err=True)
