"""The size of an audit's datasets: counted where they were read, else from a sample of their rows."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from safer_engine.evaluation_pairs import named_evaluation
from safer_engine.pipeline import AuditRequest, StagePlan
from safer_engine.sources.resolved import ResolvedDataset
from safer_engine.spec import DatasetSpec
from safer_engine.store import ArtifactStore

if TYPE_CHECKING:
    from safer_engine.science.rendering import Renderer


@dataclass(frozen=True)
class DatasetSize:
    """Size of a dataset.

    Attributes:
        tokens: over both sides of its usable pairs, as truncated.
        exact: whether it was counted, or extrapolated from a sample of rows.
    """

    n_pairs: int
    tokens: int
    exact: bool


def dataset_size(
    request: AuditRequest, section: Literal["dataset", "evaluation"], store: ArtifactStore, stage: StagePlan, n_rows: int
) -> DatasetSize:
    """How large the dataset of a spec section is; nothing where none is given.

    Args:
        stage: that reads it: where it was run, what it found counts.
        n_rows: where it was not, all rows are counted, but only so many read and rendered.
    """
    source, spec = getattr(request.sources, section), getattr(request.spec, section)
    if source is None:
        return DatasetSize(0, 0, exact=True)
    if stage.state == "cached" and stage.key is not None:
        meta = store.read(stage.name, stage.key).manifest.meta
        return DatasetSize(meta.get("n_pairs", 0), meta.get("tokens", 0), exact=True)
    with named_evaluation() if section == "evaluation" else nullcontext():
        return _sampled(request, source, spec, n_rows)


def kept_positions(store: ArtifactStore, stage: StagePlan) -> int | None:
    """Positions that the stage `activations` kept; None where it is still to be run."""
    if stage.state != "cached" or stage.key is None:
        return None
    return int(store.read(stage.name, stage.key).manifest.meta["n_positions"])


def _sampled(request: AuditRequest, source: ResolvedDataset, spec: DatasetSpec, n_rows: int) -> DatasetSize:
    from safer_engine.sources.tokenizers import load_renderer

    renderer = load_renderer(request.sources.model.path, request.spec.model, request.spec.runtime.trust_remote_code)
    n_pairs, lengths = _count(source, spec, renderer, n_rows)
    return DatasetSize(n_pairs, int(2 * n_pairs * sum(lengths) / max(len(lengths), 1)), exact=False)


def _count(found: ResolvedDataset, spec: DatasetSpec, renderer: Renderer, n_rows: int) -> tuple[int, list[int]]:
    """Usable pairs of all rows, and tokens of the sampled texts."""
    from safer_engine.science.pair_formats import read_pairs, recognise
    from safer_engine.science.rendering import RenderedSide

    rows = found.rows()
    first = list(itertools.islice(rows, n_rows))
    total = len(first) + sum(1 for _ in rows)
    layout = recognise(first, spec.format, spec.columns, spec.label, spec.winners)
    requests = [request for pair in read_pairs(first, layout) if pair.reason is None for request in pair.requests]
    sides = [side for side in renderer.sides(requests) if isinstance(side, RenderedSide)]
    scaled = round(total * len(sides) / 2 / max(len(first), 1))
    return min(scaled, spec.sample or scaled), [len(side.ids) for side in sides]
