"""`safer-audit run`: the whole audit in one process."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import NamedPath, audit_options, json_option, quiet_option, store_option
from cli.output import QuietObserver, TerminalObserver, console, duration, print_json, size, table
from safer_engine.cost import Planned, planned_total
from safer_engine.spec_layers import BuiltSpec

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from safer_engine.api import AuditReport
    from safer_engine.report.model_verification import VerificationReport


_SHOWN = 8
_VERIFIED = ("pairs", ">as given", ">our edits", ">by margin", ">at random", ">change", "95 % interval")
_SHAPES = ("figure", *_VERIFIED[1:-2], ">change, points", "95 % interval")
_SWEPT = ("pairs", ">budget", "edited", *_VERIFIED[2:-2], ">change, points", "95 % interval")
SUMMARY_VERSION = 1
"""Of what --json prints: it changes when a key is renamed, removed, or comes to mean something else."""


@click.command("run")
@audit_options
@store_option
@click.option("--out", "-o", type=NamedPath(path_type=Path), help="Folder for the report; default audits/MODEL-DATASET.")
@json_option
@quiet_option
def run_command(built: BuiltSpec, store: Path | None, out: Path | None, as_json: bool, quiet: bool) -> None:
    """Audit a reward model on a preference dataset and write the report.

    Interrupted or killed, the same command goes on from the last finished unit of work; a second run computes nothing. In --out
    only files that an earlier audit wrote are replaced: one that you changed, such as edits.jsonl, stays or is kept as NAME.bak,
    and a folder that holds a file of yours under such a name is refused.

    --json prints one object: schema_version (1), report (path of report.html), n_candidates, n_safety_features, and the
    sections dataset, reward_model, sae, edits, verification and verdict of report.json, each as it stands there, null included.
    """
    run_audit(built, store, out, as_json=as_json, quiet=quiet)


def run_audit(built: BuiltSpec, store: Path | None, out: Path | None, *, as_json: bool, quiet: bool) -> None:
    """Run an audit and show it: progress, summary, the report's path."""
    from safer_engine import api
    from safer_engine.out_folder import OutFolder
    from safer_engine.planning import estimate
    from safer_engine.redteam import log_forced
    from safer_engine.report.interim import interim_reports
    from safer_engine.store import LocalArtifactStore

    request = api.prepare(built.spec)
    target = out or default_out(built)
    OutFolder(target).check(request.spec)
    kept = LocalArtifactStore(store or api.default_store())
    log_forced(kept.root, click.get_current_context().info_name or "run", built.spec)
    expected = estimate(request, kept)
    shown = console(err=True)
    observer = QuietObserver() if quiet or as_json else TerminalObserver(shown)
    if isinstance(observer, TerminalObserver):
        shown.print(f"audit of {request.sources.model.origin} on {request.sources.dataset.origin}", markup=False)
    for text in built.contradictions:
        observer.note("spec", f"{text}, although the preset is {built.spec.preset}: the file wins over it")
    with observer.showing():
        report = api.run_request(request, kept, target, observer, interim_reports(request, kept, target, observer), expected)
    if as_json:
        print_json(summary(report))
    elif not quiet:
        _print_summary(report, observer)
    if not as_json:
        click.echo(str(report.html.resolve()))


def default_out(built: BuiltSpec) -> Path:
    """audits/MODEL-DATASET, from the last parts of their names."""
    names = [built.spec.model.path, getattr(built.spec.dataset.source, "path", "rows")]
    short = [re.sub(r"[^\w.-]+", "-", Path(name).name.split("@")[0].split(".")[0]) or "input" for name in names]
    return Path("audits") / "-".join(short)


