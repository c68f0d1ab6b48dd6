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
    from safer_engine.planning import Estimate, Workload


@click.command("plan")
@audit_options
@store_option
@json_option
def plan_command(built: BuiltSpec, store: Path | None, as_json: bool) -> None:
    """What `run` with the same flags would compute, and what it would take. Computes nothing."""
    from safer_engine import api
    from safer_engine.planning import estimate, workload
    from safer_engine.store import LocalArtifactStore

    request = api.prepare(built.spec)
    kept = LocalArtifactStore(store or api.default_store())
    load, estimates = workload(request, kept), estimate(request, kept)
    if as_json:
        print_json({"workload": dataclasses.asdict(load), "stages": [dataclasses.asdict(e) for e in estimates.values()]})
        return
    _print(load, list(estimates.values()))


def _print(load: Workload, estimates: list[Estimate]) -> None:
    shown = console()
    about = "" if load.exact else " (extrapolated from the first rows)"
    shown.print(
        f"{load.n_pairs:,} pairs, {load.n_eval:,} evaluation pairs, {load.tokens:,} tokens, {load.positions:,} positions{about}",
        markup=False,
    )
    on_gpu = any(e.gpu_bytes for e in estimates)
    columns = ["stage", "state", ">time", "rate", ">disk", ">memory"] + ([">GPU memory"] if on_gpu else [])
    rows = []
    for e in estimates:
        computing = e.state == "compute"
        rate = ("measured here" if e.measured else "assumed") if computing else ""
        sizes = [size(e.disk_bytes), size(e.memory_bytes)] if computing else ["–", "–"]
        row = [e.stage, e.state, duration(e.seconds), rate, *sizes]
        rows.append(row + ([size(e.gpu_bytes)] if on_gpu else []))
    total = sum(e.seconds or 0.0 for e in estimates)
    rows.append(
        [
            "total",
            "",
            duration(total),
            "",
            size(sum(e.disk_bytes for e in estimates)),
            size(max((e.memory_bytes for e in estimates if e.state == "compute"), default=None)),
        ]
    )
    shown.print(table("Plan", columns, rows))
