"""From a resolved dataset to the files of a `PairSet`: two passes, neither of which holds the texts.

The survey reads all rows once and decides what is dropped before rendering; writing reads them again, renders batch by
batch, drops what can't be read, and streams Arrow record batches.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safer_engine.errors import DatasetRefused
from safer_engine.science.drops import Drop, SideDropped
from safer_engine.sources.resolved import ResolvedDataset
from safer_engine.spec import DatasetSpec

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from safer_engine.science.messages import Message
    from safer_engine.science.pair_formats import Layout, PreferenceRow
    from safer_engine.science.pairs import Candidate, Entry
    from safer_engine.science.rendering import RenderedSide, Renderer

BATCH_PAIRS = 256
PROMPT_KEY_BYTES = 16
"""Size of a key of `science.pairs.prompt_keys`."""
_MANY_DROPPED = 0.1
_MOST_BAD = 0.5
_EXAMPLES = 3
_ENDS = ("chosen_start", "chosen_end", "rejected_start", "rejected_end")
_STRATA: dict[str, Literal["axis", "subset"]] = {"axis": "axis", "subset": "subset"}


@dataclass(frozen=True)
class Survey:
    """A dataset after its first pass.

    Attributes:
        layout: how its rows are read.
        candidates, entries: one of each per pair, in order.
        details: why the first malformed rows are malformed.
        marked: rows that are marked as poisoned; none, unless that is allowed.
    """

    layout: Layout
    candidates: tuple[Candidate, ...]
    entries: tuple[Entry, ...]
    details: tuple[str, ...]
    marked: int = 0


@dataclass(frozen=True)
class Written:
    """What came of writing a dataset's pairs.

    Attributes:
        reasons: why each entry of the survey was dropped; None for those in the table.
        tokens: tokens of all sides written.
        truncated: sides that were cut.
        details: why the first unrenderable pairs are so.
    """

    reasons: tuple[Drop | None, ...]
    tokens: int
    truncated: int
    details: tuple[str, ...]


@dataclass(frozen=True)
class Usable:
    """A pair that goes into the table, with its sides as the model reads them."""

    entry: Entry
    pair: PreferenceRow
    sides: tuple[RenderedSide, RenderedSide]


def survey(dataset: ResolvedDataset, spec: DatasetSpec, seed: int, training_prompts: frozenset[bytes] = frozenset()) -> Survey:
    """Read all rows once and decide what is dropped before rendering.

    Args:
        seed: of the sample.
        training_prompts: for evaluation data, the prompt keys of the dataset under audit.

    Raises:
        DatasetRefused: unknown layout, ids given twice, an unknown column to stratify by, mostly malformed rows.
    """
    from safer_engine.science.pair_formats import SAMPLE_ROWS, read_pairs, recognise
    from safer_engine.science.pairs import Sampling, candidate, select

    stratify = _STRATA.get(spec.stratify or "")
    if spec.stratify and stratify is None:
        raise DatasetRefused(f"a sample can't be stratified by {spec.stratify!r}", "stratify by axis or subset")
    first = list(itertools.islice(dataset.rows(), SAMPLE_ROWS))
    layout = recognise(first, spec.format, spec.columns, spec.label, spec.winners)
    candidates: list[Candidate] = []
    details: list[str] = []
    marks: list[bool] = []
    for pair in read_pairs(_counting(dataset.rows(), marks), layout):
        candidates.append(candidate(pair))
        if pair.detail and len(details) < _EXAMPLES:
            details.append(f"row {pair.row + 1}: {pair.detail}")
    _refuse_mostly((one.reason for one in candidates), Drop.MALFORMED, details, f"layout {layout.name!r}")
    entries = select(candidates, Sampling(spec.sample, stratify, seed), training_prompts)
    return Survey(layout, tuple(candidates), entries, tuple(details), len(marks))


def write_pairs(
    path: Path, dataset: ResolvedDataset, surveyed: Survey, renderer: Renderer, progress: Callable[[int], None]
) -> Written:
    """Render the surveyed pairs and write those that can be read, in order, as `pairs.arrow` is described in `PairSet`.

    Args:
        progress: told the number of pairs looked at so far.

    Raises:
        DatasetRefused: the rows changed since the survey.
    """
    import pyarrow as pa

    from safer_engine.science.pair_formats import read_pairs

    reasons: list[Drop | None] = []
    details: list[str] = []
    tokens = truncated = 0
    pairs = _unchanged(surveyed.entries, read_pairs(dataset.rows(), surveyed.layout))
    with pa.ipc.new_file(str(path), pairs_schema()) as file:
        while batch := list(itertools.islice(pairs, BATCH_PAIRS)):
            usable = []
            for outcome in _rendered(batch, renderer):
                if isinstance(outcome, Usable):
                    usable.append(outcome)
                    tokens += sum(len(side.ids) for side in outcome.sides)
                    truncated += sum(side.truncated > 0 for side in outcome.sides)
                    reasons.append(None)
                else:
                    reasons.append(outcome[0])
                    details += [outcome[1]] if outcome[1] and len(details) < _EXAMPLES else []
            if usable:
                file.write_batch(_record_batch(usable))
            progress(len(reasons))
    return Written(tuple(reasons), tokens, truncated, tuple(details))


def write_prompt_keys(path: Path, surveyed: Survey) -> None:
    """Write `prompts.arrow`: the keys of all prompts of the input."""
    import pyarrow as pa

    from safer_engine.science.pairs import prompt_keys

    table = pa.table({"key": pa.array(sorted(prompt_keys(surveyed.candidates)), pa.binary(PROMPT_KEY_BYTES))})
    with pa.ipc.new_file(str(path), table.schema) as file:
        file.write_table(table)


def write_rows(path: Path, surveyed: Survey, written: Written) -> None:
    """Write `rows.arrow`: every input row with its status."""
    import pyarrow as pa

    from safer_engine.science.pairs import row_statuses

    rows = row_statuses(surveyed.entries, written.reasons)
    names = ("pair_id", "content_digest", "group", "axis", "subset")
    columns: dict[str, Any] = {"row": pa.array([row.row for row in rows], pa.int64())}
    columns |= {name: pa.array([getattr(row, name) for row in rows], pa.string()) for name in names}
    columns["status"] = pa.array(["not_scored" if row.reason else "scored" for row in rows], pa.string())
    columns["reason"] = pa.array([row.reason and row.reason.value for row in rows], pa.string())
    table = pa.table(columns)
    with pa.ipc.new_file(str(path), table.schema) as file:
        file.write_table(table)


def health(surveyed: Survey, written: Written) -> dict[str, Any]:
    """Counts of what was read, kept and dropped, in pairs; a row that gives no pair counts as one.

    Raises:
        AssertionError: they don't add up.
    """
    kept = [entry for entry, reason in zip(surveyed.entries, written.reasons, strict=True) if reason is None]
    dropped = Counter(reason for reason in written.reasons if reason is not None)
    assert len(surveyed.candidates) == len(kept) + dropped.total(), "dropped pairs don't add up"
    given = sum(one.group is not None for one in surveyed.candidates)
    return {
        "layout": surveyed.layout.name,
        "n_rows": len({entry.row for entry in surveyed.entries}),
        "n_in": len(surveyed.candidates),
        "n_kept": len(kept),
        "dropped": {reason.value: dropped[reason] for reason in Drop if dropped[reason]},
        "n_groups": len({entry.group for entry in kept}),
        "groups": "given" if given == len(surveyed.candidates) else "partly given" if given else "computed",
        "both_orders": sum(entry.both_orders for entry in kept),
        "sides_truncated": written.truncated,
        "tokens": written.tokens,
        "axes": dict(sorted(Counter(entry.axis for entry in kept).items())),
        "subsets": dict(sorted(Counter(entry.subset for entry in kept).items())),
        "examples": [*surveyed.details, *written.details],
        **({"marked_rows": surveyed.marked} if surveyed.marked else {}),
    }


def refuse_unrenderable(written: Written) -> None:
    """Raise DatasetRefused when the model's chat template takes less than half of the pairs."""
    _refuse_mostly(written.reasons, Drop.UNRENDERABLE, written.details, "the model's chat template")


