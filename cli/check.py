"""`safer-audit check`: the preflight alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import audit_options, json_option, store_option
from cli.output import console, print_json, table
from safer_engine.events import NullObserver
from safer_engine.spec_layers import BuiltSpec

if TYPE_CHECKING:
    from safer_engine.artifacts import PairSet
    from safer_engine.pipeline import AuditRequest
    from safer_engine.preflight import Preflight

_SHOWN_CHARACTERS = 1200
_INNER = ("tuple_blocks", "rewired_after", "head_pad_id", "pad_id", "blocks_name", "head_name", "head_source", "weights")


@click.command("check")
@audit_options
@store_option
@json_option
def check_command(built: BuiltSpec, store: Path | None, as_json: bool) -> None:
    """Preflight alone: what would be refused, dropped or truncated; one rendered pair with its response tokens marked.

    Exits with 2, and says why, where `run` would refuse. What it reads is kept in the store for `run`.
    """
    from safer_engine import api
    from safer_engine.artifacts import PairSet, view
    from safer_engine.pipeline import STAGES, run_stage
    from safer_engine.planning import estimate
    from safer_engine.preflight import preflight
    from safer_engine.publishing import require_writable
    from safer_engine.redteam import log_forced
    from safer_engine.refusals import refuse_early
    from safer_engine.store import LocalArtifactStore

    request = api.prepare(built.spec)
    kept = LocalArtifactStore(store or api.default_store())
    require_writable(kept.root, "the artifact store's folder")
    log_forced(kept.root, "check", built.spec)
    refuse_early(request, kept)
    request = dataclasses.replace(request, planned=estimate(request, kept).planned)
    pairs = view(PairSet, run_stage(STAGES[0], request, kept, {}, NullObserver()))
    assert isinstance(pairs, PairSet)
    found = preflight(request, pairs)
    said = [f"{text}, although the preset is {built.spec.preset}: the file wins over it" for text in built.contradictions]
    found = dataclasses.replace(found, warnings=(*found.warnings, *said))
    if as_json:
        health = {**pairs.health, "evaluation": found.evaluation}
        facts = {"health": health, "warnings": found.warnings, "model": found.model, "invariance": found.invariance}
        print_json({**facts, "example": dataclasses.asdict(found.example)})
        return
    _print(request, pairs, found)


def _print(request: AuditRequest, pairs: PairSet, found: Preflight) -> None:
    shown = console()
    shown.print(f"model {request.sources.model.origin}", markup=False)
    shown.print(table("Reward model", ("what", "value"), _friendly(found.model)))
    _print_health("dataset", pairs.health["dataset"])
    if found.evaluation is not None:
        _print_health("evaluation", found.evaluation)
    shown.print(table("Batching and padding", ("what", "value"), _friendly(found.invariance)))
    example = found.example
    shown.print(
        f"Line {example.row} as the model reads it ({example.layout} rows, {example.template} template); "
        "response between ⟦ ⟧, · between its tokens",
        markup=False,
    )
    for name, side in (("chosen", example.chosen), ("rejected", example.rejected)):
        shown.print(f"\n{name}, {side.response_tokens} of {side.tokens} tokens are the response:", markup=False)
        shown.print(_readable(side.marked), markup=False)
    for warning in found.warnings:
        shown.print(f"warning: {warning}", markup=False, soft_wrap=True)
    shown.print("nothing is refused: `safer-audit run` with the same flags will go ahead", markup=False)


def _print_health(name: str, health: dict[str, Any]) -> None:
    dropped = health.get("dropped", {})
    rows = [("read", health["n_in"]), ("kept", health["n_kept"])]
    rows += [(f"dropped: {reason.replace('_', ' ')}", count) for reason, count in dropped.items()]
    counted = {k: v for k, v in health.items() if isinstance(v, (int, float)) and k not in ("n_in", "n_kept")}
    rows += [(key.replace("_", " "), value) for key, value in counted.items()]
    console().print(table(f"{name.capitalize()}", ("pairs", ">count"), rows))
    for line in health.get("examples", ()):
        console().print(f"  {_readable(str(line))}", markup=False)


def _friendly(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows for a person: what only the program needs is left out, and numbers are rounded."""
    shown = [(key, value) for key, value in facts.items() if key not in _INNER and value is not None]
    return [(key.replace("_", " "), f"{value:.3g}" if isinstance(value, float) else str(value)) for key, value in shown]


def _readable(text: str) -> str:
    """The text with control characters made visible, cut in the middle where it is long."""
    visible = "".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in text)
    half = _SHOWN_CHARACTERS // 2
    return visible if len(visible) <= _SHOWN_CHARACTERS else f"{visible[:half]} … {visible[-half:]}"
