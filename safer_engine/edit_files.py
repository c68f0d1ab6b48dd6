"""Apply recommended edits to a dataset file, and undo them.

The edited dataset keeps the format of the original. Beside it lie the rows that were removed or changed, as they were, and a
manifest from which `undo_edits` restores the original: byte for byte for text files (their uncompressed content), row by row
with the same schema for tables.
"""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safer_engine.edit_lines import EditLine, read_edit_lines
from safer_engine.edit_manifest import (
    Change,
    EditManifest,
    TableRecord,
    TextRecord,
    digest_path,
    discard,
    manifest_path,
    publishing,
    read_manifest,
    removed_path,
)
from safer_engine.edit_tables import Places
from safer_engine.errors import DatasetRefused, InputRefused, SpecError
from safer_engine.science.edits import Action, recommend
from safer_engine.spec import DatasetSpec, LocalSource
from safer_engine.store import digest_file

if TYPE_CHECKING:
    from safer_engine.pair_tables import Survey
    from safer_engine.science.pair_formats import Layout
    from safer_engine.sources.resolved import ResolvedDataset

Applied = Literal["drop", "flip"]
Kind = Literal["jsonl", "json", "csv", "parquet", "saved"]
_KINDS: dict[str, Kind] = {"jsonl": "jsonl", "json": "json", "csv": "csv", "parquet": "parquet"}
_CHANGED = "apply edits to the very dataset that was audited, with the same columns, format and label"


@dataclass(frozen=True)
class ApplyRequest:
    """What to apply to what.

    Attributes:
        edits: the edits.jsonl of an audit.
        dataset: the audited dataset: a local file or folder, with the column map, format and label it was audited with.
        out: where the edited dataset goes.
        actions: which recommendations are carried out; the others are left alone.
        budget: cut each axis anew at this share instead of taking the recommended actions.
        force: replace what is at `out`.
    """

    edits: Path
    dataset: DatasetSpec
    out: Path
    actions: frozenset[Applied] = frozenset({"drop"})
    budget: float | None = None
    force: bool = False


@dataclass(frozen=True)
class EditResult:
    """What was done.

    Attributes:
        out: the edited or restored dataset.
        n_rows: rows of the original.
        dropped, flipped: rows removed and swapped (by undo: brought back).
        left: rows that were recommended something that was not carried out, by action.
        removed: where the changed rows lie as they were; None after undo.
    """

    out: Path
    n_rows: int
    dropped: int
    flipped: int
    left: dict[str, int]
    removed: Path | None


def apply_edits(request: ApplyRequest) -> EditResult:
    """Write the edited dataset, what was removed, and the manifest. The original is only read.

    Raises:
        InputRefused: the edits cannot be read, the dataset is not the audited one, a row cannot be flipped, or `out` is taken.
        SpecError: no action, or a budget out of range.
    """
    if not request.actions:
        raise SpecError("no action to apply", "give drop, or drop,flip")
    source = _local(request.dataset)
    kind = _kind(source)
    _check_out(request, source, kind)
    lines = read_edit_lines(request.edits)
    resolved = _resolve(request.dataset)
    surveyed = _unchanged(lines, resolved, request.dataset)
    layout = surveyed.layout
    actions = _actions(lines, request, {entry.row for entry in surveyed.entries if entry.part})
    changes = [
        Change(row=row, pair_id=line.pair_id, content_digest=line.content_digest, action=wanted)
        for row, (line, action) in enumerate(zip(lines, actions, strict=True))
        for wanted in request.actions & {action}
    ]
    if all(action == "drop" for action in actions) and "drop" in request.actions:
        raise InputRefused("every row would be dropped", "look at the actions in edits.jsonl")
    removed = removed_path(request.out, kind)
    plan = _Plan(kind, changes, len(lines), layout, request)
    with publishing(request.out) as edited, publishing(manifest_path(request.out)) as noted, publishing(removed) as kept:
        manifest = EditManifest(
            dataset=source.name,
            kind=kind,
            removed=removed.name,
            edits_digest=digest_file(request.edits),
            actions=sorted(request.actions),
            budget=request.budget,
            n_rows=len(lines),
            changes=changes,
            record=_write(Places(source, edited, kept), plan),
        )
        noted.write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    done = Counter(change.action for change in changes)
    left: Counter[str] = Counter(action for action in actions if action != "keep" and action not in request.actions)
    return EditResult(request.out, len(lines), done["drop"], done["flip"], dict(left), removed)


def undo_edits(out: Path) -> EditResult:
    """Restore the original at `out`, and remove the manifest and the removed rows.

    Raises:
        InputRefused: there is no manifest, or `out` or the removed rows were changed since.
        ArtifactError: the original does not come out.
    """
    out = out.expanduser()
    manifest = read_manifest(out)
    removed = out.with_name(manifest.removed)
    if not out.exists():
        raise InputRefused(f"there is nothing at {out} to restore", "put the edited dataset back, or go back to the original")
    if manifest.restored_digest is None or digest_path(out) != manifest.restored_digest:
        _check_untouched(out, removed, manifest)
        with publishing(out) as restored:
            _restore(Places(out, restored, removed), manifest)
            final = manifest.model_copy(update={"restored_digest": digest_path(restored)})
            with publishing(manifest_path(out)) as noted:  # so that an undo that is broken off here can be finished
                noted.write_text(final.model_dump_json(indent=1), encoding="utf-8")
    discard(removed)
    discard(manifest_path(out))
    done = Counter(change.action for change in manifest.changes)
    return EditResult(out, manifest.n_rows, done["drop"], done["flip"], {}, None)


def _local(spec: DatasetSpec) -> Path:
    if not isinstance(spec.source, LocalSource):
        raise DatasetRefused("edits are applied to local files", "save the dataset to a file or with save_to_disk first")
    return Path(spec.source.path).expanduser()


