"""What becomes of each pair before it is rendered: ids, groups, duplicates, leakage, sampling.

Works on `Candidate`s, a few hundred bytes each, so that the texts of a dataset are never held at once.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from safer_engine.errors import DatasetRefused
from safer_engine.science.drops import Drop
from safer_engine.science.messages import content_digest, digest, first_user_turn, normalised
from safer_engine.science.pair_formats import PreferenceRow

LONG_RESPONSE = 80
"""Responses of at least this many characters link the pairs that share them."""
UNNAMED = "all"
"""Axis and subset of pairs that state none."""
_NAMED_DUPLICATES = 5


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is remembered of a pair while a dataset is surveyed.

    Attributes:
        row, part: see `PreferenceRow`.
        own_id: the row's id, if it has one.
        digest: content digest; of the raw row where there is no pair.
        mirror: content digest of the same pair with its sides swapped.
        prompt_key: what stands for the prompt in comparisons; None without a prompt.
        links: keys shared with the pairs of the same group.
        reason: why the pair is dropped already, or None.
    """

    row: int
    part: int
    own_id: str | None
    digest: str
    mirror: str = ""
    prompt_key: bytes | None = None
    links: tuple[bytes, ...] = ()
    group: str | None = None
    axis: str = UNNAMED
    subset: str = UNNAMED
    reason: Drop | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A pair's names and fate. `pair_id` is unique; `row_id` and `row_digest` are those of its input row."""

    row: int
    part: int
    pair_id: str
    row_id: str
    digest: str
    row_digest: str
    group: str
    axis: str
    subset: str
    both_orders: bool = False
    reason: Drop | None = None


@dataclass(frozen=True)
class Sampling:
    """A sample by whole groups.

    Attributes:
        size: at most this many pairs; None for all.
        stratify: column whose shares the sample keeps, or None.
        seed: of the draw.
    """

    size: int | None = None
    stratify: Literal["axis", "subset"] | None = None
    seed: int = 0


@dataclass(frozen=True)
class RowStatus:
    """What became of one input row: `scored` when any of its pairs is used."""

    row: int
    pair_id: str
    content_digest: str
    group: str
    axis: str
    subset: str
    reason: Drop | None


def candidate(pair: PreferenceRow) -> Candidate:
    """Reduce a pair to what the survey needs, and see whether its sides are there and differ."""
    axis, subset = pair.axis or UNNAMED, pair.subset or UNNAMED
    if pair.reason is not None:
        raw = digest(dict(pair.raw or {}))
        return Candidate(pair.row, pair.part, pair.id, raw, group=pair.group, axis=axis, subset=subset, reason=pair.reason)
    prompt = normalised(first_user_turn(pair.prompt))
    prompt_key = _key("prompt", prompt) if prompt else None
    responses = [normalised(side[-1].content) for side in (pair.chosen, pair.rejected)]
    links = {_key("response", text) for text in responses if len(text) >= LONG_RESPONSE}
    return Candidate(
        row=pair.row,
        part=pair.part,
        own_id=pair.id,
        digest=content_digest(pair.prompt, pair.chosen, pair.rejected),
        mirror=content_digest(pair.prompt, pair.rejected, pair.chosen),
        prompt_key=prompt_key,
        links=tuple(sorted(links | ({prompt_key} if prompt_key else set()))),
        group=pair.group,
        axis=axis,
        subset=subset,
        reason=_unusable(pair),
    )


def select(
    candidates: Sequence[Candidate], sampling: Sampling, training_prompts: frozenset[bytes] = frozenset()
) -> tuple[Entry, ...]:
    """Name every pair, group the pairs, and decide which go on to be rendered.

    Args:
        candidates: all pairs of a dataset, those of a row one after another.
        training_prompts: for evaluation data, `prompt_keys` of the dataset under audit.

    Returns:
        One entry per candidate, in order.

    Raises:
        DatasetRefused: the same id is given to two rows.
    """
    groups = group_pairs(candidates)
    reasons = _leaked(_repeated(candidates), candidates, training_prompts)
    present = {one.digest for one, reason in zip(candidates, reasons, strict=True) if reason is None}
    entries = [
        replace(entry, group=group, reason=reason, both_orders=reason is None and one.mirror in present)
        for entry, one, group, reason in zip(_named(candidates), candidates, groups, reasons, strict=True)
    ]
    return tuple(_sampled(entries, sampling))


def prompt_keys(candidates: Iterable[Candidate]) -> frozenset[bytes]:
    """Keys of all prompts that occur: first user turns, compared without case and runs of white space."""
    return frozenset(one.prompt_key for one in candidates if one.prompt_key)


def group_pairs(candidates: Sequence[Candidate]) -> list[str]:
    """Group of each pair: the given one, else pairs linked by a first user turn or a long response, directly or through
    others. Computed names depend on what the pairs share, not on their order.
    """
    parent: dict[bytes, bytes] = {}

    def root(key: bytes) -> bytes:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for one in candidates:
        if one.group is None:
            for other in one.links[1:]:
                low, high = sorted((root(one.links[0]), root(other)))
                parent[high] = low
    return [one.group or (root(one.links[0]).hex()[:12] if one.links else one.digest[:12]) for one in candidates]


