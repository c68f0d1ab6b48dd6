"""Stage `pairs`, run as the pipeline runs it: files, counts that add up, refusals; preview and tokenizer loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safer_engine.artifacts import PairSet
from safer_engine.errors import DatasetRefused, Interrupted, ModelRefused
from safer_engine.events import NullObserver
from safer_engine.pair_tables import survey, write_pairs
from safer_engine.preview import preview
from safer_engine.science.messages import Message
from safer_engine.science.pair_formats import read_pairs, recognise
from safer_engine.science.pairs import candidate, prompt_keys
from safer_engine.science.rendering import make_renderer
from safer_engine.sources.datasets import resolve_dataset
from safer_engine.sources.resolved import ResolvedDataset, ResolvedInputs, ResolvedModel
from safer_engine.sources.tokenizers import load_renderer, usable_length
from safer_engine.spec import AuditSpec, DatasetSpec, MemorySource, ModelSpec
from safer_engine.stage import Inputs, SpecView, StageContext, cache_key
from safer_engine.stages.pairs import PairsStage
from safer_engine.store import LocalArtifactStore, ManifestDraft
from tests.helpers.tiny_model import CHATML, build_tokenizer

Row = dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ResolvedModel:
    folder = tmp_path_factory.mktemp("model")
    build_tokenizer(folder, "llama", CHATML)
    return ResolvedModel(folder, "digest", str(folder))


class Watcher(NullObserver):
    """Keeps what it is told; asks to stop after `stop_after` progress reports."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.notes: list[str] = []
        self.reports: list[float] = []
        self.stop_after = stop_after

    def note(self, stage: str, message: str) -> None:
        self.notes.append(message)

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        self.reports.append(done / total)

    def cancelled(self) -> bool:
        return self.stop_after is not None and len(self.reports) >= self.stop_after


def in_memory(rows: list[Row]) -> ResolvedDataset:
    return resolve_dataset(DatasetSpec(source=MemorySource()), rows)


def run(
    store: Path,
    resolved: ResolvedModel,
    rows: list[Row],
    observer: Watcher | None = None,
    seed: int = 0,
    **sections: dict[str, Any],
) -> PairSet:
    document: dict[str, Any] = {"model": {"path": str(resolved.path)}, "dataset": {"min_pairs": 2}, "seed": seed}
    for name, section in sections.items():
        document[name] = {**document.get(name, {}), **section}
    document["dataset"]["source"] = {"kind": "memory"}
    spec = AuditSpec.model_validate(document)
    sources = ResolvedInputs(resolved, in_memory(rows))
    stage, artifacts = PairsStage(), LocalArtifactStore(store)
    key = cache_key(stage, spec, sources, {}, "default")
    with artifacts.open_work("pairs", key) as work:
        view = SpecView(spec, stage.reads)
        context = StageContext("pairs", view, spec.runtime, sources, work, observer or Watcher(), spec.seed)
        draft = stage.run(context, Inputs({}))
        return PairSet(artifacts.commit("pairs", key, work, ManifestDraft(stage.version, "PairSet", draft.meta)))


def plain(n: int, axis: str = "chat") -> list[Row]:
    return [{"prompt": f"Question {i}?", "chosen": f"Good answer {i}.", "rejected": "No.", "axis": axis} for i in range(n)]


MIXED: list[Row] = [
    {"id": "a", "prompt": "How?", "chosen": "So. 🙌", "rejected": "Not so.", "group": "g", "axis": "safety", "subset": "s"},
    {"id": "b", "prompt": "How?", "chosen": "Not so.", "rejected": "So. 🙌", "group": "g", "axis": "safety"},
    {"id": "c", "prompt": "Why?", "chosen": "", "rejected": "Because."},
    {"id": "d", "prompt": "Why?", "chosen": "Same.", "rejected": "Same."},
    {"id": "e", "prompt": "When?", "chosen": "Now.", "rejected": 3},
    {
        "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}],
        "chosen": "You.",
        "rejected": "I.",
    },
    {"prompt": "Who are you?", "chosen": "x", "rejected": "y", "strength": 2, "annotators": [1, -2]},
    {"prompt": "Who are you?", "chosen": "x", "rejected": "y"},
]