def _resolve(spec: DatasetSpec) -> ResolvedDataset:
    from safer_engine.sources.datasets import resolve_dataset

    return resolve_dataset(spec)


def _kind(path: Path) -> Kind:
    from safer_engine.sources.local_files import kind_of

    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return "saved"
        raise DatasetRefused(f"{path} is a folder of files", "put its rows into one file, audit that, and apply the edits to it")
    if not path.is_file():
        raise DatasetRefused(f"there is no file or folder {path}", "give the dataset that was audited")
    found = _KINDS.get(kind_of(path) or "")
    if found is None:
        raise DatasetRefused(f"{path} is not a kind of file that can be edited", "give a .jsonl, .json, .csv or .parquet file")
    return found


def _check_out(request: ApplyRequest, source: Path, kind: Kind) -> None:
    from safer_engine.sources.local_files import kind_of

    out = request.out
    if out.resolve() == source.resolve() or source.resolve() in out.resolve().parents:
        raise InputRefused("the edited dataset would replace the original", "give another --out")
    if kind != "saved" and kind_of(out) != kind:
        raise InputRefused(f"{out.name} is not a name for a {kind} file", f"the format is kept: name it like {source.name}")
    if not request.force and (out.exists() or manifest_path(out).exists()):
        raise InputRefused(f"{out} is already there", "give another --out, undo it first, or --force to replace it")


def _unchanged(lines: list[EditLine], resolved: ResolvedDataset, spec: DatasetSpec) -> Survey:
    """Check every row against its line, by place, pair id and content digest; returns what was read."""
    from safer_engine.pair_tables import survey
    from safer_engine.science.pairs import row_statuses

    surveyed = survey(resolved, spec, 0)
    rows = row_statuses(surveyed.entries, [entry.reason for entry in surveyed.entries])
    if len(rows) != len(lines):
        raise DatasetRefused(f"the dataset has {len(rows)} rows and the edits have {len(lines)} lines", _CHANGED)
    for row, line in zip(rows, lines, strict=True):
        if (row.pair_id, row.content_digest) != (line.pair_id, line.content_digest):
            raise DatasetRefused(f"row {row.row + 1} is not what the audit read as {line.pair_id}", _CHANGED)
    return surveyed


def _actions(lines: list[EditLine], request: ApplyRequest, several: set[int]) -> list[Action]:
    if request.budget is None:
        return [line.action for line in lines]
    flips = "flip" in request.actions and any(line.action == "flip" for line in lines)
    return recommend([line.candidate(several=row in several) for row, line in enumerate(lines)], request.budget, allow_flip=flips)


@dataclass(frozen=True)
class _Plan:
    kind: Kind
    changes: list[Change]
    n_rows: int
    layout: Layout
    request: ApplyRequest

    def flip(self, row: dict[str, Any]) -> dict[str, Any]:
        from safer_engine.science.flipping import flip_row

        return flip_row(row, self.layout)

    @property
    def split(self) -> str | None:
        source = self.request.dataset.source
        return source.split if isinstance(source, LocalSource) else None


def _write(places: Places, plan: _Plan) -> TextRecord | TableRecord:
    from safer_engine import edit_tables

    if plan.kind in ("jsonl", "json", "csv"):
        return _write_text(places, plan)
    split, row_group = None, None
    if plan.kind == "parquet":
        row_group = edit_tables.edit_parquet(places, plan.changes, plan.flip)
    else:
        split = edit_tables.edit_saved(places, plan.split, plan.changes, plan.flip)
    digests = digest_path(places.target), digest_path(places.removed)
    return TableRecord(output_digest=digests[0], removed_digest=digests[1], split=split, row_group=row_group)


def _write_text(places: Places, plan: _Plan) -> TextRecord:
    from safer_engine import edit_text

    text = edit_text.text_layout(places.source, plan.kind)
    if len(text.spans) != plan.n_rows:
        raise DatasetRefused(
            f"{len(text.spans)} rows were located in {places.source.name}, not {plan.n_rows}", "write it out anew"
        )
    dropped, flipped = ({change.row for change in plan.changes if change.action == action} for action in ("drop", "flip"))
    cuts = edit_text.plan_cuts(text, dropped, flipped)
    edit_text.write_rows(places.source, places.removed, text, [change.row for change in plan.changes])
    zipped = plan.request.out.suffix == ".gz"
    return edit_text.write_edited(places.source, places.target, text, cuts, plan.flip, zipped=zipped)


def _restore(places: Places, manifest: EditManifest) -> None:
    from safer_engine import edit_tables, edit_text

    record = manifest.record
    if isinstance(record, TextRecord):
        edit_text.write_restored(places.source, places.target, record, zipped=places.source.suffix == ".gz")
    elif manifest.kind == "parquet":
        edit_tables.restore_parquet(places, record.row_group, manifest.changes, manifest.n_rows)
    else:
        edit_tables.restore_saved(places, record.split, manifest.changes, manifest.n_rows)


def _check_untouched(out: Path, removed: Path, manifest: EditManifest) -> None:
    from safer_engine.edit_text import content_digest

    record = manifest.record
    try:
        if isinstance(record, TextRecord):
            same = {out: content_digest(out) == record.output_digest}
        else:
            same = {out: digest_path(out) == record.output_digest, removed: digest_path(removed) == record.removed_digest}
    except (OSError, EOFError, zlib.error) as error:
        raise InputRefused(f"cannot read what was edited: {error}", "put the files back as apply wrote them") from error
    for path, untouched in same.items():
        if not untouched:
            raise InputRefused(
                f"{path} was changed since the edits were applied, so the original cannot be restored from it",
                "put it back as apply wrote it, or go back to the original dataset",
            )