def row_statuses(entries: Iterable[Entry], reasons: Iterable[Drop | None]) -> list[RowStatus]:
    """One status per input row, in order. `reasons`: why each entry was dropped in the end, None for used pairs.

    A row with several pairs is scored when any is used; else it carries its first pair's reason.
    """
    statuses = []
    for _, several in itertools.groupby(zip(entries, reasons, strict=True), key=lambda pair: pair[0].row):
        fates = list(several)
        first = fates[0][0]
        reason = None if any(fate is None for _, fate in fates) else fates[0][1]
        statuses.append(RowStatus(first.row, first.row_id, first.row_digest, first.group, first.axis, first.subset, reason))
    return statuses


def _key(kind: str, text: str) -> bytes:
    return hashlib.blake2b(f"{kind}\0{text}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _unusable(pair: PreferenceRow) -> Drop | None:
    chosen, rejected = pair.chosen[-1].content.strip(), pair.rejected[-1].content.strip()
    if not chosen or not rejected:
        return Drop.EMPTY_SIDE
    if chosen == rejected and pair.chosen[:-1] == pair.rejected[:-1]:
        return Drop.IDENTICAL_SIDES
    return None


def _repeated(candidates: Sequence[Candidate]) -> list[Drop | None]:
    seen: set[str] = set()
    reasons: list[Drop | None] = []
    for one in candidates:
        repeated = one.reason is None and one.digest in seen
        reasons.append(Drop.DUPLICATE if repeated else one.reason)
        if one.reason is None:
            seen.add(one.digest)
    return reasons


def _leaked(reasons: list[Drop | None], candidates: Sequence[Candidate], training: frozenset[bytes]) -> list[Drop | None]:
    return [
        Drop.IN_TRAINING_DATA if reason is None and one.prompt_key in training else reason
        for reason, one in zip(reasons, candidates, strict=True)
    ]


def _named(candidates: Sequence[Candidate]) -> list[Entry]:
    """Entries with ids: the row's own, else 16 digits of its content digest; `#n` for each of a row's several pairs and
    `~n` for rows without an id that repeat one.
    """
    rows = [list(several) for _, several in itertools.groupby(candidates, key=lambda one: one.row)]
    given = Counter(row[0].own_id for row in rows if row[0].own_id is not None)
    _refuse_duplicates([name for name, times in given.items() if times > 1])
    computed: Counter[str] = Counter()
    entries = []
    for row in rows:
        row_digest = row[0].digest if len(row) == 1 else digest([one.digest for one in row])
        row_id = row[0].own_id
        if row_id is None:
            computed[row_digest] += 1
            row_id = row_digest[:16] + (f"~{computed[row_digest]}" if computed[row_digest] > 1 else "")
        for one in row:
            pair_id = f"{row_id}#{one.part}" if one.part else row_id
            names = one.digest, row_digest, "", one.axis, one.subset
            entries.append(Entry(one.row, one.part, pair_id, row_id, *names))
    clashes = Counter(entry.pair_id for entry in entries)
    _refuse_duplicates([name for name, times in clashes.items() if times > 1])
    return entries


def _refuse_duplicates(names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - _NAMED_DUPLICATES} more" if len(names) > _NAMED_DUPLICATES else ""
        raise DatasetRefused(
            f"several rows have the same id: {', '.join(sorted(names)[:_NAMED_DUPLICATES])}{more}",
            "make them unique, map another column to id, or map id to nothing (dataset.columns: {id: ''}) so that content counts",
        )


def _sampled(entries: list[Entry], sampling: Sampling) -> list[Entry]:
    usable = [entry for entry in entries if entry.reason is None]
    if sampling.size is None or len(usable) <= sampling.size:
        return entries
    kept: set[str] = set()
    rng = np.random.default_rng(sampling.seed)
    for stratum, quota in _quotas(usable, sampling).items():
        kept |= _draw(stratum, quota, rng)
    return [
        replace(entry, reason=Drop.SAMPLED_OUT) if entry.reason is None and entry.group not in kept else entry
        for entry in entries
    ]


def _quotas(usable: Sequence[Entry], sampling: Sampling) -> Mapping[tuple[tuple[str, int], ...], int]:
    """Groups with their sizes, by stratum, and how many pairs to draw from each; a group lies where most of it lies."""
    assert sampling.size is not None
    places: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in usable:
        places[entry.group][getattr(entry, sampling.stratify) if sampling.stratify else UNNAMED] += 1
    strata: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for group in sorted(places):
        most = min(places[group], key=lambda place: (-places[group][place], place))
        strata[most].append((group, places[group].total()))
    totals = {name: sum(size for _, size in strata[name]) for name in sorted(strata)}
    exact = {name: sampling.size * total / len(usable) for name, total in totals.items()}
    quotas = {name: int(share) for name, share in exact.items()}
    left_over = sampling.size - sum(quotas.values())
    for name in sorted(exact, key=lambda one: (quotas[one] - exact[one], one))[:left_over]:
        quotas[name] += 1
    return {tuple(strata[name]): quota for name, quota in quotas.items()}


def _draw(groups: Sequence[tuple[str, int]], quota: int, rng: np.random.Generator) -> set[str]:
    """Groups in random order, each taken that still fits."""
    drawn: set[str] = set()
    for index in rng.permutation(len(groups)):
        group, size = groups[index]
        if size <= quota:
            drawn.add(group)
            quota -= size
    return drawn
