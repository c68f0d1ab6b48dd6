"""The report's figures against planted ones; partial audits; the stage and its files."""

import dataclasses
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from safer_engine import pipeline
from safer_engine.api import run_request
from safer_engine.artifacts import (
    Absent,
    Activations,
    Artifact,
    Edits,
    EvaluationSet,
    Labels,
    Latents,
    PairScores,
    PairSet,
    SparseAutoencoder,
)
from safer_engine.errors import ArtifactError, NumericalError, ResourceError, SaferError
from safer_engine.events import NullObserver
from safer_engine.out_folder import RECORD, OutFolder
from safer_engine.pipeline import AuditRequest
from safer_engine.report.build import STAGE_ARTIFACTS, ReportRequest, build_report
from safer_engine.report.columns import by_id, histogram, scalars
from safer_engine.report.html import render_html
from safer_engine.report.interim import interim_reports, write_interim, write_stopped
from safer_engine.report.model import Estimate, Measured, ReportDocument
from safer_engine.report.summary import cautions
from safer_engine.report.tables import features_table, write_evaluation
from safer_engine.stage import Inputs, SpecView, Stage, StageContext
from safer_engine.stages.report import ReportStage
from safer_engine.store import LocalArtifactStore, ManifestDraft
from tests.helpers import fake_artifacts
from tests.helpers.fake_artifacts import FakeAudit
from tests.helpers.fake_pairs import DROPPED, N_CANDIDATES, N_LATENTS, actions_of, margins_of, scores_of

NOW = "2026-01-02T03:04:05Z"
EVALUATION: dict[str, Any] = {"evaluation": {"source": {"kind": "local", "path": "data/eval.jsonl"}}}


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> FakeAudit:
    return fake_artifacts.build(tmp_path_factory.mktemp("store"), **EVALUATION)


@pytest.fixture(scope="module")
def report(audit: FakeAudit) -> ReportDocument:
    return _build(audit)


def _build(audit: FakeAudit, found: dict[type[Artifact], Artifact | Absent] | None = None) -> ReportDocument:
    return build_report(ReportRequest(audit.spec, audit.sources, audit.found if found is None else found, NOW))


def _row(rows: list[Measured], axis: str | None, subset: str | None = None) -> Measured:
    return next(row for row in rows if (row.axis, row.subset) == (axis, subset))


@pytest.mark.parametrize(
    ("axis", "subset"), [(None, None), ("safety", None), ("chat", None), ("safety", "harmless"), ("safety", "refusals")]
)
def test_accuracy_and_margin_are_those_of_the_planted_margins(
    audit: FakeAudit, report: ReportDocument, axis: str | None, subset: str | None
) -> None:
    assert report.reward_model is not None
    assert report.evaluation is not None
    for rows, pairs, strength in (
        (report.reward_model.on_audited_pairs, audit.rows, 0.9),
        (report.evaluation.groups, audit.evaluation, 0.75),
    ):
        margins = np.array(margins_of(pairs, strength))
        kept = np.array([axis in (None, row["axis"]) and subset in (None, row["subset"]) for row in pairs])
        found = _row(rows, axis, subset)
        assert found.accuracy.estimate == pytest.approx((margins[kept] > 0).mean())
        assert found.margin.estimate == pytest.approx(margins[kept].mean())
        assert found.accuracy.n == kept.sum()
        assert found.accuracy.n_groups == len({row["group"] for row, k in zip(pairs, kept, strict=True) if k})
        _assert_holds(found.accuracy)
        _assert_holds(found.margin)


def _assert_holds(estimate: Estimate) -> None:
    assert estimate.lo is not None
    assert estimate.hi is not None
    assert estimate.lo < estimate.estimate < estimate.hi


def test_data_health_adds_up(audit: FakeAudit, report: ReportDocument) -> None:
    data = report.dataset
    assert data is not None
    assert data.health.dropped == DROPPED
    assert data.health.n_in == len(audit.rows) + sum(DROPPED.values())
    assert data.n_pairs == len(audit.rows)
    assert sum(data.axes.values()) == data.n_pairs
    assert data.health.facts == {"layout": "trl", "groups": "given", "n_rows": data.health.n_in, "sides_truncated": 3}
    longer = [len(row["chosen"]) > len(row["rejected"]) for row in audit.rows]
    assert data.longer_chosen == pytest.approx(np.mean(longer))


