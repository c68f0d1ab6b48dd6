"""The stage `edits` and the lines of edits.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from safer_engine.artifacts import PairScores, PairSet
from safer_engine.edit_files import ApplyRequest, apply_edits, undo_edits
from safer_engine.edit_lines import FIELDS, read_edit_lines
from safer_engine.errors import ArtifactError, InputRefused
from safer_engine.sources.datasets import resolve_dataset
from safer_engine.sources.resolved import ResolvedInputs, ResolvedModel
from safer_engine.spec import DatasetSpec, LocalSource
from safer_engine.stages.edits import EditsStage
from safer_engine.stages.pairs import PairsStage
from tests.helpers.score_artifacts import ScoreArtifacts
from tests.helpers.tiny_model import build_tokenizer

N_ROWS = 60


def score_table(pair_ids: list[str], suspicion: list[float | None], axis: str = "safety") -> pa.Table:
    """A pair score table with one signal and one piece of evidence per pair."""
    n = len(pair_ids)
    item = pa.struct([("latent_id", pa.int32()), ("contribution", pa.float64())])
    return pa.table(
        {
            "pair": pa.array(range(n), pa.int32()),
            "pair_id": pair_ids,
            "group": ["g"] * n,
            "axis": [axis] * n,
            "subset": ["all"] * n,
            "reward_margin": np.linspace(-1, 1, n),
            "pair_score": pa.array([None] * n, pa.float64()),
            "suspicion": pa.array(suspicion, pa.float64()),
            "suspicion_kind": ["rank"] * n,
            "suspicion_base": [None] * n,
            "disputed_by": pa.array([[]] * n, pa.list_(pa.string())),
            "signal_margin": pa.array([None if s is None else -s for s in suspicion], pa.float64()),
            "evidence": pa.array([[{"latent_id": 3, "contribution": -0.25}]] * n, pa.list_(item)),
        }
    )


def row_table(statuses: list[str], axis: str | None = "safety") -> pa.Table:
    n = len(statuses)
    return pa.table(
        {
            "row": pa.array(range(n), pa.int64()),
            "pair_id": [f"r{i}" for i in range(n)],
            "content_digest": [f"d{i}" for i in range(n)],
            "group": pa.array(["g" if s == "scored" else None for s in statuses], pa.string()),
            "axis": pa.array([axis if s == "scored" else None for s in statuses], pa.string()),
            "subset": ["all"] * n,
            "status": statuses,
            "reason": pa.array([None if s == "scored" else "duplicate" for s in statuses], pa.string()),
        }
    )


def pair_table(rows: list[int], both: tuple[int, ...] = ()) -> pa.Table:
    counts: dict[int, int] = {}
    ids = []
    for row in rows:
        counts[row] = counts.get(row, 0) + 1
        ids.append(f"r{row}" if rows.count(row) == 1 else f"r{row}#{counts[row]}")
    return pa.table({"pair_id": ids, "row": pa.array(rows, pa.int64()), "both_orders": [row in both for row in rows]})


def run(root: Path, pairs: pa.Table, rows: pa.Table, scores: pa.Table, spec: dict[str, Any] | None = None) -> tuple[Any, list]:
    made = ScoreArtifacts(root)
    found = {
        PairSet: made.pairs(pairs, rows),
        PairScores: made.commit("pair_scores", PairScores, {"pair_scores.arrow": scores}),
    }
    edits = made.run(EditsStage(), found, {"edits": spec or {}})
    return edits, [json.loads(line) for line in edits.path("edits.jsonl").read_text().splitlines()]


def test_one_line_per_input_row_in_order_with_all_fields(tmp_path: Path) -> None:
    statuses = ["scored"] * N_ROWS
    statuses[5] = "not_scored"
    kept = [i for i in range(N_ROWS) if i != 5]
    scores = score_table([f"r{i}" for i in kept], [i / N_ROWS for i in kept])
    edits, lines = run(tmp_path, pair_table(kept), row_table(statuses), scores)
    assert [line["pair_id"] for line in lines] == [f"r{i}" for i in range(N_ROWS)]
    assert all(tuple(line) == FIELDS for line in lines)
    assert [line["action"] for line in lines][-5:] == ["keep", "review", "review", "drop", "drop"]
    assert lines[5] | {"signals": {}} == dict.fromkeys(FIELDS) | {
        "pair_id": "r5", "content_digest": "d5", "status": "not_scored", "reason": "duplicate", "action": "keep",
        "signals": {}, "evidence": [],
    }  # fmt: skip
    last = lines[-1]
    assert last["suspicion"] == 59 / 60
    assert last["suspicion_kind"] == "rank"
    assert last["signals"] == {"margin": -59 / 60}
    assert last["evidence"] == [{"latent_id": 3, "contribution": -0.25}]
    assert last["reward_margin"] == 1.0
    assert last["pair_score"] is None
    assert edits.meta["actions"] == {"keep": 56, "review": 2, "drop": 2}
    assert edits.meta["statuses"] == {"scored": 59, "not_scored": 1}


def test_a_row_with_several_pairs_takes_its_most_doubtful(tmp_path: Path) -> None:
    rows = [0, 0, 0, *range(1, 30)]
    pairs = pair_table(rows)
    suspicion: list[float | None] = [0.1, 0.99, None, *[0.5] * 29]
    _, lines = run(tmp_path, pairs, row_table(["scored"] * 30), score_table(pairs["pair_id"].to_pylist(), suspicion))
    assert lines[0]["suspicion"] == 0.99
    assert lines[0]["action"] == "drop"
    assert lines[0]["pair_id"] == "r0"
    assert len(lines) == 30


def test_both_orders_are_for_review_with_the_reason(tmp_path: Path) -> None:
    ids = [f"r{i}" for i in range(50)]
    _, lines = run(
        tmp_path,
        pair_table(list(range(50)), both=(2, 7)),
        row_table(["scored"] * 50),
        score_table(ids, [i / 50 for i in range(50)]),
    )
    assert [i for i, line in enumerate(lines) if line["reason"] == "both_orders"] == [2, 7]
    assert lines[2]["action"] == lines[7]["action"] == "review"


def test_flip_is_written_only_when_allowed(tmp_path: Path) -> None:
    ids = [f"r{i}" for i in range(50)]
    arguments = (pair_table(list(range(50))), row_table(["scored"] * 50), score_table(ids, [i / 50 for i in range(50)]))
    edits, lines = run(tmp_path, *arguments, {"allow_flip": True, "budget": 0.1})
    assert [line["action"] for line in lines].count("flip") == 5
    assert edits.meta["axes"] == {"safety": {"keep": 40, "review": 5, "flip": 5}}


def test_rows_without_a_suspicion_are_kept_and_hold_no_kind(tmp_path: Path) -> None:
    ids = [f"r{i}" for i in range(30)]
    _, lines = run(tmp_path, pair_table(list(range(30))), row_table(["scored"] * 30), score_table(ids, [None] * 30))
    assert {line["action"] for line in lines} == {"keep"}
    assert {line["suspicion_kind"] for line in lines} == {None}


def test_artifacts_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    rows = row_table(["scored"] * 3)
    with pytest.raises(ArtifactError, match="no pair of it has a score"):
        run(tmp_path / "a", pair_table([0, 1]), rows, score_table(["r0", "r1"], [0.1, 0.2]))
    with pytest.raises(ArtifactError, match="not in the pair set"):
        run(tmp_path / "b", pair_table([0, 1]), rows, score_table(["r0", "other"], [0.1, 0.2]))


def test_lines_are_read_back(tmp_path: Path) -> None:
    ids = [f"r{i}" for i in range(50)]
    edits, lines = run(
        tmp_path,
        pair_table(list(range(50)), both=(3,)),
        row_table(["scored"] * 50),
        score_table(ids, [i / 50 for i in range(50)]),
    )
    found = read_edit_lines(edits.path("edits.jsonl"))
    assert [line.action for line in found] == [line["action"] for line in lines]
    assert [line.suspicion for line in found] == [line["suspicion"] for line in lines]
    assert [i for i, line in enumerate(found) if line.both_orders] == [3]


GOOD = dict.fromkeys(FIELDS) | {"pair_id": "a", "content_digest": "d", "axis": "x", "status": "scored", "action": "keep"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "lacks pair_id"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "evidence"}), "lacks evidence"),
        (json.dumps(GOOD | {"action": "burn"}), "'burn' is not one of keep, review, drop, flip"),
        (json.dumps(GOOD | {"status": "maybe"}), "status 'maybe'"),
        (json.dumps(GOOD | {"suspicion": 1.5}), "neither null nor in"),
        (json.dumps(GOOD | {"suspicion": "high"}), "neither null nor in"),
        (json.dumps(GOOD | {"suspicion": True}), "neither null nor in"),
        ("", "has no lines"),
    ],
)
def test_a_line_that_is_not_one_of_ours_is_refused_by_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(line and json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(InputRefused, match=message) as caught:
        read_edit_lines(path)
    assert not line or "edits.jsonl:2" in caught.value.message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="cannot read"):
        read_edit_lines(tmp_path / "none.jsonl")


def test_edits_of_an_audited_file_apply_to_it(tmp_path: Path) -> None:
    """From the file through the stages that name its rows, and back to the file."""
    data, out = tmp_path / "data.jsonl", tmp_path / "clean.jsonl"
    values = [{"prompt": f"question {i}", "chosen": f"answer {i}", "rejected": f"reply {i}"} for i in range(30)]
    values[3] = values[2]
    values[7] = {"prompt": "question 7", "chosen": "same", "rejected": "same"}
    data.write_text("".join(json.dumps(value) + "\n" for value in values))
    spec = DatasetSpec(source=LocalSource(path=str(data)))
    build_tokenizer(tmp_path / "rm", "llama")
    sources = ResolvedInputs(ResolvedModel(tmp_path / "rm", "0", "rm"), resolve_dataset(spec))
    made = ScoreArtifacts(tmp_path / "store")
    audited: PairSet = made.run(PairsStage(), {}, {"dataset": spec.model_dump()}, sources)
    ids = audited.pairs["pair_id"].to_pylist()
    assert len(ids) == 28
    scores = made.commit(
        "pair_scores", PairScores, {"pair_scores.arrow": score_table(ids, [i / 28 for i in range(28)], axis="all")}
    )
    edits = made.run(EditsStage(), {PairSet: audited, PairScores: scores}, {"edits": {"budget": 0.1}})
    lines = [json.loads(line) for line in edits.path("edits.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines if line["status"] == "not_scored"] == ["duplicate", "identical_sides"]
    result = apply_edits(ApplyRequest(edits.path("edits.jsonl"), spec, out))
    assert (result.n_rows, result.dropped, result.left) == (30, 2, {"review": 2})
    assert [json.loads(line) for line in out.read_text().splitlines()] == values[:28]
    undo_edits(out)
    assert out.read_bytes() == data.read_bytes()
