"""Stage `evaluation`: the pairs that only measure and their rewards; leakage, shortage, refusals, resuming."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from safer_engine.artifacts import Absent, Activations, Artifact, EvaluationSet, PairSet
from safer_engine.errors import DatasetRefused, Interrupted
from safer_engine.evaluation_pairs import shortage
from safer_engine.events import NullObserver
from safer_engine.pipeline import STAGES, AuditRequest, run
from safer_engine.preflight import check_evaluation
from safer_engine.sources.datasets import resolve_dataset
from safer_engine.sources.models import resolve_model
from safer_engine.sources.resolved import ResolvedDataset, ResolvedInputs
from safer_engine.spec import AuditSpec, DatasetSpec, MemorySource
from safer_engine.stage import cache_key
from safer_engine.stages.evaluation import EvaluationStage
from safer_engine.store import LocalArtifactStore
from tests.helpers.tiny_model import CHATML, build_reward_model

Row = dict[str, Any]
FIRST = STAGES[:3]


class Watcher(NullObserver):
    """Keeps what it is told; asks to stop after so many progress reports of the stage."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.notes: list[str] = []
        self.outcomes: dict[str, str] = {}
        self.reports = 0
        self.stop_after = stop_after

    def note(self, stage: str, message: str) -> None:
        if stage == "evaluation":
            self.notes.append(message)

    def stage_finished(self, stage: str, outcome: str, seconds: float) -> None:
        self.outcomes[stage] = outcome

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        self.reports += stage == "evaluation"

    def cancelled(self) -> bool:
        return self.stop_after is not None and self.reports > self.stop_after


def rows_of(n: int, word: str = "Question", **more: Any) -> list[Row]:
    return [
        {
            "id": f"{word}-{i}",
            "prompt": f"{word} {i}?",
            "chosen": f"A good answer to {i}.",
            "rejected": "No!" * (1 + i % 3),
            **more,
        }
        for i in range(n)
    ]


def in_memory(rows: list[Row]) -> ResolvedDataset:
    return resolve_dataset(DatasetSpec(source=MemorySource()), rows)


class Bench:
    """A tiny model and a store; runs of the first stages over rows in memory."""

    def __init__(self, root: Path) -> None:
        self.model = build_reward_model(root / "model", "llama", chat_template=CHATML)
        self.store = LocalArtifactStore(root / "store")

    def request(self, rows: list[Row], apart: list[Row] | None = None, **sections: Any) -> AuditRequest:
        memory = {"source": {"kind": "memory"}, "min_pairs": 2}
        document: dict[str, Any] = {"model": {"path": str(self.model), "dtype": "float32"}, "dataset": memory}
        document |= {"causal": {"pairs": 4}, "runtime": {"device": "cpu", "shard_pairs": 5}}
        document |= {"evaluation": memory} if apart is not None else {}
        for name, section in sections.items():
            document[name] = {**document.get(name, {}), **section}
        spec = AuditSpec.model_validate(document)
        other = None if apart is None else in_memory(apart)
        return AuditRequest(spec, ResolvedInputs(resolve_model(spec.model, spec.runtime, None), in_memory(rows), other))

    def run(self, request: AuditRequest, watcher: Watcher | None = None) -> dict[type[Artifact], Artifact | Absent]:
        return run(request, self.store, watcher, stages=FIRST)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def evaluation_of(found: dict[type[Artifact], Artifact | Absent]) -> EvaluationSet:
    value = found[EvaluationSet]
    assert isinstance(value, EvaluationSet), value
    return value


def reason_of(found: dict[type[Artifact], Artifact | Absent]) -> str:
    value = found[EvaluationSet]
    assert isinstance(value, Absent)
    return value.reason


def test_pairs_are_rendered_and_rewarded_as_those_of_the_dataset(bench: Bench) -> None:
    other, data = rows_of(12, "Other"), rows_of(6)
    apart = evaluation_of(bench.run(bench.request(data, other, evaluation={"min_pairs": 12})))
    as_dataset = bench.run(bench.request(other))
    pairs, activations = as_dataset[PairSet], as_dataset[Activations]
    assert isinstance(pairs, PairSet)
    assert isinstance(activations, Activations)
    assert apart.pairs.equals(pairs.pairs)
    assert apart.rewards.equals(activations.rewards)
    assert {**apart.health} == pairs.health["dataset"]
    assert (apart.meta["n_pairs"], apart.meta["min_pairs"], apart.meta["too_few"]) == (12, 12, False)
    assert apart.meta["tokens"] == pairs.meta["tokens"]