def test_margin_histograms_count_every_pair_once(audit: FakeAudit, report: ReportDocument) -> None:
    assert report.reward_model is not None
    by_slice = {(part.axis, part.subset): part.histogram for part in report.reward_model.margins}
    assert set(by_slice) == {("chat", None), ("safety", None), ("safety", "harmless"), ("safety", "refusals")}
    assert sum(by_slice["chat", None].counts) + sum(by_slice["safety", None].counts) == len(audit.rows)
    below = sum(n for n, end in zip(by_slice["safety", None].counts, by_slice["safety", None].edges[1:], strict=True) if end <= 0)
    pairs = zip(audit.rows, margins_of(audit.rows, 0.9), strict=True)
    assert below == sum(margin < 0 for row, margin in pairs if row["axis"] == "safety")


def test_features_begin_with_safety_features_then_go_by_salience(report: ReportDocument) -> None:
    features = report.features
    assert features is not None
    assert len(features) == N_CANDIDATES
    assert [f.latent_id for f in features[:8]] == list(range(8))
    assert all(f.safety_feature for f in features[:8])
    rest = features[8:]
    assert not any(f.safety_feature for f in rest)
    assert [f.rank for f in rest] == sorted(f.rank for f in rest)
    first = features[0]
    assert first.explanation is not None
    assert first.explanation.text == "refuses and offers a safer way"
    assert (first.rating, first.fires_on) == (5, "chosen")
    assert features[3].fires_on == "rejected"
    assert features[3].salience == pytest.approx(-0.70)
    assert [part.subset for part in first.subsets] == ["harmless", "refusals", "chat-easy"]


def test_contexts_stand_on_as_many_features_as_the_spec_shows(audit: FakeAudit, report: ReportDocument) -> None:
    features = report.features
    assert features is not None
    assert [len(f.contexts) for f in features] == [6] * 32 + [0] * (N_CANDIDATES - 32)
    context = features[0].contexts[0]
    assert context.activation == max(a for a in context.activations if a is not None) == context.activations[context.focus]
    assert "".join(context.tokens).split()[0] == "User:"


def test_the_overview_holds_every_latent_once(report: ReportDocument) -> None:
    assert report.sae is not None
    latents = report.sae.latents
    assert latents is not None
    assert latents.n_latents == N_LATENTS
    assert sum(map(sum, latents.overview.counts)) + latents.overview.silent == N_LATENTS
    assert latents.overview.silent == len(range(20, N_LATENTS, 21))
    assert report.sae.density is not None
    assert sum(report.sae.density.counts) == N_LATENTS


def test_suspicious_pairs_are_the_recommended_ones_first(audit: FakeAudit, report: ReportDocument) -> None:
    edits = report.edits
    assert edits is not None
    actions = actions_of(audit.rows)
    assert edits.actions is not None
    assert edits.actions["drop"] == sum(action == "drop" for action in actions.values())
    assert edits.actions["keep"] == sum(action == "keep" for action in actions.values()) + sum(DROPPED.values())
    assert edits.not_scored == DROPPED
    assert [pair.action for pair in edits.pairs] == [actions[pair.pair_id] for pair in edits.pairs]
    order = [("drop", "review", "keep").index(str(pair.action)) for pair in edits.pairs]
    assert order == sorted(order)
    assert {pair.pair_id for pair in edits.pairs[:4]} <= audit.planted
    known = {score["pair_id"]: score for score in scores_of(audit.rows)}
    first = edits.pairs[0]
    assert first.suspicion == known[first.pair_id]["suspicion"]
    assert first.signals == {"latents": known[first.pair_id]["signal_latents"], "margin": known[first.pair_id]["signal_margin"]}
    assert [e.latent_id for e in first.evidence] == [0, 3, 4]
    assert edits.signals == {"latents": 2.0, "margin": 1.0}


def test_each_axis_has_its_own_edits(audit: FakeAudit, report: ReportDocument) -> None:
    assert report.edits is not None
    rows = {(row.axis, row.subset): row for row in report.edits.by_axis}
    assert rows["safety", None].not_scored == sum(DROPPED.values())
    assert rows["safety", None].n == sum(row["axis"] == "safety" for row in audit.rows) + sum(DROPPED.values())
    assert rows["chat", None].actions["drop"] == round(0.04 * rows["chat", None].n)