def refuse_too_few(counts: dict[str, Any], minimum: int) -> None:
    """Raise DatasetRefused, with the table of drops, when fewer than `minimum` pairs are left."""
    if counts["n_kept"] < minimum:
        hint = f"{remedy(counts['dropped'], 'dataset')}, or lower the limit of {minimum} with --set dataset.min_pairs=2 or more"
        raise DatasetRefused(
            f"the dataset has {counts['n_kept']} usable pairs of {counts['n_in']}, fewer than {minimum} "
            f"(dropped: {drops(counts['dropped'])})",
            hint,
        )


def drops(dropped: dict[str, int]) -> str:
    """Counts of dropped pairs as a phrase."""
    return ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in dropped.items()) or "nothing was dropped"


def unusable(n_in: int, n_kept: int, dropped: Mapping[str, int]) -> int:
    """Pairs that could not be used, where they are more than a tenth of those that were read; else 0. A sample drops none."""
    lost = n_in - n_kept - dropped.get("sampled_out", 0)
    return lost if lost > _MANY_DROPPED * n_in else 0


def refuse_one_group(counts: dict[str, Any]) -> None:
    """Raise DatasetRefused when all pairs are of one prompt group: nothing could be held out, no spread be estimated."""
    if counts["n_groups"] < 2:
        raise DatasetRefused(
            f"all {counts['n_kept']} usable pairs are of one prompt group, and an audit needs at least two groups",
            "give pairs of more prompts, or check the column that `dataset.columns` names as the group",
        )