def test_rewards_are_those_of_transformers(bench: Bench) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(bench.model, dtype=torch.float32)
    apart = evaluation_of(bench.run(bench.request(rows_of(6), rows_of(7, "Other"))))
    for row, found in zip(apart.pairs.to_pylist(), apart.rewards.to_pylist(), strict=True):
        assert row["pair_id"] == found["pair_id"]
        for side in ("chosen", "rejected"):
            with torch.no_grad():
                theirs = float(model(input_ids=torch.tensor([row[f"{side}_ids"]])).logits[0, 0])
            assert found[f"reward_{side}"] == pytest.approx(theirs, abs=1e-4)


def test_without_a_set_the_stage_is_absent_and_reads_no_model(bench: Bench) -> None:
    watcher = Watcher()
    assert reason_of(bench.run(bench.request(rows_of(6)), watcher)) == "no evaluation set was given"
    assert watcher.outcomes["evaluation"] == "absent"
    assert watcher.notes == []


@pytest.mark.parametrize("sample", [None, 4])
def test_prompts_of_the_dataset_are_left_out_whether_or_not_they_were_sampled(bench: Bench, sample: int | None) -> None:
    data = rows_of(12)
    leaked = [{**row, "id": f"leak-{i}", "prompt": row["prompt"].upper(), "chosen": "Another."} for i, row in enumerate(data)]
    found = bench.run(bench.request(data, [*leaked, *rows_of(3, "Other")], dataset={"sample": sample}))
    pairs = found[PairSet]
    assert isinstance(pairs, PairSet)
    assert pairs.meta["n_pairs"] == (sample or 12)
    apart = evaluation_of(found)
    assert apart.pairs["pair_id"].to_pylist() == ["Other-0", "Other-1", "Other-2"]
    assert apart.health["dropped"] == {"in_training_data": 12}
    assert apart.health["n_in"] == 15


def test_prompts_of_unusable_rows_count_as_seen_too(bench: Bench) -> None:
    data = [*rows_of(5), {"id": "empty", "prompt": "Other 1?", "chosen": "", "rejected": "No."}]
    apart = evaluation_of(bench.run(bench.request(data, rows_of(3, "Other"))))
    assert apart.pairs["pair_id"].to_pylist() == ["Other-0", "Other-2"]


@pytest.mark.parametrize("kept", [1, 3])
def test_too_few_pairs_are_measured_with_a_warning(bench: Bench, kept: int) -> None:
    watcher = Watcher()
    rows = [*rows_of(6), *rows_of(kept, "Other")]
    apart = evaluation_of(bench.run(bench.request(rows_of(6), rows, evaluation={"min_pairs": 20}), watcher))
    assert apart.rewards.num_rows == apart.meta["n_pairs"] == kept
    assert apart.meta["too_few"]
    verb = "is" if kept == 1 else "are"
    said = [note for note in watcher.notes if note.startswith("warning")]
    assert len(said) == 1
    assert f"only {kept} of {6 + kept} evaluation pairs {verb} usable, fewer than 20 (dropped: 6 in training data)" in said[0]
    assert "prompts are not in the dataset" in said[0]
    assert "evaluation.min_pairs" in said[0]


def test_no_usable_pair_is_an_absence_that_counts_why(bench: Bench) -> None:
    watcher = Watcher()
    rows = [*rows_of(6), {"id": "e", "prompt": "Other?", "chosen": "Yes.", "rejected": " "}]
    found = bench.run(bench.request(rows_of(6), rows), watcher)
    why = "none of the 7 evaluation pairs is usable (dropped: 1 empty side, 6 in training data)"
    assert reason_of(found).startswith(why)
    assert any(note.startswith(f"warning: {why}") for note in watcher.notes)
    assert isinstance(found[Activations], Activations)


def test_pairs_that_the_template_refuses_are_dropped_however_many(bench: Bench) -> None:
    long = [{**row, "prompt": row["prompt"] * 200} for row in rows_of(6, "Other")]
    found = bench.run(bench.request(rows_of(6), long, model={"max_length": 32, "truncation_side": "drop"}))
    assert "6 over long" in reason_of(found)
    assert "raise model.max_length" in reason_of(found)


@pytest.mark.parametrize(
    ("rows", "section", "words"),
    [
        ([], {}, "no rows"),
        ([{"text": "a"}] * 5, {}, r"columns"),
        ([{"prompt": "p", "chosen": 1, "rejected": 2}] * 5, {}, "5 of 5 pairs are malformed"),
        ([*rows_of(2), *rows_of(2)], {}, "several rows have the same id"),
        (rows_of(4), {"sample": 2, "stratify": "length"}, "stratified by 'length'"),
        (rows_of(4), {"columns": {"chosen": "winner"}}, r"evaluation\.columns maps chosen to 'winner'"),
    ],
)
def test_what_cannot_be_read_is_refused_before_anything_is_computed(
    bench: Bench, rows: list[Row], section: dict[str, Any], words: str
) -> None:
    request = bench.request(rows_of(6), rows, evaluation=section)
    with pytest.raises(DatasetRefused, match=f"the evaluation set cannot be used.*{words}") as caught:
        check_evaluation(request, bench.store)
    assert "dataset." not in caught.value.hint
    with pytest.raises(DatasetRefused, match=words):
        bench.run(request)