def test_stage_names_and_types_are_the_pipelines() -> None:
    assert tuple((stage.name, stage.produces) for stage in pipeline.STAGES[:-1]) == STAGE_ARTIFACTS
    assert pipeline.STAGES[-1].consumes == tuple(kind for _, kind in STAGE_ARTIFACTS)


def test_results_appear_as_they_come(audit: FakeAudit) -> None:
    found: dict[type[Artifact], Artifact | Absent] = {}
    seen = []
    for name, kind in STAGE_ARTIFACTS:
        found[kind] = audit.found[kind]
        report = _build(audit, found)
        sections = ("dataset", "reward_model", "evaluation", "sae", "features", "edits")
        seen.append((name, sum(getattr(report, section) is not None for section in sections)))
        progress = report.provenance.progress
        assert (progress.done if progress else len(STAGE_ARTIFACTS)) == len(found)
    assert [n for _, n in seen] == [1, 2, 3, 4, 5, 5, 5, 5, 6, 6, 6, 6, 6]


def test_what_is_not_there_yet_says_so(audit: FakeAudit) -> None:
    found: dict[type[Artifact], Artifact | Absent] = {kind: audit.found[kind] for kind in (PairSet, Activations)}
    report = _build(audit, found)
    assert report.sae is None
    assert report.provenance.not_computed["sae"] == "not computed yet"
    assert report.provenance.progress is not None
    assert report.provenance.progress.following == "evaluation"
    assert {record.stage: record.state for record in report.provenance.stages}["edits"] == "pending"


def test_absent_stages_give_their_reasons(audit: FakeAudit, report: ReportDocument) -> None:
    reasons = report.provenance.not_computed
    assert reasons["verification"] == "no model was retrained on the edited data"
    assert reasons["features[].causal_effect"] == "causal effects were not asked for"
    assert "evaluation" not in reasons
    without = _build(audit, {**audit.found, Labels: Absent("labels were switched off"), Edits: Absent("no edits wanted")})
    assert without.provenance.not_computed["features[].safety_feature"] == "labels were switched off"
    assert without.provenance.not_computed["edits.actions"] == "no edits wanted"
    assert without.features is not None
    assert {f.safety_feature for f in without.features} == {None}
    assert without.edits is not None
    assert without.edits.actions is None


def test_without_an_evaluation_set_the_reason_is_that(tmp_path: Path) -> None:
    audit = fake_artifacts.build(tmp_path)
    sources = type(audit.sources)(model=audit.sources.model, dataset=audit.sources.dataset)
    for found in (audit.found, {kind: value for kind, value in audit.found.items() if kind is not EvaluationSet}):
        report = build_report(ReportRequest(audit.spec, sources, found, NOW))
        assert report.evaluation is None
        assert report.provenance.not_computed["evaluation"] == "no evaluation set was given"
        assert not any("evaluation" in caution.text for caution in cautions(report))


def test_an_evaluation_set_without_a_usable_pair_is_a_caution(tmp_path: Path) -> None:
    why = "none of the 7 evaluation pairs is usable (dropped: in_training_data 7)"
    audit = fake_artifacts.build(tmp_path, **EVALUATION)
    report = _build(audit, {**audit.found, EvaluationSet: Absent(why)})
    assert report.evaluation is None
    assert report.dataset is not None
    assert report.dataset.evaluation_health is None
    assert report.provenance.not_computed["evaluation"] == why
    assert any(why in caution.text for caution in cautions(report))
    assert "in_training_data 7" in render_html(report)


def test_few_evaluation_pairs_are_measured_and_flagged(tmp_path: Path, report: ReportDocument) -> None:
    assert report.evaluation is not None
    assert (report.evaluation.n_pairs, report.evaluation.too_few) == (90, False)
    assert not any("evaluation pairs, fewer" in caution.text for caution in cautions(report))
    audit = fake_artifacts.build(tmp_path, groups=14, **EVALUATION)
    few = _build(audit, audit.found)
    assert few.evaluation is not None
    assert (few.evaluation.n_pairs, few.evaluation.min_pairs, few.evaluation.too_few) == (13, 20, True)
    assert few.evaluation.groups[0].accuracy.n == 13
    said = [caution.text for caution in cautions(few)]
    assert "There are only 13 evaluation pairs, fewer than 20: figures on them are unsure." in said
    assert not any("margins have learnt" in text for text in said), "13 pairs do not show that"


