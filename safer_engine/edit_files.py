"""Apply recommended edits to a dataset (a file, or a folder of files), and undo them.

The edited dataset keeps the format and the layout of the original. Beside it lie the rows that were removed or changed, as they
were, and a manifest from which `undo_edits` restores the original: byte for byte for text files (their uncompressed content),
row by row with the same schema for tables.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from safer_engine.edit_lines import EditLine, read_edit_lines
from safer_engine.edit_manifest import (
    Change,
    EditManifest,
    Kind,
    digest_path,
    discard,
    manifest_path,
    publishing,
    read_manifest,
    removed_path,
)
from safer_engine.edit_parts import Plan, check_untouched, restore, write
from safer_engine.edit_tables import Places
from safer_engine.errors import DatasetRefused, InputRefused, SpecError
from safer_engine.science.edits import Action, EditRules, recommend
from safer_engine.spec import DatasetSpec, LocalSource
from safer_engine.store import digest_file

if TYPE_CHECKING:
    from safer_engine.pair_tables import Survey
    from safer_engine.sources.resolved import ResolvedDataset

Applied = Literal["drop", "flip"]
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
        force: replace what is at `out`: a file, or a folder that an earlier apply wrote and nobody touched.
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
        removed: where the changed rows lie as they were; None after undo, or where nothing was to be done.
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
    surveyed = require_same_rows(lines, resolved, request.dataset)
    actions = _actions(lines, request, {entry.row for entry in surveyed.entries if entry.part})
    changes = [
        Change(row=row, pair_id=line.pair_id, content_digest=line.content_digest, action=wanted)
        for row, (line, action) in enumerate(zip(lines, actions, strict=True))
        for wanted in request.actions & {action}
    ]
    if all(action == "drop" for action in actions) and "drop" in request.actions:
        raise InputRefused("every row would be dropped", "look at the actions in edits.jsonl")
    removed = removed_path(request.out, kind)
    plan = Plan(kind, changes, len(lines), surveyed.layout, _split(request.dataset))
    with ExitStack() as publications:
        edited, noted = (publications.enter_context(publishing(at)) for at in (request.out, manifest_path(request.out)))
        kept = publications.enter_context(publishing(removed)) if changes else removed
        manifest = EditManifest(
            dataset=source.name,
            kind=kind,
            removed=removed.name if changes else None,
            edits_digest=digest_file(request.edits),
            actions=sorted(request.actions),
            budget=request.budget,
            n_rows=len(lines),
            changes=changes,
            record=write(Places(source, edited, kept), plan),
            out_digest=_folder_digest(edited),
            removed_digest=_folder_digest(kept) if changes else None,
        )
        noted.write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    if not changes:
        discard(removed)  # of an earlier apply, which --force replaces
    done = Counter(change.action for change in changes)
    left: Counter[str] = Counter(action for action in actions if action != "keep" and action not in request.actions)
    return EditResult(request.out, len(lines), done["drop"], done["flip"], dict(left), removed if changes else None)


def _folder_digest(path: Path) -> str | None:
    return digest_path(path) if path.is_dir() else None


def undo_edits(out: Path) -> EditResult:
    """Restore the original at `out`, and remove the manifest and the removed rows.

    Raises:
        InputRefused: there is no manifest, or `out` or the removed rows were changed since.
        ArtifactError: the original does not come out.
    """
    out = out.expanduser()
    manifest = read_manifest(out)
    removed = out if manifest.removed is None else out.with_name(manifest.removed)
    if not out.exists():
        raise InputRefused(f"there is nothing at {out} to restore", "put the edited dataset back, or go back to the original")
    if manifest.removed is None:
        check_untouched(out, None, manifest)
    elif manifest.restored_digest is None or digest_path(out) != manifest.restored_digest:
        check_untouched(out, removed, manifest)
        with publishing(out) as restored:
            restore(Places(out, restored, removed), manifest)
            final = manifest.model_copy(update={"restored_digest": digest_path(restored)})
            with publishing(manifest_path(out)) as noted:  # so that an undo that is broken off here can be finished
                noted.write_text(final.model_dump_json(indent=1), encoding="utf-8")
    if manifest.removed is not None:
        discard(removed)
    discard(manifest_path(out))
    done = Counter(change.action for change in manifest.changes)
    return EditResult(out, manifest.n_rows, done["drop"], done["flip"], {}, None)


def _local(spec: DatasetSpec) -> Path:
    if not isinstance(spec.source, LocalSource):
        raise DatasetRefused("edits are applied to local files", "save the dataset to a file or with save_to_disk first")
    return Path(spec.source.path).expanduser()


def _split(spec: DatasetSpec) -> str | None:
    return spec.source.split if isinstance(spec.source, LocalSource) else None


def _resolve(spec: DatasetSpec) -> ResolvedDataset:
    from safer_engine.sources.datasets import resolve_dataset

    return resolve_dataset(spec)


def _kind(path: Path) -> Kind:
    from safer_engine.sources.local_files import kind_of

    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return "saved"
        return "folder"
    if not path.is_file():
        raise DatasetRefused(f"there is no file or folder {path}", "give the dataset that was audited")
    found = _KINDS.get(kind_of(path) or "")
    if found is None:
        raise DatasetRefused(f"{path} is not a kind of file that can be edited", "give a .jsonl, .json, .csv or .parquet file")
    return found


def _check_out(request: ApplyRequest, source: Path, kind: Kind) -> None:
    from safer_engine.sources.local_files import kind_of

    out, original = request.out, source.resolve()
    if out.resolve() == original or original in out.resolve().parents or out.resolve() in original.parents:
        raise InputRefused("the edited dataset would replace the original", "give another --out")
    if kind in ("saved", "folder"):
        if kind_of(out) is not None:
            raise InputRefused(f"{out.name} is the name of a file, and the dataset is a folder", "name a folder")
    elif kind_of(out) != kind:
        raise InputRefused(f"{out.name} is not a name for a {kind} file", f"the format is kept: name it like {source.name}")
    taken = next((path for path in (out, manifest_path(out), removed_path(out, kind)) if path.exists()), None)
    if taken is not None and not request.force:
        raise InputRefused(f"{taken} is already there", "give another --out, undo it first, or --force to replace it")
    if out.is_dir() or removed_path(out, kind).exists():
        _check_replaceable(out, removed_path(out, kind))


def _check_replaceable(out: Path, removed: Path) -> None:
    """See that what --force would replace besides a file at `out` is what an earlier apply wrote, whole and untouched."""
    hint = "give another --out, or move it away yourself"
    if not manifest_path(out).is_file():
        raise InputRefused(f"apply did not write {out if out.is_dir() else removed}", hint)
    manifest = read_manifest(out)
    for folder, written in ((out, manifest.out_digest), (removed, manifest.removed_digest)):
        if folder.is_dir() and (written is None or digest_path(folder) != written):
            raise InputRefused(f"{folder} holds files that apply did not write, or that were changed since", hint)


def require_same_rows(lines: list[EditLine], resolved: ResolvedDataset, spec: DatasetSpec) -> Survey:
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
    rules = EditRules(budget=request.budget, allow_flip=flips)
    return recommend([line.candidate(several=row in several) for row, line in enumerate(lines)], rules)
