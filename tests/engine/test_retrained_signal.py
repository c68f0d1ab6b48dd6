"""The signal `retrained`: from margins out of fold to suspicion, into the spec, the plan and the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from safer_engine.artifacts import Absent, Activations, Labels, Latents, PairSet, RetrainedMargins
from safer_engine.errors import ArtifactError, NumericalError, SpecError
from safer_engine.pipeline import STAGES, StagePlan
from safer_engine.planning import AuditSize, ModelSize, Workload, estimate_of
from safer_engine.rates import MATMUL, rate_name
from safer_engine.report.build import ReportRequest, build_report
from safer_engine.report.html import render_html
from safer_engine.report.markdown import render_markdown
from safer_engine.science.pair_scoring import ScoringParams, score_pairs
from safer_engine.science.signals import retrained_doubt
from safer_engine.science.stats import average_precision
from safer_engine.signal_inputs import by_fold_scale, signal_inputs
from safer_engine.spec import AuditSpec, RuntimeSpec, SuspicionSpec
from safer_engine.spec_layers import Layer, build_spec
from safer_engine.spec_retraining import RetrainingSpec
from safer_engine.spec_signals import DEFAULT_SIGNALS, DEFAULT_SIGNALS_RETRAINED
from safer_engine.stages.pair_scores import PairScoresStage
from tests.helpers.fake_artifacts import FakeAudit, build
from tests.helpers.planted_pairs import planted_pairs
from tests.helpers.score_artifacts import ScoreArtifacts, pair_tables

PLANTED = planted_pairs(0, n_groups=250, n_latents=50, informative=12)
N_PAIRS = len(PLANTED.flipped)


def out_of_fold() -> np.ndarray:
    """Margins of a model that never saw the labels: they follow the truth."""
    truth = np.where(PLANTED.flipped, -1.0, 1.0)
    return np.asarray(1.5 * truth + np.random.default_rng(1).normal(0, 0.8, N_PAIRS))


def retrained(made: ScoreArtifacts, margins: np.ndarray) -> RetrainedMargins:
    order = np.random.default_rng(2).permutation(len(margins))
    table = pa.table(
        {
            "pair": pa.array(order, pa.int32()),
            "pair_id": [f"p{i}" for i in order],
            "fold": pa.array(order % 2, pa.int32()),
            "margin": pa.array(margins[order], pa.float64(), mask=np.isnan(margins[order])),
        }
    )
    found: RetrainedMargins = made.commit("retraining", RetrainedMargins, {"retrained.arrow": table}, {"folds": 2})
    return found


class TestSignal:
    def test_doubt_is_minus_the_margin_and_none_where_it_was_not_read(self) -> None:
        assert retrained_doubt(np.asarray([2.0, -0.5, np.nan])).tolist() == [-2.0, 0.5, 0.0]
        with pytest.raises(NumericalError):
            retrained_doubt(np.asarray([np.inf, 1.0]))

    def test_models_of_other_scale_count_alike(self) -> None:
        scaled = by_fold_scale(np.asarray([3.0, 40.0, -4.0, np.nan, -30.0, 0.0]), np.asarray([0, 1, 0, 0, 1, 2]))
        size = 5 / np.sqrt(2)
        np.testing.assert_allclose(scaled, [3 / size, 40 / (10 * size), -4 / size, np.nan, -30 / (10 * size), 0.0])

    def test_alone_it_tells_a_probability_and_finds_what_the_audited_margin_hides(self) -> None:
        inputs = replace(PLANTED.inputs, retrained_P=out_of_fold())
        alone = score_pairs(inputs, ScoringParams({"retrained": 1.0}))
        hidden = score_pairs(inputs, ScoringParams({"margin": 1.0}))
        assert alone.doubts["safety"].kind == "probability"
        assert alone.doubts["safety"].share == pytest.approx(PLANTED.flipped.mean(), abs=0.05)
        assert hidden.doubts["safety"].kind == "rank"
        found = [average_precision(PLANTED.flipped, each.suspicion_P) for each in (alone, hidden)]
        assert found[0] > 0.8
        assert found[1] < 0.4

    def test_beside_the_latents_the_fusion_stays_a_probability(self) -> None:
        inputs = replace(PLANTED.inputs, retrained_P=out_of_fold())
        scoring = score_pairs(inputs, ScoringParams(dict(DEFAULT_SIGNALS_RETRAINED)))
        assert scoring.doubts["safety"].kind == "probability"
        latents = score_pairs(inputs, ScoringParams(dict(DEFAULT_SIGNALS)))
        both, one = (average_precision(PLANTED.flipped, each.suspicion_P) for each in (scoring, latents))
        assert both > one

    def test_without_margins_it_is_left_out_and_said(self) -> None:
        scoring = score_pairs(PLANTED.inputs, ScoringParams({"latents": 1.0, "retrained": 1.0}))
        assert scoring.left_out == {"retrained": "no model was retrained"}


class TestStage:
    @pytest.fixture
    def world(self, tmp_path: Path) -> tuple[ScoreArtifacts, dict[Any, Any]]:
        made = ScoreArtifacts(tmp_path)
        found: dict[Any, Any] = {
            PairSet: made.pairs(*pair_tables(PLANTED.inputs)),
            Activations: made.activations(PLANTED.inputs, {}, 4),
            Latents: made.latents(PLANTED.inputs, np.linspace(-0.5, 0.5, 50)),
            Labels: made.labels(list(range(20)), [1, 4]),
        }
        return made, found

    def test_it_is_a_column_joined_by_pair(self, world: tuple[ScoreArtifacts, dict[Any, Any]]) -> None:
        made, found = world
        margins = out_of_fold()
        margins[3] = np.nan
        scores = made.run(PairScoresStage(), {**found, RetrainedMargins: retrained(made, margins)}, {"retraining": {"base": "b"}})
        column = scores.scores["signal_retrained"].to_numpy()
        scaled = by_fold_scale(margins, np.arange(len(margins), dtype=np.int32) % 2)
        np.testing.assert_allclose(column, -np.nan_to_num(scaled))
        assert scores.meta["signals"]["retrained"] == {"weight": 0.5, "used": True}
        assert set(scores.scores["suspicion_kind"].to_pylist()) == {"probability"}

    def test_absent_nothing_changes(self, world: tuple[ScoreArtifacts, dict[Any, Any]]) -> None:
        made, found = world
        scores = made.run(PairScoresStage(), {**found, RetrainedMargins: Absent("not asked for")})
        assert [name for name in scores.scores.column_names if name.startswith("signal_")] == ["signal_knn", "signal_latents"]

    def test_margins_of_other_pairs_are_refused(self, world: tuple[ScoreArtifacts, dict[Any, Any]]) -> None:
        made, found = world
        short = retrained(made, out_of_fold()[:-1])
        with pytest.raises(ArtifactError, match="cover"):
            signal_inputs(found[PairSet], found[Activations], found[Latents], found[Labels], retrained=short)


def built(**sections: Any) -> AuditSpec:
    return build_spec([Layer("test", {"model": "org/rm", "dataset": "org/pairs", **sections})]).spec


class TestSpec:
    def test_it_joins_the_default_fusion_and_what_is_named_wins(self) -> None:
        assert built().suspicion.signals == DEFAULT_SIGNALS
        assert built(retraining={"base": "b"}).suspicion.signals == DEFAULT_SIGNALS_RETRAINED
        mine = built(retraining={"base": "b"}, suspicion={"signals": {"latents": 2.0}})
        assert mine.suspicion.signals == {"latents": 2.0}
        assert built(retraining={"base": "b"}, preset="paper").suspicion.signals == {"paper": 1.0}
        kept = built(retraining={"base": "b"}, suspicion={"folds": 4}).suspicion
        assert (kept.folds, kept.signals) == (4, DEFAULT_SIGNALS_RETRAINED)

    def test_in_python_too_and_a_dumped_spec_is_read_as_itself(self) -> None:
        plain = built()
        spec = AuditSpec(
            model=plain.model, dataset=plain.dataset, retraining=RetrainingSpec(base="b"), suspicion=SuspicionSpec(folds=3)
        )
        assert spec.suspicion.signals == DEFAULT_SIGNALS_RETRAINED
        assert AuditSpec.model_validate(spec.model_dump(mode="json")) == spec

    @pytest.mark.parametrize(
        ("sections", "said"),
        [
            ({"retraining": {"folds": 2}}, "give retraining.base"),
            ({"retraining": {"base": "b", "folds": 1}}, "give 2 to 5 folds"),
            ({"retraining": {"base": "b", "folds": 6}}, "give 2 to 5 folds"),
            ({"retraining": {"base": "b", "fold": 2}}, "known here: base, folds, lora, recipe"),
            ({"retraining": {"base": "b", "recipe": {"epochs": 0}}}, "retraining.recipe.epochs"),
            ({"suspicion": {"signals": {"retrained": 1.0}}}, "give section retraining with a base"),
        ],
    )
    def test_what_is_wrong_is_said_with_what_to_do(self, sections: dict[str, Any], said: str) -> None:
        with pytest.raises(SpecError) as caught:
            built(**sections)
        assert said in caught.value.message


class TestPlan:
    BASE = ModelSize(d_in=384, n_blocks=6, body_parameters=10_000_000, parameters=22_000_000, weight_bytes=88_000_000)
    LOAD = Workload(5000, 100, 1_000_000 + 20_000, 20_000, 500_000, exact=True, positions_exact=True)

    def of(self, tmp_path: Path, base: ModelSize | None, **retraining: Any) -> Any:
        spec = built(retraining={"base": "b", **retraining} if retraining else None, runtime={"device": "cpu"})
        rates = tmp_path / "rates.json"
        rates.write_text(f'{{"{rate_name(MATMUL, spec)}": 1e12}}')
        planned = tuple(StagePlan(stage.name, stage.resource, None, "compute") for stage in STAGES)
        return estimate_of(spec, AuditSize(self.LOAD, self.BASE, None, base), planned, rates)

    def test_work_is_that_of_the_trainings(self, tmp_path: Path) -> None:
        two, five = (self.of(tmp_path, self.BASE, folds=folds).stages["retraining"] for folds in (2, 5))
        assert two.work == pytest.approx(10_000_000 * 1_000_000 * (6 * 2 * 1 + 2))
        assert five.work == pytest.approx(10_000_000 * 1_000_000 * (6 * 2 * 4 + 2))
        assert two.seconds == pytest.approx(two.work / 0.3e12 + 4.0)
        assert two.memory_bytes > 22_000_000 * 16
        assert two.resource == "gpu"

    def test_not_asked_for_it_costs_nothing_and_an_unknown_base_is_said(self, tmp_path: Path) -> None:
        off = self.of(tmp_path, None).stages["retraining"]
        assert (off.work, off.seconds) == (0.0, 0.0)
        unknown = self.of(tmp_path, None, folds=2)
        assert unknown.stages["retraining"].seconds is None
        assert unknown.total.seconds is None

    def test_a_size_travels_as_json_and_older_ones_lack_the_base(self) -> None:
        size = AuditSize(self.LOAD, self.BASE, None, self.BASE)
        assert AuditSize.loaded(size.dumped()) == size
        older = {name: value for name, value in size.dumped().items() if name != "base"}
        assert AuditSize.loaded(older) == replace(size, base=None)


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> FakeAudit:
    return build(tmp_path_factory.mktemp("audit"))


class TestReport:
    def test_accuracy_out_of_fold_stands_beside_the_other(self, audit: FakeAudit, tmp_path: Path) -> None:
        pairs = audit.found[PairSet]
        assert isinstance(pairs, PairSet)
        n = pairs.pairs.num_rows
        margins = np.where(np.arange(n) % 4 == 0, -1.0, 1.0)
        margins[1] = np.nan
        table = retrained_for(pairs, margins)
        made = ScoreArtifacts(tmp_path)
        found = made.commit("retraining", RetrainedMargins, {"retrained.arrow": table}, {"folds": 2})
        report = build_report(ReportRequest(audit.spec, audit.sources, {**audit.found, RetrainedMargins: found}, "now"))
        assert report.reward_model is not None
        whole = report.reward_model.retrained[0]
        assert whole.accuracy.n == n - 1
        assert whole.accuracy.estimate == pytest.approx((margins[np.isfinite(margins)] > 0).mean())
        page = render_html(report)
        assert "By models that did not see them" in page
        assert "cannot read 1 of the pairs" in page
        assert "by models trained without them" in render_markdown(report)

    def test_without_retraining_nothing_of_it_is_shown(self, audit: FakeAudit) -> None:
        report = build_report(ReportRequest(audit.spec, audit.sources, audit.found, "now"))
        assert report.reward_model is not None
        assert report.reward_model.retrained == []
        assert "By models that did not see them" not in render_html(report)
        record = next(record for record in report.provenance.stages if record.stage == "retraining")
        assert (record.state, record.reason) == ("absent", "not asked for")


def retrained_for(pairs: PairSet, margins: np.ndarray) -> pa.Table:
    return pa.table(
        {
            "pair": pa.array(np.arange(len(margins)), pa.int32()),
            "pair_id": pairs.pairs["pair_id"].combine_chunks(),
            "fold": pa.array(np.arange(len(margins)) % 2, pa.int32()),
            "margin": pa.array(margins, pa.float64(), mask=np.isnan(margins)),
        }
    )


def test_batches_of_a_training_are_half_as_large() -> None:
    from safer_engine.base_trainings import training_spec

    asked = RetrainingSpec(base="b")
    spec = training_spec(asked.base, asked.recipe, asked.lora, built().dataset, 3, RuntimeSpec(batch_tokens=1000))
    assert (spec.seed, spec.base, spec.runtime.batch_tokens) == (3, "b", 500)