def test_only_the_timing_block_differs_between_identical_audits(tmp_path: Path, audit: FakeAudit, report: ReportDocument) -> None:
    other = fake_artifacts.build(tmp_path, seconds=99.0, unplanned=("sae", "edits"), **EVALUATION)
    again = build_report(ReportRequest(other.spec, other.sources, other.found, "2030-01-01T00:00:00Z"))
    one, two = report.model_dump(mode="json"), again.model_dump(mode="json")
    assert one["provenance"].pop("timing") != two["provenance"].pop("timing")
    assert one == two


def test_what_was_planned_stands_beside_what_it_took(report: ReportDocument) -> None:
    timing = report.provenance.timing
    plans = [cost.planned for cost in timing.stages]
    assert len(plans) == 8
    assert all(plan is not None and plan.model_dump() == fake_artifacts.PLANNED.model_dump() for plan in plans)
    assert timing.planned is not None
    assert timing.planned.model_dump() == {
        "seconds": 60.0,
        "peak_memory_bytes": 700_000_000,
        "peak_gpu_bytes": None,
        "disk_bytes": 16_000_000,
    }
    assert timing.peak_memory_bytes == 512 << 20
    assert timing.disk_bytes == sum(cost.disk_bytes for cost in timing.stages) > 10_000
    assert all(cost.unplanned is None for cost in timing.stages)


def test_a_stage_without_a_plan_says_so_and_there_is_no_total(tmp_path: Path) -> None:
    audit = fake_artifacts.build(tmp_path, unplanned=("pairs",))
    timing = build_report(ReportRequest(audit.spec, audit.sources, audit.found, NOW)).provenance.timing
    assert [cost.stage for cost in timing.stages if cost.planned is None] == ["pairs"]
    assert timing.stages[0].unplanned == "it was computed without a plan"
    assert timing.planned is None


def test_runtime_stands_in_the_timing_block_only(report: ReportDocument) -> None:
    assert "runtime" not in report.spec
    assert report.provenance.timing.runtime["batch_tokens"] == 8192
    assert report.provenance.timing.total_seconds == pytest.approx(sum(c.seconds for c in report.provenance.timing.stages))


def test_provenance_names_keys_and_digests(audit: FakeAudit, report: ReportDocument) -> None:
    record = next(record for record in report.provenance.stages if record.stage == "sae")
    stored = audit.found[SparseAutoencoder]
    assert isinstance(stored, Artifact)
    assert (record.cache_key, record.content_digest) == (stored.stored.manifest.key, stored.stored.manifest.content_digest)
    assert report.provenance.inputs["dataset"].digest == audit.sources.dataset.digest
    assert record.machine["versions"] == {"torch": "2.13.0"}


def test_artifacts_that_do_not_belong_together_are_refused(tmp_path: Path, audit: FakeAudit) -> None:
    larger = fake_artifacts.build(tmp_path, groups=120)
    with pytest.raises(ArtifactError, match=r"pair-\d+.*no reward_chosen"):
        _build(audit, {PairSet: larger.found[PairSet], Activations: audit.found[Activations]})


def test_without_text_no_text_is_held(tmp_path: Path) -> None:
    audit = fake_artifacts.build(tmp_path, report={"text": False}, **EVALUATION)
    report = _build(audit)
    dumped = report.model_dump_json()
    for row in audit.rows:
        assert row["chosen"] not in dumped
        assert row["prompt"] not in dumped
    assert report.features is not None
    assert all(not f.contexts and f.explanation is None and not f.terms and f.direction is None for f in report.features)
    assert report.provenance.text_included is False
    assert report.edits is not None
    assert report.edits.pairs[0].prompt is None
    latents, labels = audit.found[Latents], audit.found[Labels]
    assert isinstance(latents, Latents)
    assert isinstance(labels, Labels)
    assert not {"explanation", "terms", "direction"} & set(features_table(latents, labels, text=False).column_names)