def test_files_of_a_mixed_dataset(tmp_path: Path, model: ResolvedModel) -> None:
    watcher = Watcher()
    pairs = run(tmp_path, model, MIXED, observer=watcher)
    table = pairs.pairs.to_pylist()
    assert [row["pair_id"] for row in table[:2]] == ["a", "b"]
    assert [row["row"] for row in table] == [0, 1, 5, 6]
    assert [row["both_orders"] for row in table] == [True, True, False, False]
    assert [(row["group"], row["axis"], row["subset"]) for row in table[:2]] == [("g", "safety", "s"), ("g", "safety", "all")]
    assert table[2]["prompt"] == "System: Be kind.\n\nHuman: Who?"
    assert (table[3]["strength"], table[3]["annotators"], table[2]["strength"]) == (2.0, [1, -2], None)
    rows = pairs.rows.to_pylist()
    assert [row["row"] for row in rows] == list(range(8))
    reasons = [None, None, "empty_side", "identical_sides", "malformed", None, None, "duplicate"]
    assert [row["reason"] for row in rows] == reasons
    assert [row["status"] for row in rows] == ["not_scored" if reason else "scored" for reason in reasons]
    assert len({row["pair_id"] for row in rows}) == 8
    by_row = {row["row"]: row for row in rows}
    assert all(by_row[row["row"]]["content_digest"] == row["content_digest"] for row in table)
    health = pairs.health["dataset"]
    assert (health["n_in"], health["n_kept"]) == (8, 4)
    assert health["dropped"] == {"malformed": 1, "empty_side": 1, "identical_sides": 1, "duplicate": 1}
    assert health["groups"] == "partly given"
    assert "row 5: int where text" in health["examples"][0]
    assert set(pairs.health) == {"dataset"}
    assert watcher.reports[-1] == 1
    assert "kept 4 of 8 pairs" in watcher.notes[0]


def test_tokens_in_the_table_are_the_renderer_s(tmp_path: Path, model: ResolvedModel) -> None:
    pairs = run(tmp_path, model, plain(300))
    renderer = load_renderer(model.path, ModelSpec(path=str(model.path)))
    table = pairs.pairs.to_pylist()
    assert len(table) == 300, "more than one record batch"
    for row in (table[0], table[255], table[256], table[299]):
        for name in ("chosen", "rejected"):
            side = renderer.side((Message("user", row["prompt"].removeprefix("Human: ")),), row[name])
            assert row[f"{name}_text"] == side.text
            assert row[f"{name}_ids"] == side.ids.tolist()
            assert np.array_equal(np.reshape(row[f"{name}_offsets"], (-1, 2)), side.offsets)
            assert row[f"{name}_special"] == side.special.tolist()
            assert (row[f"{name}_start"], row[f"{name}_end"]) == (side.start, side.end)
    assert pairs.meta["tokens"] == sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in table)
    assert (pairs.meta["n_pairs"], pairs.meta["axes"], pairs.meta["template"]) == (300, {"chat": 300}, "chat")


def test_drops_found_while_rendering(tmp_path: Path, model: ResolvedModel) -> None:
    start = "The same long beginning of an answer, word by word, over and over again. "
    rows = [
        *plain(4),
        {"prompt": "p", "chosen": start + "yes", "rejected": start + "no"},
        {"prompt": "x " * 99, "chosen": "a", "rejected": "b"},
    ]
    right = run(tmp_path, model, rows, model={"max_length": 40, "truncation_side": "right"}).health["dataset"]
    assert right["dropped"] == {"over_long": 1, "identical_after_truncation": 1}
    drop = run(tmp_path, model, rows, model={"max_length": 40, "truncation_side": "drop"}).health["dataset"]
    assert drop["dropped"] == {"over_long": 2}
    left = run(tmp_path, model, rows, model={"max_length": 40}).health["dataset"]
    assert left["dropped"] == {}
    assert left["sides_truncated"] == 4


