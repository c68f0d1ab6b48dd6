"""The parts of the label-noise benchmark that could quietly be wrong: flips, truth, weighted figures, compared fusions."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import pytest

from benchmarks.flip_groups import flip_groups, length_scores, read_rows, word_scores, write_rows
from benchmarks.label_noise import Cell, Setup, flip
from benchmarks.label_noise_gaps import gap_tables, gaps
from benchmarks.label_noise_rows import (
    DEFAULT,
    DEFAULT_DENSE,
    DENSE,
    DENSE_INSTEAD,
    FUSION,
    LATENTS,
    MARGIN,
    PAPER,
    PROBE,
    RETRAINED,
    WITHOUT,
    contradictions,
    fusions,
    label_bits,
    reliabilities,
    row_doubts,
)
from benchmarks.label_noise_table import figures, keep, markdown_table, ratio, weighted_precision
from safer_engine.demo_data import generate
from safer_engine.errors import DatasetRefused, SpecError
from safer_engine.science.pair_scoring import ScoringParams, score_pairs
from safer_engine.science.stats import average_precision
from safer_engine.spec_signals import DEFAULT_SIGNALS, DEFAULT_SIGNALS_RETRAINED
from tests.helpers.planted_pairs import planted_pairs

CLEAN = list(generate(seed=2, n_groups=80, flip_share=0.0).rows)


def test_whole_groups_of_one_axis_are_flipped_and_nothing_else_changes() -> None:
    flipped = flip_groups(CLEAN, 0.2, seed=1)
    groups = {row["group"] for row in CLEAN if row["axis"] == "safety"}
    assert len(flipped.groups) == round(0.2 * len(groups))
    for before, after in zip(CLEAN, flipped.rows, strict=True):
        wrong = before["group"] in flipped.groups
        assert (before["id"] in flipped.pairs) == wrong
        assert (after["chosen"], after["rejected"]) == tuple(
            before[side] for side in (("rejected", "chosen") if wrong else ("chosen", "rejected"))
        )
        assert {k: v for k, v in after.items() if k not in ("chosen", "rejected")} == {
            k: v for k, v in before.items() if k not in ("chosen", "rejected")
        }
    assert flip_groups(CLEAN[::-1], 0.2, seed=1).groups == flipped.groups
    assert flip_groups(CLEAN, 0.2, seed=2).groups != flipped.groups
    assert flip_groups(flipped.rows, 0.2, seed=1).rows == CLEAN


def test_targets_take_the_groups_of_highest_mean() -> None:
    scores = length_scores(CLEAN)
    flipped = flip_groups(CLEAN, 0.1, seed=0, scores=scores)
    safety = [row for row in CLEAN if row["axis"] == "safety"]
    mean = {g: np.mean([scores[row["id"]] for row in safety if row["group"] == g]) for g in {row["group"] for row in safety}}
    assert min(mean[g] for g in flipped.groups) >= max(mean[g] for g in mean if g not in flipped.groups)
    with pytest.raises(DatasetRefused, match="axis nothing"):
        flip_groups(CLEAN, 0.1, seed=0, axis="nothing")
    unread = next(row["id"] for row in safety if row["group"] in flipped.groups)
    rest = {name: value for name, value in scores.items() if name != unread}
    assert len(flip_groups(CLEAN, 0.1, seed=0, scores=rest).groups) == len(flipped.groups)
    nothing = {row["group"] for row in safety if row["group"] in flipped.groups}
    rest = {row["id"]: scores[row["id"]] for row in safety if row["group"] not in nothing}
    assert not flip_groups(CLEAN, 0.1, seed=0, scores=rest).groups & nothing


def test_a_model_of_words_mostly_agrees_with_clean_labels() -> None:
    assert np.mean(np.array(list(word_scores(CLEAN).values())) > 0) > 0.8


def test_files_come_back_and_are_repeatable(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz", "c.jsonl"):
        write_rows(tmp_path / name, CLEAN)
        assert read_rows(tmp_path / name) == CLEAN
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert json.loads(gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).splitlines()[0]) == CLEAN[0]


def test_weighted_precision_is_that_of_repeated_rows() -> None:
    rng = np.random.default_rng(0)
    truth, score = rng.random(60) < 0.3, rng.normal(size=60)
    times = rng.integers(0, 4, size=(5, 60))
    found = weighted_precision(truth, score, times)
    for weights, value in zip(times, found, strict=True):
        repeated = np.repeat(np.arange(60), weights)
        assert value == pytest.approx(average_precision(truth[repeated], score[repeated]))
    assert weighted_precision(truth, score, np.ones((1, 60), dtype=np.int64))[0] == pytest.approx(average_precision(truth, score))


def test_contradictions_are_counted_within_a_prompt() -> None:
    found = contradictions(["p", "p", "p", "q"], ["a", "b", "a", "a"], ["b", "a", "c", "b"])
    assert found.tolist() == [2.0, 3.0, 1.0, 0.0]


def test_compared_fusions_are_the_defaults_with_the_dense_probe_in_the_sae_s_place() -> None:
    found = fusions(retrained=True)
    assert found[FUSION] == {LATENTS: 1.0, "kNN on latents": 0.5, RETRAINED: 0.5}
    assert found[DENSE_INSTEAD] == {DENSE: 1.0, "kNN on dense": 0.5, RETRAINED: 0.5}
    assert not set(found[WITHOUT]) & {LATENTS, "kNN on latents"}
    assert set(fusions(retrained=False)) == {DEFAULT, DEFAULT_DENSE}


@pytest.mark.parametrize("retrained", [True, False])
def test_rows_are_the_products_own_suspicion(retrained: bool) -> None:
    planted = planted_pairs(5, n_groups=120)
    rng = np.random.default_rng(0)
    truth = np.where(planted.flipped, -1.0, 1.0)
    margins = truth * 2 + rng.normal(size=len(truth)) if retrained else None
    inputs = replace(planted.inputs, retrained_P=margins)
    rows = row_doubts(inputs, [str(i) for i in range(len(truth))], seed=0)
    weights = DEFAULT_SIGNALS_RETRAINED if retrained else DEFAULT_SIGNALS
    found = score_pairs(inputs, ScoringParams(dict(weights), seed=0)).suspicion_P
    row = FUSION if retrained else DEFAULT
    assert average_precision(planted.flipped, rows[row]) == pytest.approx(average_precision(planted.flipped, found), abs=1e-6)
    assert (RETRAINED in rows) == retrained
    assert average_precision(planted.flipped, rows[row]) > 2 * average_precision(planted.flipped, rows["random"])
    bits = label_bits(inputs, rows, "safety", 0)
    assert bits[row] > 0.1
    assert (FUSION in bits) == retrained
    assert WITHOUT not in bits
    told = reliabilities(inputs, rows, "safety", planted.flipped, 0)
    assert set(told) == ({FUSION, DEFAULT} if retrained else {DEFAULT})
    if not retrained:  # too weak a signal for a probability
        assert told[row]["kind"] == "rank"
        assert told[row]["reason"]
        return
    whole = told[row]["reliability"][""]
    at = inputs.axes_P == "safety"
    brier = ((rows[row][at] - planted.flipped[at]) ** 2).mean()
    assert whole["brier"]["value"] == pytest.approx(brier, abs=1e-6)
    assert whole["brier"]["value"] < whole["constant"]


def frame(seed: int, strength: float) -> Any:
    import pandas as pd

    rng = np.random.default_rng(seed)
    groups = np.repeat([f"g{i}" for i in range(150)], 2)
    flipped = np.repeat(rng.random(150) < 0.1, 2)
    names = ("random", WITHOUT, MARGIN, PROBE, DENSE, PAPER, FUSION, LATENTS)
    noise = rng.normal(size=(len(names), 300))
    columns = {name: values + (name != "random") * flipped for name, values in zip(names, noise, strict=True)}
    columns[DENSE_INSTEAD] = columns[WITHOUT]
    for name in (FUSION, LATENTS):
        columns[name] = columns[name] + strength * flipped
    subset = np.where(np.arange(300) < 150, "a", "b")
    facts = {"pair_id": [str(i) for i in range(300)], "group": groups, "axis": "safety", "subset": subset, "flipped": flipped}
    return pd.DataFrame({**facts, **columns})


def test_gaps_say_no_more_than_the_cells_can_tell() -> None:
    def cell(n_seeds: int, strength: float) -> list[Any]:
        frames = [frame(seed, strength=2.0) for seed in range(n_seeds)]
        for seed, one in enumerate(frames):
            noise = np.random.default_rng(seed + 50).normal(size=len(one))
            one[RETRAINED] = noise + strength * one.flipped if strength else one[FUSION]
        return frames

    cells = {"weaker": cell(3, 1.0), "same": cell(3, 0.0), "stronger": cell(3, 9.0), "without": [frame(0, 2.0)]}
    found = {one.cell: one for one in gaps(cells, FUSION)}
    assert set(found) == {"weaker", "same", "stronger"}
    assert (found["same"].estimate, found["same"].lo, found["same"].hi) == (0.0, 0.0, 0.0)
    assert {name: one.said for name, one in found.items()} == {
        "weaker": "not worse by 0.02",
        "same": "not worse by 0.02",
        "stronger": "worse by more than 0.02",
    }
    raw = next(one for one in gaps({"weaker": cells["weaker"]}, FUSION))
    assert found["weaker"].p_worse_allowed == pytest.approx(3 * raw.p_worse_allowed)  # smallest of three
    assert found["weaker"].lo <= found["weaker"].estimate <= found["weaker"].hi
    near = {"near": [one.assign(**{RETRAINED: one[FUSION] + 0.3 * one.flipped}) for one in cell(1, 0.0)]}
    assert gaps(near, FUSION)[0].said == "open"
    assert "| weaker | 3 | +" in gap_tables(cells)


def test_ratios_are_paired_and_cover_their_estimate() -> None:
    frames = [frame(seed, strength=2.0) for seed in range(3)]
    better = ratio(frames, FUSION, WITHOUT)
    assert 1 < better.lo < better.estimate < better.hi
    same = ratio(frames, WITHOUT, DENSE_INSTEAD)
    assert (same.estimate, same.lo, same.hi) == (1.0, 1.0, 1.0)


_MEASURE = {"value": 0.05, "lo": 0.04, "hi": 0.06}
_WHOLE = {"share": 0.1, "constant": 0.09, "brier": _MEASURE, "ece": _MEASURE, "ece_chance": 0.01}
_WHOLE |= {"n_above_half": 8, "flipped_above_half": 6}
FACTS = {
    "probabilities": {
        FUSION: {"share": 0.1, "lo": 0.05, "hi": 0.2, "reliability": {"": _WHOLE}},
        WITHOUT: {"kind": "rank", "reason": "too few"},
    }
}


def test_the_table_shows_means_and_spreads(tmp_path: Path) -> None:
    frames = [frame(seed, strength=2.0) for seed in range(2)]
    for seed, one in enumerate(frames):
        (tmp_path / "uniform-0.1" / f"seed-{seed}").mkdir(parents=True)
        one.to_parquet(tmp_path / "uniform-0.1" / f"seed-{seed}" / "scores.parquet")
    text = markdown_table(tmp_path)
    macros = [figures(one, FUSION).macro for one in frames]
    assert f"| {FUSION} | {np.mean(macros):.3f} ± {np.std(macros, ddof=1):.3f} |" in text
    assert text.index("| random |") < text.index(f"| {FUSION} |")
    assert f"- {FUSION} / {WITHOUT}:" in text
    assert f"- {LATENTS} / {DENSE}:" in text
    for seed in range(2):
        (tmp_path / "uniform-0.1" / f"seed-{seed}" / "facts.json").write_text(json.dumps(FACTS))
    kept = keep(tmp_path, tmp_path / "kept" / "records")
    text = markdown_table(tmp_path)
    assert markdown_table(tmp_path / "kept" / "records") == markdown_table(tmp_path)
    assert not {"pair_id", "prompt"} & set(pd.read_parquet(kept[0]).columns)
    other = frames[1].drop(columns=PAPER)
    other.to_parquet(tmp_path / "uniform-0.1" / "seed-1" / "scores.parquet")
    with pytest.raises(SpecError, match="seed-1 has other rows than seed-0"):
        markdown_table(tmp_path)
    assert "  - fusion: share 0.100 [0.050, 0.200]; all: 0.100 flipped, Brier 0.050 [0.040, 0.060] (constant 0.090)" in text
    assert "  - fusion without the SAE: a rank: too few" in text
    (tmp_path / "empty").mkdir()
    assert markdown_table(tmp_path / "empty") == "no cell has scores yet"


def test_the_target_margin_takes_margins_of_a_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "data.jsonl", CLEAN)
    scores = length_scores(CLEAN)
    lines = (json.dumps({"pair_id": name, "reward_margin": value}) + "\n" for name, value in scores.items())
    (tmp_path / "edits.jsonl").write_text("".join(lines))
    given: dict[str, Any] = {
        "data": tmp_path / "data.jsonl", "base": tmp_path, "evaluation": None, "max_length": 64, "epochs": 1, "lr": None,
        "dtype": "auto", "device": "cpu", "audit": {}, "retrain": False,
    }  # fmt: skip
    cell = Cell(tmp_path / "cells", "margin", 0.1, 0)
    with pytest.raises(click.UsageError, match="needs --margins"):
        flip(cell, Setup(**given))
    flip(cell, Setup(**given, margins=tmp_path / "edits.jsonl"))
    truth = json.loads(cell.truth.read_text())
    assert truth["target"] == "margin"
    expected = flip_groups(CLEAN, 0.1, seed=0, scores=scores)
    assert read_rows(cell.data) == expected.rows