def summary(report: AuditReport) -> dict[str, Any]:
    """What --json prints: where the report is, counts of features, and sections of report.json as they stand there."""
    document = report.document.model_dump(mode="json")
    figures = {name: document[name] for name in ("dataset", "reward_model", "sae", "edits", "verification", "verdict")}
    features = report.document.features or []
    counts = {"n_candidates": len(report.features), "n_safety_features": sum(bool(f.safety_feature) for f in features)}
    return {"schema_version": SUMMARY_VERSION, "report": str(report.html.resolve()), **counts, **figures}


def _print_summary(report: AuditReport, observer: QuietObserver) -> None:
    from safer_engine.report.text import name_of

    shown = console()
    shown.print(table("Stages", ("stage", ">planned", ">took", ">planned memory", ">peak memory"), _stages(report, observer)))
    counts = report.edits["action"].value_counts().to_dict()
    shown.print(table("Edits", ("action", ">rows"), [(name, counts.get(name, 0)) for name in ("drop", "flip", "review", "keep")]))
    if (verified := report.document.verification) is not None:
        print_verification(shown, verified)
    named = [feature for feature in report.document.features or [] if feature.safety_feature][:_SHOWN]
    if not named:
        shown.print("Safety features: none", markup=False)
        return
    cells = [(f.latent_id, f"{f.salience:+.3f}", name_of(f)) for f in named]
    shown.print(table("Safety features", ("latent", ">salience", "about"), cells))


def print_verification(shown: Console, found: VerificationReport) -> None:
    """Accuracy of the arms on each slice of the evaluation pairs, as benchmarks score, and at each budget of a sweep."""
    from safer_engine.report.plots_sweep import sweep_rows, sweep_sentence
    from safer_engine.report.plots_verification import shape_rows

    shown.print(_verified_table(found))
    if found.shapes:
        shown.print(table("As benchmarks score", _SHAPES, shape_rows(found.shapes)))
    if found.sweep is not None:
        shown.print(table(f"How much to edit: {found.sweep.outcome}", _SWEPT, sweep_rows(found.sweep)))
        shown.print(sweep_sentence(found.sweep), markup=False)


def _verified_table(found: VerificationReport) -> Table:
    from safer_engine.report.plots_verification import accuracy_of, scopes
    from safer_engine.report.text import interval, percent, signed

    rows: list[Sequence[str]] = []
    for row in scopes(found):
        arms = [accuracy_of(found, row, arm) for arm in ("as given", "edits", "margin", "random")]
        ours = row.effects[0]
        ends = "–" if ours.lo is None or ours.hi is None else interval(ours.lo, ours.hi)
        rows.append((row.name, *("–" if one is None else percent(one) for one in arms), signed(ours.change, 3), ends))
    return table(f"Retrained: {found.outcome}", _VERIFIED, rows)


def _stages(report: AuditReport, observer: QuietObserver) -> list[Sequence[str]]:
    """How each stage ended, and of those computed now what was planned and what it took."""
    from safer_engine.artifacts import Artifact

    rows: list[Sequence[str]] = []
    stored = [found.stored for found in report.artifacts.values() if isinstance(found, Artifact)]
    manifests = {artifact.manifest.stage: artifact.manifest for artifact in stored}
    computed = {stage: seconds for stage, (outcome, seconds) in observer.outcomes.items() if outcome == "computed"}
    for stage, (outcome, _) in observer.outcomes.items():
        if stage not in computed:
            rows.append((stage, "–", "not computed" if outcome == "absent" else outcome, "–", "–"))
            continue
        planned, cost = manifests[stage].planned or Planned(), manifests[stage].cost
        memory = size(planned.peak_memory_bytes), size(cost.peak_memory_bytes)
        rows.append((stage, duration(planned.seconds), duration(computed[stage]), *memory))
    if computed:
        total = planned_total(manifests[stage].planned or Planned() for stage in computed)
        peak = max((manifests[stage].cost.peak_memory_bytes or 0 for stage in computed), default=0)
        taken = duration(sum(computed.values())), size(total.peak_memory_bytes), size(peak or None)
        rows.append(("total", duration(total.seconds), *taken))
    return rows