def test_prompts_of_all_rows_are_kept_whatever_becomes_of_the_pairs(tmp_path: Path, model: ResolvedModel) -> None:
    rows = [
        *plain(8),
        {"prompt": "Why?", "chosen": "", "rejected": "Because."},
        {"prompt": "When?", "chosen": "Now.", "rejected": 3},
    ]
    whole, sample = run(tmp_path / "1", model, rows), run(tmp_path / "2", model, rows, dataset={"sample": 4})
    assert (whole.meta["n_pairs"], sample.meta["n_pairs"]) == (8, 4)
    readable = read_pairs(rows[:9], recognise(rows[:9], "auto", {}, "safer"))
    assert whole.prompt_keys == sample.prompt_keys == prompt_keys(candidate(pair) for pair in readable)
    assert len(whole.prompt_keys) == 9
    other = [{**row, "prompt": f"\n{row['prompt'].upper()} "} for row in rows]
    assert run(tmp_path / "3", model, other).prompt_keys == whole.prompt_keys


def test_a_sample_can_be_drawn_again(tmp_path: Path, model: ResolvedModel) -> None:
    rows = plain(30) + [{**row, "prompt": row["prompt"] + "!"} for row in plain(30, "safety")]
    sample = {"sample": 10, "stratify": "axis"}
    first = run(tmp_path / "1", model, rows, dataset=sample)
    again = run(tmp_path / "2", model, rows, dataset=sample)
    other = run(tmp_path / "3", model, rows, dataset=sample, seed=1)
    assert first.stored.manifest.content_digest == again.stored.manifest.content_digest
    assert first.pairs["pair_id"].to_pylist() != other.pairs["pair_id"].to_pylist()
    assert first.meta["axes"] == {"chat": 5, "safety": 5}
    assert first.health["dataset"]["dropped"] == {"sampled_out": 50}


def test_best_of_n_rows_have_one_line_each(tmp_path: Path, model: ResolvedModel) -> None:
    rows = [{"id": n, "prompt": f"Question {n}?", "chosen": ["Yes."], "rejected": ["No.", "Never.", "Yes."]} for n in range(3)]
    pairs = run(tmp_path, model, rows)
    assert pairs.pairs["pair_id"].to_pylist() == ["0#1", "0#2", "1#1", "1#2", "2#1", "2#2"]
    assert pairs.pairs["item"].to_pylist() == ["0/1", "0/1", "1/1", "1/1", "2/1", "2/1"]
    assert pairs.rows["pair_id"].to_pylist() == ["0", "1", "2"]
    assert set(pairs.rows["status"].to_pylist()) == {"scored"}
    assert pairs.health["dataset"]["n_rows"] == 3
    assert pairs.health["dataset"]["dropped"] == {"identical_sides": 3}


@pytest.mark.parametrize(
    ("rows", "dataset", "words"),
    [
        (plain(19), {"min_pairs": 20}, r"19 usable pairs of 19, fewer than 20 \(dropped: nothing"),
        ([*plain(1), *MIXED[2:4]], {}, r"1 usable pairs of 3, fewer than 2 \(dropped: 1 empty side, 1 identical sides\)"),
        ([{"prompt": "p", "chosen": 1, "rejected": 2}] * 3 + plain(2), {}, "3 of 5 pairs are malformed.*row 1: int"),
        ([], {}, "no rows"),
        (plain(9), {"stratify": "length", "sample": 4}, "stratified by 'length'"),
        ([{**row, "prompt": [{"role": "tool", "content": "x"}]} for row in plain(4)], {"format": "anthropic"}, "malformed"),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, model: ResolvedModel, rows: list[Row], dataset: dict[str, Any], words: str) -> None:
    with pytest.raises(DatasetRefused, match=words) as caught:
        run(tmp_path, model, rows, dataset=dataset)
    assert caught.value.hint


def test_a_template_that_takes_few_of_the_conversations(tmp_path: Path) -> None:
    strictly = "{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    template = "{% for m in messages %}" + strictly + "<{{ m.content }}>{% endfor %}"
    build_tokenizer(tmp_path / "model", "llama", template)
    strict = ResolvedModel(tmp_path / "model", "digest", "strict")
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}]
    refused = [{**row, "prompt": [system[0], {"role": "user", "content": row["prompt"]}]} for row in plain(3)]
    some = run(tmp_path, strict, [*plain(5), *refused]).health["dataset"]
    assert some["dropped"] == {"unrenderable": 3}
    assert "no system turns" in some["examples"][0]
    with pytest.raises(DatasetRefused, match="3 of 5 pairs are unrenderable.*no system turns"):
        run(tmp_path, strict, [*plain(2), *refused])