def test_long_texts_are_clipped_and_say_so(tmp_path: Path) -> None:
    audit = fake_artifacts.build(tmp_path, long_text=100_000, report={"pairs": 1000})
    report = _build(audit)
    assert report.edits is not None
    pair = next(pair for pair in report.edits.pairs if pair.pair_id == "pair-0000")
    assert pair.chosen is not None
    assert len(pair.chosen.text) == 6_000
    assert pair.chosen.omitted == len(audit.rows[0]["chosen"]) - 6_000


def test_columns_join_by_id_and_refuse_what_is_not_finite() -> None:
    table = pa.table({"pair_id": ["b", "a"], "v": [2.0, 1.0]})
    assert by_id(table, ["a", "b", "a"], "v") == [1.0, 2.0, 1.0]
    with pytest.raises(ArtifactError, match="'c' has no v"):
        by_id(table, ["c"], "v")
    assert scalars({"a": 1, "b": {"c": True, "d": [1]}, "e": "x" * 400}) == {"a": 1, "b.c": True, "e": "x" * 300}
    with pytest.raises(NumericalError, match=r"b\.c is inf"):
        scalars({"b": {"c": float("inf")}})
    assert histogram([-5.0, 0.5, 9.0], np.array([0.0, 1.0, 2.0])).counts == [2, 1]


def test_the_stage_writes_its_files(tmp_path: Path, audit: FakeAudit, report: ReportDocument) -> None:
    names = {"report.json", "report.html", "report.md", "evaluation.jsonl", "features.parquet", "pair_scores.parquet"}
    key = "0" * 64
    with audit.store.open_work("report", key) as work:
        stage = ReportStage()
        context = StageContext(
            stage="report",
            spec=SpecView(audit.spec, stage.reads),
            runtime=audit.spec.runtime,
            sources=audit.sources,
            work=work,
            observer=NullObserver(),
            base_seed=audit.spec.seed,
        )
        draft = stage.run(context, Inputs({kind: audit.found[kind] for kind in stage.consumes}))
        assert {path.name for path in work.payload.iterdir()} == names
        written = ReportDocument.model_validate_json(work.path("report.json").read_bytes())
        lines = [json.loads(line) for line in work.path("evaluation.jsonl").read_text().splitlines()]
        features = parquet.read_table(work.path("features.parquet"))
        scores = parquet.read_table(work.path("pair_scores.parquet"))
    assert draft.meta["not_computed"] == report.provenance.not_computed
    timing = {"timing": report.provenance.timing}
    assert written.model_copy(update={"provenance": written.provenance.model_copy(update=timing)}) == report
    expected = margins_of(audit.evaluation, 0.75)
    assert [line["pair_id"] for line in lines] == [row["pair_id"] for row in audit.evaluation]
    assert [line["margin"] for line in lines] == pytest.approx(expected)
    assert set(lines[0]) == {"pair_id", "group", "axis", "subset", "style", "margin", "longer_by"}
    words = [len(row["chosen"].split()) - len(row["rejected"].split()) for row in audit.evaluation]
    assert [line["longer_by"] for line in lines] == words
    assert features.column("rank").to_pylist() == list(range(1, N_CANDIDATES + 1))
    by_latent = {row["latent_id"]: row for row in features.to_pylist()}
    assert by_latent[3]["explanation"] == "step-by-step instructions for something harmful"
    assert by_latent[3]["safety_rank"] == 4
    assert scores.num_rows == len(audit.rows)


def test_the_report_reads_what_it_prints() -> None:
    assert "runtime" not in ReportStage.reads
    assert {"preset", "seed", "model", "report", "edits"} <= set(ReportStage.reads)


def test_an_interim_report_replaces_files_and_leaves_none_behind(tmp_path: Path, audit: FakeAudit) -> None:
    found: dict[type[Artifact], Artifact | Absent] = {kind: audit.found[kind] for kind in (PairSet, Activations, EvaluationSet)}
    out = tmp_path / "out"
    write_interim(AuditRequest(audit.spec, audit.sources), found, OutFolder(out))
    assert {path.name for path in out.iterdir()} == {"report.json", "report.html", "report.md", "evaluation.jsonl", RECORD}
    assert "Unfinished audit: 3 of 13 stages are finished" in (out / "report.html").read_text()
    write_interim(AuditRequest(audit.spec, audit.sources), {**audit.found}, OutFolder(out))
    assert "Unfinished audit" not in (out / "report.html").read_text()
    assert (out / "pair_scores.parquet").is_file()
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == [RECORD]


