"""`safer-audit plan`: what `run` would compute and take."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.options import audit_options, json_option, store_option
from cli.output import console, duration, print_json, size, table
from safer_engine.spec_layers import BuiltSpec

if TYPE_CHECKING:
    from safer_engine.planning import AuditEstimate


@click.command("plan")
@audit_options
@store_option
@json_option
def plan_command(built: BuiltSpec, store: Path | None, as_json: bool) -> None:
    """What `run` with the same flags would compute, and what it would take. Computes nothing.

    Exits with 2 where `run` would refuse, as far as that can be told without loading the model; `check` tells it all.
    """
    from safer_engine import api
    from safer_engine.label_plan import label_requests
    from safer_engine.planning import estimate, model_size
    from safer_engine.refusals import refuse_early
    from safer_engine.store import LocalArtifactStore

    request = api.prepare(built.spec)
    kept = LocalArtifactStore(store or api.default_store())
    refuse_early(request, kept)
    expected = estimate(request, kept)
    if as_json:
        stages = [dataclasses.asdict(stage) for stage in expected.stages.values()]
        print_json({"workload": dataclasses.asdict(expected.workload), "stages": stages})
        return
    _print(expected)
    size_known = model_size(request.sources.model.path)
    requests = label_requests(built.spec, 0 if size_known is None else size_known.d_in)
    if requests is not None and expected.stages["labels"].state == "compute":
        parts = f"{requests.labels:,} labels, {requests.detection:,} checks, {requests.repeats:,} second readings"
        cost = f"; about {requests.cost:.2f} at the prices given" if requests.cost else ""
        console().print(f"labels: up to {requests.total:,} requests ({parts}){cost}", markup=False)


def _print(expected: AuditEstimate) -> None:
    shown, load, estimates = console(), expected.workload, list(expected.stages.values())
    about = "" if load.exact else " (extrapolated from the first rows)"
    positions = f"{'' if load.positions_exact else 'about '}{load.positions:,} positions"
    shown.print(
        f"{load.n_pairs:,} pairs, {load.n_eval:,} evaluation pairs, {load.tokens:,} tokens, {positions}{about}", markup=False
    )
    on_gpu = any(e.gpu_bytes for e in estimates)
    columns = ["stage", "state", ">time", "rate", ">disk", ">memory"] + ([">GPU memory"] if on_gpu else [])
    rows = []
    for e in estimates:
        computing = e.state == "compute"
        rate = ("measured here" if e.measured else "–" if e.seconds is None else "assumed") if computing else ""
        sizes = [size(e.disk_bytes), size(e.memory_bytes)] if computing else ["–", "–"]
        row = [e.stage, e.state, duration(e.seconds), rate, *sizes]
        rows.append(row + ([size(e.gpu_bytes)] if on_gpu else []))
    total = expected.total
    last = ["total", "", duration(total.seconds), "", size(total.disk_bytes), size(total.peak_memory_bytes)]
    rows.append(last + ([size(total.peak_gpu_bytes)] if on_gpu else []))
    shown.print(table("Plan", columns, rows))
    if any(e.work is None for e in estimates):
        shown.print("–: the model's config.json does not say its width and depth, so this is not known", markup=False)