def test_stopping_on_request_commits_nothing(tmp_path: Path, model: ResolvedModel) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path, model, plain(600), observer=Watcher(stop_after=1))
    assert not list((tmp_path / "blobs").glob("*/*"))
    assert run(tmp_path, model, plain(600)).pairs.num_rows == 600


@pytest.mark.parametrize(
    "later",
    [
        plain(3),
        plain(5),
        plain(4)[::-1],
        [*plain(3), {"prompt": "Question 3?", "chosen": 4, "rejected": "No."}],
        [{"prompt": "p", "chosen": ["a"], "rejected": ["b", "c"]}, *plain(2)],
    ],
)  # fmt: skip
def test_a_dataset_that_changes_while_it_is_read_is_refused(tmp_path: Path, model: ResolvedModel, later: list[Row]) -> None:
    versions = iter([plain(4), plain(4), later])
    changing = ResolvedDataset("digest", "changing", lambda: iter(next(versions)))
    surveyed = survey(changing, DatasetSpec(source=MemorySource(), format="rewardbench"), seed=0)
    renderer = load_renderer(model.path, ModelSpec(path=str(model.path)))
    with pytest.raises(DatasetRefused, match="changed while it was read"):
        write_pairs(tmp_path / "pairs.arrow", changing, surveyed, renderer, lambda n: None)


def test_preview_marks_the_response(model: ResolvedModel) -> None:
    spec, rows = DatasetSpec(source=MemorySource()), [{"prompt": "p", "chosen": "", "rejected": "x"}, *plain(2)]
    shown = preview(model, ModelSpec(path=str(model.path)), in_memory(rows), spec)
    assert (shown.row, shown.layout, shown.template) == (2, "trl", "chat")
    assert shown.chosen.marked.startswith("<|im_start|>user\nQuestion 0?<|im_end|>\n<|im_start|>assistant\n⟦")
    assert shown.chosen.marked.replace("·", "").endswith("⟦Good answer 0.<|im_end|>\n⟧")
    assert 0 < shown.rejected.response_tokens < shown.chosen.response_tokens < shown.chosen.tokens
    with pytest.raises(DatasetRefused, match="none of the first 1 rows"):
        preview(model, ModelSpec(path=str(model.path)), in_memory(rows[:1]), spec)


def test_sequences_never_exceed_the_model_s_positions(tmp_path: Path, model: ResolvedModel) -> None:
    assert usable_length(tmp_path, 1024) == 1024, "no config, no limit of its own"
    for config, expected in (
        ({"max_position_embeddings": 512}, 512),
        ({"max_position_embeddings": 514, "model_type": "roberta", "pad_token_id": 1}, 512),
        ({"max_position_embeddings": 131072}, 1024),
        ({"n_positions": 256}, 256),
        ({"text_config": {"max_position_embeddings": 300}}, 300),
        ({"max_position_embeddings": None}, 1024),
        ({"max_position_embeddings": -1}, 1024),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert usable_length(tmp_path, 1024) == expected
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64, "model_type": "llama"}')
    build_tokenizer(tmp_path, "llama")
    assert load_renderer(tmp_path, ModelSpec(path=str(tmp_path))).max_length == 64


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="can't be loaded"):
        load_renderer(tmp_path, ModelSpec(path=str(tmp_path)))


def test_special_tokens_follow_the_spec(model: ResolvedModel) -> None:
    bos = make_renderer(load_renderer(model.path, ModelSpec(path="x")).tokenizer, 64).tokenizer.bos_token_id
    prefixes = [
        load_renderer(model.path, ModelSpec(path="x", add_special_tokens=choice)).prefix for choice in ("auto", True, False)
    ]
    assert prefixes == [(), (bos,), ()]


def test_pairs_of_a_single_group_are_refused(tmp_path: Path, model: ResolvedModel) -> None:
    rows = [{**row, "group": "g"} for row in plain(6)]
    with pytest.raises(DatasetRefused, match=r"all 6 usable pairs are of one prompt group.*at least two groups"):
        run(tmp_path, model, rows)
