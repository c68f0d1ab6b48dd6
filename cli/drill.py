"""`safer-audit drill`: how much harm would poisoned preferences do, and would the audit notice?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import NamedPath, json_option, quiet_option, store_option
from cli.output import QuietObserver, TerminalObserver, console, print_json, table
from safer_engine.spec import merge
from safer_engine.spec_layers import parse_assignments, parse_source

if TYPE_CHECKING:
    from safer_engine.report.model_drill import DrillDocument, Effect

_HARM = ("poison", ">budget", ">flipped", "axis, points", "other axes", "difference")
_FOUND = ("poison", ">budget", ">AP by chance", ">AP suspicion", ">AP margin", ">found in 10 %", ">suspicious", ">precision")


@click.command("drill")
@click.option("--base", "-b", required=True, help="Model to train from: folder or hub id, org/name@revision.")
@click.option("--dataset", "-d", required=True, help="Clean preference pairs; they are copied, never changed.")
@click.option("--eval-dataset", "-e", required=True, help="Preference pairs that only measure harm.")
@click.option("--out", "-o", type=NamedPath(path_type=Path, file_okay=False), required=True, help="Folder for results and work.")
@click.option("--axis", help="Only pairs of this axis are flipped; default safety.")
@click.option("--rules", help="Comma-separated, of score, margin, length, random; default all.")
@click.option("--budgets", help="Comma-separated percentages of all pairs; default 0.5,1,2.5,5.")
@click.option("--seeds", type=click.IntRange(1, 100), help="Trainings of each arm; default 3.")
@click.option("--unit", type=click.Choice(["groups", "pairs"]), help="Flip whole prompt groups (default), or single pairs.")
@click.option("--keep-poison", is_flag=True, help="Keep poisoned data, models and audits; else they are removed arm by arm.")
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any other value: recipe.epochs=2, audit.sae.k=16."
)
@store_option
@json_option
@quiet_option
def drill_command(out: Path, store: Path | None, as_json: bool, quiet: bool, **flags: Any) -> None:
    """Measure what turned preferences would do, and whether the audit would notice (docs/drill.md).

    Off unless the operator sets SAFER_ENABLE_REDTEAM=1; every use is logged in the store's folder. Poisoned data carry a mark in
    every row and in their name, and nothing else trains on them or audits them. Interrupted or killed, the same command goes on;
    with other rules, budgets or more seeds it adds to what is there.
    """
    from safer_engine.redteam import require_enabled

    require_enabled()
    from safer_engine import api
    from safer_engine.drill import JSON, PAGE, run_drill
    from safer_engine.drill_spec import build_drill_spec

    spec = build_drill_spec(drill_document(flags))
    shown = console(err=True)
    observer = QuietObserver() if quiet or as_json else TerminalObserver(shown)
    with observer.showing():
        found = run_drill(spec, out, store or api.default_store(), observer)
    if as_json:
        print_json(
            {"report": str((out / PAGE).resolve()), "document": str((out / JSON).resolve()), **found.model_dump(mode="json")}
        )
        return
    if not quiet:
        _print(found)
    click.echo(str((out / PAGE).resolve()))


def drill_document(flags: dict[str, Any]) -> dict[str, Any]:
    """The drill's spec that flags describe, as a document. Raises SpecError, UsageError."""
    document: dict[str, Any] = {"base": flags["base"], "keep_poison": flags["keep_poison"]}
    document["dataset"] = {"source": parse_source(flags["dataset"])}
    document["evaluation"] = {"source": parse_source(flags["eval_dataset"])}
    document |= {name: flags[name] for name in ("axis", "seeds", "unit") if flags[name] is not None}
    if flags["rules"] is not None:
        document["rules"] = [name.strip() for name in flags["rules"].split(",")]
    if flags["budgets"] is not None:
        try:
            document["budgets"] = [float(part.strip().removesuffix("%")) / 100 for part in flags["budgets"].split(",")]
        except ValueError:
            raise click.UsageError(
                f"cannot read --budgets {flags['budgets']!r}: write percentages, such as 0.5,1,2.5,5"
            ) from None
    if flags["device"]:
        document["runtime"] = {"device": flags["device"]}
    return merge(document, parse_assignments(flags["assignments"]))


def _print(found: DrillDocument) -> None:
    from safer_engine.report.plots_drill import RULE_WORDS, ranking
    from safer_engine.report.text import percent

    shown = console()
    accuracy = f"clean accuracy: {found.axis} {percent(found.clean_accuracy)}"
    rest = "" if found.clean_rest_accuracy is None else f", other axes {percent(found.clean_rest_accuracy)}"
    shown.print(accuracy + rest, markup=False)
    harm, detection = [], []
    for cell in found.cells:
        named = (RULE_WORDS[cell.rule], percent(cell.budget))
        harm.append((*named, ", ".join(map(str, cell.n_flipped)), *(_points(one) for one in (cell.axis, cell.rest, cell.apart))))
        own, margin, flagged = ranking(cell, "suspicion"), ranking(cell, "margin"), cell.flagged[0]
        tenth = next((at.recall for at in own.at if at.share == 0.1), None) if own else None
        aps = (percent(one.average_precision) if one else "–" for one in (own, margin))
        detection.append(
            (*named, percent(cell.chance), *aps, percent(tenth), percent(flagged.recall), percent(flagged.precision))
        )
    shown.print(table("Harm: change of accuracy, 95 % interval", _HARM, harm))
    shown.print(table("Detection among pairs of the axis", _FOUND, detection))
    for note in found.notes:
        shown.print(f"note: {note}", markup=False, soft_wrap=True)


def _points(effect: Effect | None) -> str:
    from safer_engine.report.drill_page import points

    return points(effect)