def test_an_interim_report_removes_the_files_of_an_older_audit(tmp_path: Path, audit: FakeAudit) -> None:
    folder = OutFolder(tmp_path)
    for name in ("edits.jsonl", "features.parquet", "pair_scores.parquet", "evaluation.jsonl", "sae/sae.json"):
        with folder.publish(name) as path:
            path.write_text("older")
    (tmp_path / "mine.txt").write_text("older")
    found: dict[type[Artifact], Artifact | Absent] = {kind: audit.found[kind] for kind in (PairSet, Activations, EvaluationSet)}
    write_interim(AuditRequest(audit.spec, audit.sources), found, folder)
    kept = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert kept == {"report.json", "report.html", "report.md", "evaluation.jsonl", "mine.txt", RECORD}
    assert (tmp_path / "evaluation.jsonl").read_text() != "older"


def test_a_stopped_audit_says_where_and_why(tmp_path: Path, audit: FakeAudit) -> None:
    request = AuditRequest(audit.spec, audit.sources)
    found: dict[type[Artifact], Artifact | Absent] = {kind: audit.found[kind] for kind in (PairSet, Activations, EvaluationSet)}
    error = ResourceError("the disk is <full>", "free 3 GB")
    write_stopped(request, found, OutFolder(tmp_path), error)
    assert not list(tmp_path.iterdir())
    write_interim(request, found, OutFolder(tmp_path))
    write_stopped(request, found, OutFolder(tmp_path), error)
    page = (tmp_path / "report.html").read_text()
    assert "Stopped at sae:</strong> the disk is &lt;full&gt;. free 3 GB" in page
    assert "Unfinished audit" not in page
    assert "> Stopped at sae: the disk is &lt;full&gt;. free 3 GB" in (tmp_path / "report.md").read_text()
    progress = json.loads((tmp_path / "report.json").read_text())["provenance"]["progress"]
    expected = {"done": 3, "total": 13, "following": "sae", "stopped": "the disk is <full>. free 3 GB"}
    assert progress == expected
    write_interim(request, audit.found, OutFolder(tmp_path))
    finished = (tmp_path / "report.html").read_text()
    write_stopped(request, found, OutFolder(tmp_path), error)
    assert (tmp_path / "report.html").read_text() == finished


def _request_that_fails_at_activations(audit: FakeAudit, store: LocalArtifactStore) -> AuditRequest:
    """Its pairs are committed, and its model is not there."""
    request = AuditRequest(audit.spec, dataclasses.replace(audit.sources, evaluation=None))
    key = pipeline.plan(request, store)[0].key
    pairs = audit.found[PairSet]
    assert key is not None
    assert isinstance(pairs, PairSet)
    with store.open_work("pairs", key) as work:
        for name in pairs.stored.manifest.files:
            with work.publish(name) as path:
                path.write_bytes(pairs.path(name).read_bytes())
        manifest = pairs.stored.manifest
        store.commit("pairs", key, work, ManifestDraft(manifest.stage_version, manifest.artifact, manifest.meta))
    return request


def test_a_run_that_fails_leaves_a_report_that_says_so(tmp_path: Path, audit: FakeAudit) -> None:
    store, out = LocalArtifactStore(tmp_path / "store"), tmp_path / "out"
    request = _request_that_fails_at_activations(audit, store)
    with pytest.raises(SaferError) as raised:
        run_request(request, store, out, on_artifact=interim_reports(request, store, out))
    progress = json.loads((out / "report.json").read_text())["provenance"]["progress"]
    assert progress["following"] == "activations"
    assert progress["stopped"].startswith(raised.value.message)
    assert "Stopped at activations" in (out / "report.html").read_text()


def test_what_keeps_the_report_from_being_written_masks_no_error(tmp_path: Path, audit: FakeAudit) -> None:
    store, out = LocalArtifactStore(tmp_path / "store"), tmp_path / "out"
    request = _request_that_fails_at_activations(audit, store)
    write = interim_reports(request, store, out)

    def spoil(stage: Stage, found: pipeline.Found) -> None:
        write(stage, found)
        (out / "report.json").write_text("{")

    with pytest.raises(SaferError) as raised:
        run_request(request, store, out, on_artifact=spoil)
    assert "model" in str(raised.value)
    assert (out / "report.json").read_text() == "{"


