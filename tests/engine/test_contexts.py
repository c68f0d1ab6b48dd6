import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from safer_engine.errors import NumericalError
from safer_engine.science.contexts import (
    Span,
    TopContexts,
    merge_contexts,
    shard_contexts,
    span_round,
    token_texts,
    window_activations,
)
from safer_engine.science.latent_acts import ShardRows, summarise_shard
from safer_engine.science.sae import SparseActs

D_SAE = 7
GROUPS = np.arange(60) // 2  # two pairs a group


def encode(x_BD: Tensor) -> SparseActs:
    top = x_BD.topk(3, dim=1)
    return SparseActs(top.values, top.indices)


def make_rows(n_pairs: int = 40, seed: int = 0, first_pair: int = 0) -> ShardRows:
    rng = np.random.default_rng(seed)
    response = np.repeat(np.arange(2 * n_pairs), 6) + 2 * first_pair
    position = np.tile(np.arange(10, 22, 2), 2 * n_pairs).astype(np.int32)
    x = torch.from_numpy(np.round(rng.normal(size=(len(response), D_SAE)) * 2).astype(np.float32) / 2)  # many ties
    return ShardRows(x, response, position, np.ones(len(response), dtype=bool))


def brute_force(rows: ShardRows, keep: int, groups: np.ndarray = GROUPS) -> list[tuple[int, float, int, int]]:
    z = encode(rows.x_BD).dense(D_SAE).numpy()
    found = []
    for latent in range(D_SAE):
        best: dict[int, tuple[float, int]] = {}
        for row in range(len(z)):
            key = int(rows.response_B[row])
            if z[row, latent] > 0 and z[row, latent] > best.get(key, (0.0, 0))[0]:
                best[key] = (float(z[row, latent]), int(rows.position_B[row]))
        taken: set[int] = set()
        for response, (value, position) in sorted(best.items(), key=lambda item: (-item[1][0], item[0])):
            if len(taken) < keep and int(groups[response // 2]) not in taken:
                taken.add(int(groups[response // 2]))
                found.append((latent, value, response, position))
    return found


def listed(contexts: TopContexts) -> list[tuple[int, float, int, int]]:
    columns = (contexts.latents_N, contexts.activations_N, contexts.responses_N, contexts.positions_N)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def part(rows: ShardRows, pairs: range) -> ShardRows:
    mine = np.flatnonzero(np.isin(rows.response_B // 2, list(pairs)))
    return ShardRows(rows.x_BD[mine], rows.response_B[mine], rows.position_B[mine], rows.counted_B[mine])


@pytest.mark.parametrize("keep", [1, 4, 1000])
def test_the_strongest_contexts_are_found_one_per_group(keep: int) -> None:
    rows = make_rows()
    found = shard_contexts(summarise_shard(rows, encode, D_SAE), keep, GROUPS)
    assert listed(found) == brute_force(rows, keep)


@pytest.mark.parametrize("cuts", [(13,), (1, 2, 39), (20, 20, 25)])
def test_shards_merge_to_the_same_list_however_they_are_cut(cuts: tuple[int, ...]) -> None:
    rows, edges = make_rows(seed=1), [0, *cuts, 40]
    parts = [
        shard_contexts(summarise_shard(part(rows, range(a, b)), encode, D_SAE), 5, GROUPS)
        for a, b in itertools.pairwise(edges)
        if a < b
    ]
    forward, backward = (
        merge_contexts(parts, 5, GROUPS),
        merge_contexts([merge_contexts(parts[1:], 5, GROUPS), parts[0]], 5, GROUPS),
    )
    assert listed(forward) == listed(backward) == brute_force(rows, 5)


def test_ranks_and_selection_follow_the_latents() -> None:
    found = shard_contexts(summarise_shard(make_rows(), encode, D_SAE), 3, GROUPS)
    assert found.ranks_N.tolist() == [0, 1, 2] * D_SAE
    some = found.of(np.array([5, 2]))
    assert some.latents_N.tolist() == [2, 2, 2, 5, 5, 5]
    assert len(found.of(np.array([], dtype=np.int64)).ranks_N) == 0


@pytest.mark.parametrize(
    ("position", "length", "window", "expected"),
    [
        (50, 100, 10, Span(45, 55, 5)),
        (0, 100, 10, Span(0, 10, 0)),
        (99, 100, 10, Span(90, 100, 9)),
        (2, 5, 10, Span(0, 5, 2)),
        (0, 1, 4, Span(0, 1, 0)),
    ],
)
def test_windows_are_centred_as_far_as_the_sequence_allows(position: int, length: int, window: int, expected: Span) -> None:
    assert span_round(position, length, window) == expected
    assert expected.start + expected.focus == position


def test_a_position_outside_the_sequence_is_refused() -> None:
    with pytest.raises(NumericalError, match="outside"):
        span_round(5, 5, 10)


def test_token_texts_join_to_the_exact_text() -> None:
    text = "  Hello,  wörld 👩‍🚀!\n"
    spans = [(0, 0), (2, 7), (7, 8), (10, 15), (16, 19), (16, 19), (19, 20), (20, 21), (0, 0)]
    offsets = [edge for span in spans for edge in span]
    texts = token_texts(text, offsets, 0, len(spans))
    assert texts == ["", "  Hello", ",", "  wörld", " 👩‍🚀", "", "!", "\n", ""]
    assert "".join(texts) == text
    assert token_texts(text, offsets, 3, 5) == texts[3:5]
    assert token_texts(text, np.array(offsets, dtype=np.int32), 8, 9) == [""]


def test_activations_in_a_window_are_the_latents_own_and_unknown_where_nothing_is_stored() -> None:
    rows = make_rows(seed=2)
    counted = rows.counted_B.copy()
    counted[::5] = False
    rows = replace(rows, counted_B=counted)
    z = np.maximum(encode(rows.x_BD).dense(D_SAE).numpy(), 0)
    contexts = shard_contexts(summarise_shard(rows, encode, D_SAE), 4, GROUPS)
    spans = [span_round(int(position), 30, 8) for position in contexts.positions_N]
    windows = window_activations(rows, encode, contexts, spans)
    for (latent, activation, response, _), span, window in zip(listed(contexts), spans, windows, strict=True):
        assert len(window) == span.stop - span.start
        assert window[span.focus] == activation
        for token in range(span.start, span.stop):
            row = np.flatnonzero((rows.response_B == response) & (rows.position_B == token) & rows.counted_B)
            if len(row):
                assert window[token - span.start] == z[row[0], latent]
            else:
                assert np.isnan(window[token - span.start])
    assert window_activations(rows, encode, contexts.take(np.array([], dtype=np.int64)), []) == []