def test_a_set_that_was_read_before_is_not_checked_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    request = bench.request(rows_of(6), rows_of(3, "Other"))
    check_evaluation(request, bench.store)
    bench.run(request)
    opened = []

    def rows() -> Any:
        opened.append(1)
        return iter(())

    assert request.sources.evaluation is not None
    unreadable = ResolvedDataset(request.sources.evaluation.digest, "gone", rows)
    check_evaluation(
        AuditRequest(request.spec, ResolvedInputs(request.sources.model, request.sources.dataset, unreadable)), bench.store
    )
    assert not opened


def test_the_digest_of_the_set_enters_the_keys_of_the_stages_that_read_it_alone(bench: Bench) -> None:
    first, other = (bench.request(rows_of(6), rows_of(n, "Other")) for n in (3, 4))
    differing = {
        stage.name
        for stage in STAGES
        if cache_key(stage, first.spec, first.sources, {}, "p") != cache_key(stage, other.spec, other.sources, {}, "p")
    }
    assert differing == {"evaluation", "report"}
    assert {stage.name for stage in STAGES if "evaluation" in stage.reads} == differing | {"verification"}  # not asked for here


def test_another_set_is_read_alone_and_twice_the_same_not_at_all(tmp_path: Path) -> None:
    bench, data = Bench(tmp_path), rows_of(6)
    bench.run(bench.request(data))
    added, changed, again = Watcher(), Watcher(), Watcher()
    bench.run(bench.request(data, rows_of(3, "Other")), added)
    bench.run(bench.request(data, rows_of(4, "Other")), changed)
    bench.run(bench.request(data, rows_of(4, "Other")), again)
    assert added.outcomes == changed.outcomes == {"pairs": "cached", "activations": "cached", "evaluation": "computed"}
    assert set(again.outcomes.values()) == {"cached"}


def test_an_interrupted_run_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    bench, stopped = Bench(tmp_path / "whole"), Bench(tmp_path / "stopped")
    data, other = rows_of(6), rows_of(23, "Other")
    whole = evaluation_of(bench.run(bench.request(data, other)))
    reports = Watcher(10**6)
    evaluation_of(Bench(tmp_path / "counted").run(bench.request(data, other), reports))
    with pytest.raises(Interrupted):
        stopped.run(stopped.request(data, other), Watcher(reports.reports // 2))
    kept = {path: path.stat().st_ino for path in (tmp_path / "stopped/store/work").rglob("eval-*.safetensors")}
    assert 0 < len(kept) < 5
    watcher = Watcher(10**6)
    resumed = evaluation_of(stopped.run(stopped.request(data, other), watcher))
    assert watcher.outcomes["evaluation"] == "computed"
    assert watcher.reports < reports.reports
    assert resumed.rewards.equals(whole.rewards)
    assert resumed.stored.manifest.content_digest == whole.stored.manifest.content_digest


def test_the_sample_is_the_same_in_every_audit_of_a_seed(bench: Bench) -> None:
    other = rows_of(20, "Other")
    drawn = [
        evaluation_of(bench.run(bench.request(rows_of(n), other, evaluation={"sample": 5}))).pairs["pair_id"].to_pylist()
        for n in (6, 7)
    ]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 5


def test_shortage_counts_and_says_what_to_do() -> None:
    counts = {"n_in": 9, "n_kept": 9, "dropped": {}}
    assert shortage(counts, 9) == ""
    assert "only 9 of 9 evaluation pairs are usable, fewer than 10 (dropped: nothing was dropped)" in shortage(counts, 10)
    sampled = {"n_in": 9, "n_kept": 4, "dropped": {"sampled_out": 5}}
    assert "draw a larger sample (evaluation.sample)" in shortage(sampled, 5)


def test_importing_the_stage_brings_no_torch() -> None:
    code = "import sys, safer_engine.stages.evaluation, safer_engine.evaluation_pairs\n"
    code += "print([name for name in ('torch', 'transformers', 'pyarrow') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "[]"


def test_the_stage_declares_what_it_reads() -> None:
    stage = EvaluationStage()
    assert (stage.reads, stage.consumes, stage.produces) == (("model", "evaluation"), (PairSet,), EvaluationSet)
    assert [each.name for each in STAGES[:3]] == ["pairs", "activations", "evaluation"]
    assert "evaluation" not in {section for each in STAGES[:2] for section in each.reads}