def test_interim_reports_are_written_only_where_there_is_something_to_wait_for(tmp_path: Path, audit: FakeAudit) -> None:
    empty = LocalArtifactStore(tmp_path / "store")
    written = interim_reports(AuditRequest(audit.spec, audit.sources), empty, tmp_path / "out")
    stages = {stage.name: stage for stage in pipeline.STAGES}
    written(stages["causal"], {stages["causal"].produces: Absent("switched off")})
    written(stages["verification"], dict(audit.found))
    assert not (tmp_path / "out").exists()
    written(stages["pairs"], {PairSet: audit.found[PairSet]})
    assert "1 of 13 stages are finished" in (tmp_path / "out" / "report.html").read_text()


def test_a_stage_that_will_be_skipped_is_not_waited_for(tmp_path: Path, audit: FakeAudit) -> None:
    store = LocalArtifactStore(tmp_path / "store")
    request = AuditRequest(audit.spec, audit.sources)
    pairs, activations = pipeline.STAGES[:2]
    for stage in (pairs, activations):
        key = pipeline.plan(request, store)[pipeline.STAGES.index(stage)].key
        assert key is not None
        with store.open_work(stage.name, key) as work:
            with work.publish("x") as path:
                path.write_text(stage.name)
            store.commit(stage.name, key, work, ManifestDraft(stage_version=1, artifact=stage.produces.__name__, meta={}))
    written = interim_reports(request, store, tmp_path / "out")
    written(pairs, {PairSet: audit.found[PairSet]})
    assert not (tmp_path / "out").exists()
    written(activations, {PairSet: audit.found[PairSet], Activations: audit.found[Activations]})
    assert (tmp_path / "out" / "report.html").is_file()


def test_an_absent_evaluation_is_reported_and_not_waited_for(tmp_path: Path, audit: FakeAudit) -> None:
    request = AuditRequest(audit.spec, dataclasses.replace(audit.sources, evaluation=None))
    store = LocalArtifactStore(tmp_path / "store")
    stages = {stage.name: stage for stage in pipeline.STAGES}
    written = interim_reports(request, store, tmp_path / "out")
    found: dict[type[Artifact], Artifact | Absent] = {kind: audit.found[kind] for kind in (PairSet, Activations)}
    written(stages["activations"], found)
    assert not (tmp_path / "out").exists(), "it is absent at once, and the report after it says more"
    written(stages["evaluation"], {**found, EvaluationSet: Absent("no evaluation set was given")})
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Unfinished audit: 3 of 13 stages are finished" in page


def test_a_margin_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    rows = {"pair_id": ["a"], "group": ["g"], "axis": ["all"], "subset": ["all"], "style": pa.array([None], pa.string())}
    rows |= {f"{side}_{end}": [5] for side in ("chosen", "rejected") for end in ("start", "end")}
    rewards = pa.table({"pair_id": ["a"], "reward_chosen": [float("inf")], "reward_rejected": [0.0]})
    with pytest.raises(NumericalError, match="the margin of a"):
        write_evaluation(tmp_path / "evaluation.jsonl", pa.table(rows), rewards)


def test_pairs_without_a_suspicion_are_not_ranked(tmp_path: Path, audit: FakeAudit) -> None:
    scores = audit.found[PairScores]
    assert isinstance(scores, PairScores)
    table = scores.scores
    values = table.column("suspicion").to_pylist()
    values[8] = None

    class Partial(PairScores):
        scores = table.set_column(table.column_names.index("suspicion"), "suspicion", pa.array(values, pa.float64()))

    report = _build(audit, {**audit.found, PairScores: Partial(scores.stored)})
    assert report.edits is not None
    assert report.edits.n_scored == len(audit.rows) - 1
    assert table.column("pair_id")[8].as_py() not in {pair.pair_id for pair in report.edits.pairs}


def test_publish_is_any_context_manager(tmp_path: Path, audit: FakeAudit) -> None:
    from contextlib import nullcontext

    from safer_engine.report.write import write_report

    def publish(name: str) -> AbstractContextManager[Path]:
        return nullcontext(tmp_path / name)

    document = write_report(ReportRequest(audit.spec, audit.sources, {}, NOW), publish)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.html", "report.md"}
    assert document.dataset is None
    assert document.provenance.progress is not None
    assert document.provenance.progress.done == 0
