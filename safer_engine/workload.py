"""The size of an audit from a sample of its rows, where nothing was computed yet."""

from __future__ import annotations

import itertools
from typing import Any

from safer_engine.pipeline import AuditRequest
from safer_engine.sources.resolved import ResolvedDataset
from safer_engine.spec import DatasetSpec

_TEMPLATE_TOKENS = 6  # what a chat template or special tokens add to a text, about


def sampled_workload(request: AuditRequest, n_rows: int) -> tuple[int, int, float]:
    """Pairs, evaluation pairs, and mean tokens of a text as truncated, from the first rows of each file.

    The rows are all counted; only the first `n_rows` are parsed and tokenised, without the chat template.
    """
    from tokenizers import Tokenizer

    spec = request.spec
    tokenizer = Tokenizer.from_file(str(request.sources.model.path / "tokenizer.json"))
    n_pairs, lengths = _count(request.sources.dataset, spec.dataset, tokenizer, n_rows)
    n_eval = 0
    if request.sources.evaluation is not None and spec.evaluation is not None:
        n_eval, more = _count(request.sources.evaluation, spec.evaluation, tokenizer, n_rows)
        lengths += more
    cut = [min(length + _TEMPLATE_TOKENS, spec.model.max_length) for length in lengths]
    return n_pairs, n_eval, sum(cut) / max(len(cut), 1)


def _count(found: ResolvedDataset, spec: DatasetSpec, tokenizer: Any, n_rows: int) -> tuple[int, list[int]]:
    from safer_engine.science.pair_formats import read_pairs, recognise

    rows = found.rows()
    first = list(itertools.islice(rows, n_rows))
    total = len(first) + sum(1 for _ in rows)
    layout = recognise(first, spec.format, spec.columns, spec.label)
    texts, n_pairs = [], 0
    for pair in read_pairs(first, layout):
        if pair.reason is not None:
            continue
        n_pairs += 1
        for prompt, response in pair.requests:
            texts.append("\n\n".join([*(message.content for message in prompt), response]))
    lengths = [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
    scaled = round(total * n_pairs / max(len(first), 1))
    return min(scaled, spec.sample or scaled), lengths