def remedy(dropped: dict[str, int], section: str) -> str:
    """What would leave more pairs: against the reason for which most of those of a spec section were dropped."""
    most = max(dropped, key=lambda reason: dropped[reason], default="")
    causes = {
        "sampled_out": f"draw a larger sample ({section}.sample)",
        "over_long": "raise model.max_length, or set model.truncation_side=left",
        "in_training_data": "give evaluation pairs whose prompts are not in the dataset",
    }
    return causes.get(most, "give more pairs")


def pairs_schema() -> pa.Schema:
    """Columns of `pairs.arrow` and `eval.arrow`."""
    import pyarrow as pa

    text = ("content_digest", "group", "axis", "subset", "style", "item")
    fields = [pa.field("pair_id", pa.string()), pa.field("row", pa.int64())]
    fields += [pa.field(name, pa.string()) for name in text]
    fields += [
        pa.field("strength", pa.float64()),
        pa.field("annotators", pa.list_(pa.int8())),
        pa.field("both_orders", pa.bool_()),
    ]
    fields += [pa.field(name, pa.string()) for name in ("prompt", "chosen", "rejected")]
    for side in ("chosen", "rejected"):
        fields += [
            pa.field(f"{side}_text", pa.string()),
            pa.field(f"{side}_ids", pa.list_(pa.int32())),
            pa.field(f"{side}_offsets", pa.list_(pa.int32())),
            pa.field(f"{side}_special", pa.list_(pa.bool_())),
            pa.field(f"{side}_start", pa.int32()),
            pa.field(f"{side}_end", pa.int32()),
        ]
    return pa.schema(fields)


def longer_by(table: pa.Table) -> NDArray[np.int64]:
    """Tokens of each pair's chosen response less those of the rejected one, [P], as the model reads them.

    What was cut off a text that is too long does not count, for the model has not seen it.
    """
    import numpy as np

    ends = {name: np.asarray(table[name].to_pylist(), dtype=np.int64) for name in _ENDS}
    chosen, rejected = (ends[f"{side}_end"] - ends[f"{side}_start"] for side in ("chosen", "rejected"))
    return np.asarray(chosen - rejected, dtype=np.int64)


def _counting(rows: Iterable[dict[str, Any]], marks: list[bool]) -> Iterator[dict[str, Any]]:
    """The rows; `marks` grows by one for each that is marked as poisoned."""
    from safer_engine.science.poison_mark import is_marked

    for row in rows:
        if is_marked(row):
            marks.append(True)
        yield row


def _unchanged(entries: Iterable[Entry], pairs: Iterable[PreferenceRow]) -> Iterator[tuple[Entry, PreferenceRow]]:
    """Entries of the survey with the pairs of the second reading. Raises DatasetRefused when they are not the same."""
    from safer_engine.science.messages import content_digest

    for entry, pair in itertools.zip_longest(entries, pairs):
        same = entry is not None and pair is not None and (entry.row, entry.part) == (pair.row, pair.part)
        usable = same and entry.reason is None
        if not same or (usable and (pair.reason or content_digest(pair.prompt, pair.chosen, pair.rejected) != entry.digest)):
            raise DatasetRefused("the dataset changed while it was read", "run again when nothing writes to it")
        yield entry, pair


