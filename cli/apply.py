"""`safer-audit apply`: carry out recommended edits on a dataset, or undo them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import NamedPath
from safer_engine.errors import SpecError

if TYPE_CHECKING:
    from safer_engine.edit_files import EditResult
    from safer_engine.spec import LocalSource

_DATASET_OPTIONS = (
    click.option("--split", help="Split, where the dataset folder holds several (or folder#split)."),
    click.option("--format", "layout", default="auto", show_default=True, help="Row layout the dataset was audited with."),
    click.option("--label", type=click.Choice(["safer", "better"]), default="safer", help="PKU-SafeRLHF rows: which preference."),
    click.option("--column", "columns", multiple=True, metavar="OURS=THEIRS", help="Column map the dataset was audited with."),
    click.option(
        "--winner", "winners", multiple=True, metavar="VALUE=a|b|tie", help="Meanings of winner values it was audited with."
    ),
)


def _dataset_options(function: Any) -> Any:
    for option in reversed(_DATASET_OPTIONS):
        function = option(function)
    return function


@click.command("apply")
@click.option("--edits", type=click.Path(path_type=Path), help="The edits.jsonl of an audit.")
@click.option("--dataset", "-d", help="The dataset that was audited: file, folder or folder#split.")
@click.option(
    "--out", "-o", type=NamedPath(path_type=Path), required=True, help="The edited dataset; with --undo: what to restore."
)
@click.option("--action", "actions", default="drop", show_default=True, help="What to carry out: drop, flip or drop,flip.")
@click.option("--budget", help="Cut each axis anew at this share, e.g. 4% or 0.04, instead of taking the recommended actions.")
@_dataset_options
@click.option("--undo", is_flag=True, help="Restore the original at --out.")
@click.option("--force", is_flag=True, help="Replace what is at --out: a file, or a folder that apply wrote.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def apply_command(undo: bool, as_json: bool, **given: Any) -> None:
    """Apply the recommended edits to a dataset, or undo them.

    The edited dataset keeps the original's format. What was removed lies beside it, with a manifest (OUT.safer-edits.json) from
    which --undo restores the original. Rows marked review are for a person: set their action in edits.jsonl to carry it out.
    """
    from safer_engine.edit_files import undo_edits

    if undo:
        if given["edits"] or given["dataset"]:
            raise SpecError("--undo takes --out alone", "leave --edits and --dataset out: the manifest beside --out says it all")
        _report(undo_edits(given["out"]), as_json, undone=True)
        return
    _report(_apply(given), as_json, undone=False)


def _apply(given: dict[str, Any]) -> EditResult:
    from pydantic import ValidationError

    from safer_engine.edit_files import ApplyRequest, apply_edits
    from safer_engine.spec import DatasetSpec

    for name in ("edits", "dataset"):
        if given[name] is None:
            raise SpecError(f"--{name} is missing", "apply needs --edits, --dataset and --out")
    try:
        dataset = DatasetSpec(
            source=_source(given["dataset"], given["split"]),
            format=given["layout"],
            label=given["label"],
            columns=_named(given["columns"], "--column", "OURS=THEIRS", "chosen=best"),
            winners=_named(given["winners"], "--winner", "VALUE=a|b|tie", "1=a"),
        )
    except ValidationError as error:
        wrong = error.errors()[0]
        where = (
            f"--format {given['layout']}" if wrong["loc"][0] == "format" else f"--winner {'='.join(map(str, wrong['loc'][1:]))}"
        )
        raise SpecError(f"{where}: {wrong['msg']}") from error
    actions = frozenset(action.strip() for action in given["actions"].split(",") if action.strip())
    if unknown := sorted(actions - {"drop", "flip"}):
        raise SpecError(f"--action {', '.join(unknown)} cannot be applied", "give drop, flip or drop,flip")
    budget = None if given["budget"] is None else parse_share(given["budget"])
    return apply_edits(ApplyRequest(given["edits"], dataset, given["out"], actions, budget, given["force"]))


def _source(named: str, split: str | None) -> LocalSource:
    """A file, a folder or `folder#split`, with the split of `--split`."""
    from safer_engine.spec import LocalSource

    folder, _, part = named.rpartition("#")
    if part and Path(folder).expanduser().is_dir() and not Path(named).expanduser().exists():
        if split not in (None, part):
            raise SpecError(f"--dataset names the split {part!r} and --split {split!r}", "name one")
        return LocalSource(path=folder, split=part)
    return LocalSource(path=named, split=split)


def parse_share(text: str) -> float:
    """`4%` or `0.04` as 0.04. Raises SpecError for anything else."""
    try:
        return float(text.strip().removesuffix("%").strip()) / (100.0 if text.strip().endswith("%") else 1.0)
    except ValueError:
        raise SpecError(f"--budget {text!r} is not a share", "give for example 4% or 0.04") from None


def _named(pairs: tuple[str, ...], option: str, form: str, example: str) -> dict[str, Any]:
    named = {}
    for pair in pairs:
        name, found, value = pair.partition("=")
        if not found or not name:
            raise SpecError(f"{option} {pair!r} is not {form}", f"for example {option} {example}")
        named[name.strip()] = value.strip()
    return named


def _report(result: EditResult, as_json: bool, *, undone: bool) -> None:
    if as_json:
        from cli.output import print_json

        shown = {key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(result).items()}
        print_json({"undone": undone, **shown})
        return
    if undone and not result.dropped + result.flipped:
        click.echo(f"{result.out}: nothing had been changed, so there is nothing to undo; {result.n_rows:,} rows")
        return
    if undone:
        click.echo(
            f"{result.out}: restored, {result.n_rows:,} rows ({result.dropped:,} brought back, {result.flipped:,} flipped back)"
        )
        return
    kept = result.n_rows - result.dropped
    if result.removed is None:
        click.echo(f"{result.out}: nothing is to be done, so this is a copy of the dataset, {result.n_rows:,} rows")
    else:
        click.echo(f"{result.out}: {kept:,} of {result.n_rows:,} rows, {result.dropped:,} dropped, {result.flipped:,} flipped")
    for action, count in sorted(result.left.items()):
        how = "for a person to decide" if action == "review" else "not applied; give --action drop,flip"
        rows = "1 row marked {} is left as it is" if count == 1 else f"{count:,} rows marked {{}} are left as they are"
        click.echo(f"  {rows.format(action)}: {how}")
    if result.removed is None:
        return
    click.echo(f"  as they were: {result.removed}")
    click.echo(f"  undo: safer-audit apply --undo --out {result.out}")
