"""`safer-audit compare`: two reward models, or two audits, on the same pairs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import NamedPath, flag_options, json_option, quiet_option, store_option
from cli.output import console, print_json, table

if TYPE_CHECKING:
    from rich.console import Console

    from safer_engine.comparison.model import ComparisonDocument, FeaturesComparison, PairsComparison

_SHOWN = 8
_SLICES = ("slice", ">pairs", ">A", ">B", ">change", "95 % interval", ">right→wrong", ">wrong→right", ">changed", ">rank corr.")
_LATENTS = ("latent", "about", "safety of", ">fires ×", ">salience A", ">B", "change, 95 % interval", ">effect A", ">B")


@click.command("compare")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@flag_options
@store_option
@click.option("--out", "-o", type=NamedPath(path_type=Path), help="Folder for the comparison; default comparisons/A-B.")
@json_option
@quiet_option
def compare_command(  # noqa: PLR0913, PLR0917 - one parameter per flag
    a: str, b: str, flags: dict[str, Any], store: Path | None, out: Path | None, as_json: bool, quiet: bool
) -> None:
    """What changed from A to B: accuracy with paired intervals, preferences, features of a shared SAE.

    A and B are finished audits: a folder with report.json, a job's id, label:NAME=VALUE. Or, with --dataset and the flags of
    `run`, two reward models: A is audited, then B with A's SAE where they share an architecture.

    Writes comparison.json and comparison.html into --out (of two models also their audits, in its folders a and b). --json
    prints comparison.json (docs/comparison.schema.json). The exit code says nothing of the outcome: that is the gate's.
    """
    from cli.compare_sources import audited, finished, of_models
    from safer_engine import api
    from safer_engine.comparison.build import compare_sides
    from safer_engine.comparison.write import require_ours, write_comparison
    from safer_engine.publishing import require_writable
    from safer_engine.store import LocalArtifactStore

    folder = out or Path("comparisons") / f"{_short(a)}-{_short(b)}"
    models, kept = of_models(flags), LocalArtifactStore(store or api.default_store())
    require_ours(folder)
    require_writable(folder, "--out")
    if models:
        sides = audited((a, b), flags, kept, folder, shows=not (quiet or as_json))
    else:
        sides = finished(a, "A", kept), finished(b, "B", kept)
    found = compare_sides(*sides)
    page = write_comparison(found, folder)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    if not quiet:
        _show(found)
    click.echo(str(page.resolve()))


def _short(name: str) -> str:
    """The last two parts of a name: reports of several audits often lie in folders of one name."""
    parts = [part for part in Path(name).parts[-2:] if part not in ("/", "report.json")]
    return re.sub(r"[^\w.-]+", "-", "-".join(parts).split("@")[0]).strip(".-") or "audit"


def _show(found: ComparisonDocument) -> None:
    from safer_engine.comparison.words import cautions, paragraph

    shown = console()
    for name, pairs in (("Evaluation pairs", found.evaluation), ("Audited pairs", found.audited)):
        if pairs is not None:
            _show_pairs(shown, name, pairs)
    if found.features is not None:
        _show_latents(shown, found.features)
    shown.print(paragraph(found), markup=False)
    for caution in cautions(found):
        shown.print(f"! {caution}", markup=False, style="yellow")


def _show_pairs(shown: Console, name: str, pairs: PairsComparison) -> None:
    from safer_engine.comparison.words import ends, shown_slices, slice_name
    from safer_engine.report.text import percent, signed, visible

    rows = []
    for row in shown_slices(pairs):
        rank = row.rank_correlation
        shares = percent(row.accuracy_a), percent(row.accuracy_b), signed(100 * row.accuracy_change.estimate, 1)
        moved = row.right_to_wrong, row.wrong_to_right, percent(row.changed.estimate)
        cells = (visible(slice_name(row)), row.n, *shares, ends(row.accuracy_change, 100, 1), *moved)
        rows.append((*cells, "–" if rank is None else signed(rank.estimate, 2)))
    shown.print(table(f"{name}: accuracy in per cent, change in points", _SLICES, rows))
    if pairs.changed_pairs:
        cells_of = [
            (visible(p.pair_id), visible(f"{p.axis}: {p.subset}"), signed(p.margin_a), signed(p.margin_b), signed(p.moved, 2))
            for p in pairs.changed_pairs[:_SHOWN]
        ]
        title = f"Preferences changed: {len(cells_of)} of {pairs.n_changed}, largest first"
        shown.print(table(title, ("pair", "slice", ">margin A", ">B", ">scaled change"), cells_of))


def _show_latents(shown: Console, features: FeaturesComparison) -> None:
    from safer_engine.comparison.words import drift_words
    from safer_engine.report.text import number, signed, visible

    rows = []
    for one in features.latents[: max(_SHOWN, features.n_safety_a + features.n_safety_b - features.n_safety_both)]:
        marks = "".join(letter for letter, side in (("A", one.a), ("B", one.b)) if side.safety_feature)
        cells = (one.latent_id, visible(one.name), marks, number(one.firing_ratio, 2))
        effects = signed(one.a.effect, 4), signed(one.b.effect, 4)
        rows.append((*cells, signed(one.a.salience), signed(one.b.salience), drift_words(one.salience_change), *effects))
    shown.print(table("Latents of the shared SAE: safety features, then by change of salience", _LATENTS, rows))