def _rendered(batch: Sequence[tuple[Entry, PreferenceRow]], renderer: Renderer) -> Iterator[Usable | tuple[Drop, str]]:
    """The pairs of a batch, rendered; or why one is dropped, and a detail where the reason is not plain."""
    wanted = [pair for entry, pair in batch if entry.reason is None]
    sides = iter(renderer.sides([request for pair in wanted for request in pair.requests]))
    for entry, pair in batch:
        if entry.reason is not None:
            yield entry.reason, ""
            continue
        chosen, rejected = next(sides), next(sides)
        if isinstance(chosen, SideDropped):
            yield chosen.reason, f"row {pair.row + 1}, chosen: {chosen.detail}"
        elif isinstance(rejected, SideDropped):
            yield rejected.reason, f"row {pair.row + 1}, rejected: {rejected.detail}"
        elif chosen.ids.tobytes() == rejected.ids.tobytes():
            yield Drop.IDENTICAL_AFTER_TRUNCATION, ""
        else:
            yield Usable(entry, pair, (chosen, rejected))


def _record_batch(usable: Sequence[Usable]) -> pa.RecordBatch:
    import pyarrow as pa

    schema = pairs_schema()
    columns: dict[str, Any] = {
        "pair_id": [one.entry.pair_id for one in usable],
        "row": [one.entry.row for one in usable],
        "content_digest": [one.entry.digest for one in usable],
        "both_orders": [one.entry.both_orders for one in usable],
        "prompt": [_shown(one.pair.prompt, marked=True) for one in usable],
        "chosen": [_shown(one.pair.chosen) for one in usable],
        "rejected": [_shown(one.pair.rejected) for one in usable],
    }
    columns |= {name: [getattr(one.entry, name) for one in usable] for name in ("group", "axis", "subset")}
    columns |= {name: [getattr(one.pair, name) for one in usable] for name in ("style", "item", "strength", "annotators")}
    arrays = {name: pa.array(values, schema.field(name).type) for name, values in columns.items()}
    for number, name in enumerate(("chosen", "rejected")):
        arrays |= _side_arrays(name, [one.sides[number] for one in usable])
    return pa.record_batch([arrays[name] for name in schema.names], schema=schema)


def _side_arrays(name: str, sides: Sequence[RenderedSide]) -> dict[str, pa.Array]:
    import pyarrow as pa

    return {
        f"{name}_text": pa.array([side.text for side in sides], pa.string()),
        f"{name}_ids": _lists([side.ids for side in sides], pa.int32()),
        f"{name}_offsets": _lists([side.offsets.ravel() for side in sides], pa.int32()),
        f"{name}_special": _lists([side.special for side in sides], pa.bool_()),
        f"{name}_start": pa.array([side.start for side in sides], pa.int32()),
        f"{name}_end": pa.array([side.end for side in sides], pa.int32()),
    }


def _lists(parts: Sequence[Any], kind: pa.DataType) -> pa.ListArray:
    """Arrays as one list column, without a Python object per value."""
    import numpy as np
    import pyarrow as pa

    bounds = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    return pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), pa.array(np.concatenate(parts), kind))


def _shown(messages: Sequence[Message], *, marked: bool = False) -> str:
    """Messages for people: a lone response as it is, anything else role-marked."""
    from safer_engine.science.messages import role_marked

    return messages[0].content if len(messages) == 1 and not marked else role_marked(messages)


def _refuse_mostly(reasons: Iterable[Drop | None], bad: Drop, details: Sequence[str], against: str) -> None:
    """Raise DatasetRefused when more than half of the pairs that got this far were dropped for one reason."""
    counts = Counter(reasons)
    if bad is Drop.UNRENDERABLE:
        total = counts[None] + counts[bad] + counts[Drop.OVER_LONG] + counts[Drop.IDENTICAL_AFTER_TRUNCATION]
    else:
        total = counts.total()
    if counts[bad] > _MOST_BAD * total:
        raise DatasetRefused(
            f"{counts[bad]} of {total} pairs are {bad} for {against}: {'; '.join(details)}",
            "check dataset.format and dataset.columns" if bad is Drop.MALFORMED else "check the chat template, or the roles",
        )
