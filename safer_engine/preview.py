"""One pair as the reward model would read it, for a person to look at before an audit."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from safer_engine.errors import DatasetRefused
from safer_engine.sources.resolved import ResolvedDataset, ResolvedModel
from safer_engine.spec import DatasetSpec, ModelSpec


@dataclass(frozen=True)
class PreviewSide:
    """One side: the text the model reads with its response tokens marked, and how many tokens there are."""

    marked: str
    tokens: int
    response_tokens: int
    truncated: int


@dataclass(frozen=True)
class Preview:
    """The first pair of a dataset that can be read.

    Attributes:
        layout: layout of the dataset's rows.
        template: `chat` or `plain` (see `safer_engine.science.rendering`).
        row: line of the pair in the input, from 1.
    """

    layout: str
    template: str
    row: int
    chosen: PreviewSide
    rejected: PreviewSide


def preview(
    model: ResolvedModel, model_spec: ModelSpec, dataset: ResolvedDataset, spec: DatasetSpec, trust_remote_code: bool = False
) -> Preview:
    """Render the first pair that can be read, among the first rows.

    Raises:
        ModelRefused: the tokenizer can't be used.
        DatasetRefused: unknown layout, or none of the first rows gives a pair.
    """
    from safer_engine.science.pair_formats import SAMPLE_ROWS, read_pairs, recognise
    from safer_engine.science.rendering import RenderedSide, mark_response
    from safer_engine.sources.tokenizers import load_renderer

    renderer = load_renderer(model.path, model_spec, trust_remote_code)
    rows = list(itertools.islice(dataset.rows(), SAMPLE_ROWS))
    layout = recognise(rows, spec.format, spec.columns, spec.label, spec.winners)
    for pair in read_pairs(rows, layout):
        sides = [] if pair.reason else [side for side in renderer.sides(pair.requests) if isinstance(side, RenderedSide)]
        if len(sides) == 2:
            shown = [PreviewSide(mark_response(one), len(one.ids), one.end - one.start, one.truncated) for one in sides]
            return Preview(layout.name, renderer.template, pair.row + 1, shown[0], shown[1])
    raise DatasetRefused(f"none of the first {len(rows)} rows gives a pair that the model can read", "check dataset.format")
