"""The paper's pair score, evidence, and suspicion as the mean rank of fused signals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from safer_engine.science.evidence import no_evidence, scatter, top_contributions
from safer_engine.science.folds import group_folds
from safer_engine.science.pair_deltas import LatentSums, latent_delta
from safer_engine.science.pair_scoring import (
    PaperFeatures,
    ScoringParams,
    SignalInputs,
    cross_fitted_paper,
    missing_input,
    paper_pair_scores,
    paper_salience,
    score_pairs,
)
from safer_engine.science.signals import unit_ranks
from safer_engine.science.stats import average_precision
from safer_engine.science.suspicion import fuse_ranks
from tests.helpers.planted_pairs import planted_pairs

FUSED = {"latents": 2.0, "margin": 1.0}


def small_sums() -> LatentSums:
    """Two pairs, three latents; the figures in the tests are worked out by hand."""
    chosen = sparse.csr_array(np.asarray([[4.0, 0.0, 2.0], [0.0, 3.0, 0.0]]))
    rejected = sparse.csr_array(np.asarray([[1.0, 1.0, 0.0], [6.0, 0.0, 3.0]]))
    return LatentSums(chosen, rejected, np.asarray([[2, 1], [3, 3]]))


class TestPaper:
    def test_score_by_hand(self) -> None:
        scores = paper_pair_scores(small_sums(), PaperFeatures(np.asarray([0, 1]), np.asarray([1.0, -1.0])))
        np.testing.assert_allclose(scores, [4 / 2 - (1 / 1 - 1 / 1), -3 / 3 - 6 / 3])

    def test_a_latent_of_sign_zero_and_a_text_without_positions_count_nothing(self) -> None:
        sums = LatentSums(sparse.csr_array([[5.0, 0.0]]), sparse.csr_array([[0.0, 0.0]]), np.asarray([[5, 0]]))
        assert paper_pair_scores(sums, PaperFeatures(np.asarray([0]), np.asarray([1.0]))) == [1.0]
        assert paper_pair_scores(sums, PaperFeatures(np.asarray([0]), np.asarray([0.0]))) == [0.0]

    def test_salience_by_hand(self) -> None:
        plus, minus = np.asarray([4.0, 3.0, 2.0]), np.asarray([7.0, 1.0, 3.0])
        expected = (plus - minus) / (plus + minus + 2 * 20 / 6)
        np.testing.assert_allclose(paper_salience(small_sums()), expected)

    def test_salience_without_activations_is_zero(self) -> None:
        nothing = LatentSums(sparse.csr_array((1, 2)), sparse.csr_array((1, 2)), np.ones((1, 2), np.int64))
        np.testing.assert_array_equal(paper_salience(nothing), [0.0, 0.0])

    def test_cross_fitting_uses_the_other_fold_only(self) -> None:
        sums, folds = planted_pairs(0, n_groups=40, n_latents=30, informative=8).inputs.latents, np.repeat([0, 1], 40)
        assert sums is not None
        scores = cross_fitted_paper(sums, folds_P=folds, keep=5)
        salience = paper_salience(sums.take(np.flatnonzero(folds == 1)))
        kept = np.argsort(-np.abs(salience))[:5]
        by_hand = paper_pair_scores(sums, PaperFeatures(kept, np.sign(salience[kept])))
        np.testing.assert_allclose(scores[:40], by_hand[:40])

    def test_only_eligible_latents_are_kept(self) -> None:
        sums, folds = planted_pairs(0, n_groups=40, n_latents=30, informative=8).inputs.latents, np.repeat([0, 1], 40)
        assert sums is not None
        silent = np.flatnonzero(np.asarray(sums.chosen_PS.sum(0) + sums.rejected_PS.sum(0)).ravel() == 0)
        assert not cross_fitted_paper(sums, folds_P=folds, eligible=silent).any()

    def test_the_kept_ones_are_chosen_anew_from_the_pool(self) -> None:
        data = planted_pairs(0, n_groups=40, n_latents=30, informative=8).inputs
        assert data.latents is not None
        pool = np.arange(0, 30, 2)
        features = PaperFeatures(pool[:4], np.ones(4), pool)
        scoring = score_pairs(replace(data, paper=features), ScoringParams({"paper": 1.0}, seed=3))
        folds = group_folds((str(group) for group in data.groups_P), 5, 3)
        expected = cross_fitted_paper(data.latents, folds_P=folds, keep=4, eligible=pool)
        np.testing.assert_allclose(scoring.signals["paper"], -expected)
        assert not np.allclose(expected, cross_fitted_paper(data.latents, folds_P=folds, keep=4, eligible=pool[:4]))


class TestEvidence:
    def test_both_sides_are_listed_whatever_the_larger_terms_say(self) -> None:
        terms = np.asarray(
            [[-9.0, -8.0, -7.0, -6.0, 5.0, 4.0, 0.0], [-1.0, -2.0, -3.0, 0.0, 0.0, 0.0, 4.0], [1, 2, 3, 4, 5, 6, 7]]
        )
        found = top_contributions(sparse.csr_array(terms.astype(np.float32)), np.ones((1, 7)), np.zeros(3, np.int64), keep=4)
        np.testing.assert_allclose(found.contributions, [-9, -8, 5, 4, 4, -3, -2, -1, 7, 6, 5, 4])
        np.testing.assert_array_equal(found.latent_ids, [0, 1, 4, 5, 6, 2, 1, 0, 6, 5, 4, 3])
        np.testing.assert_array_equal(found.offsets, [0, 4, 8, 12])

    def test_largest_first_with_its_sign_and_ties_by_id(self) -> None:
        delta = sparse.csr_array(np.asarray([[1.0, -2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.5, 0.0, 3.0, 0.0]], np.float32))
        weights = np.asarray([[2.0, 3.0, 1.0, 2.0], [1.0, 1.0, -1.0, 1.0]])
        found = top_contributions(delta, weights, np.asarray([0, 0, 1]), keep=2)
        np.testing.assert_array_equal(found.offsets, [0, 2, 2, 4])
        np.testing.assert_array_equal(found.latent_ids, [1, 0, 2, 0])
        np.testing.assert_allclose(found.contributions, [-6.0, 2.0, -3.0, 0.5])

    def test_parts_are_joined_by_row(self) -> None:
        delta = sparse.csr_array(np.diag([1.0, 2.0, 3.0]).astype(np.float32))
        ones, cells = np.ones((1, 3)), np.zeros(3, np.int64)
        whole = top_contributions(delta, ones, cells, 4)
        rows = [np.asarray([2, 0]), np.asarray([1])]
        parts = [(r, top_contributions(delta[r], ones, cells[: len(r)], 4)) for r in rows]
        joined = scatter(parts, 3)
        np.testing.assert_array_equal(joined.latent_ids, whole.latent_ids)
        np.testing.assert_array_equal(joined.contributions, whole.contributions)
        np.testing.assert_array_equal(joined.offsets, whole.offsets)

    def test_no_pairs_no_evidence(self) -> None:
        np.testing.assert_array_equal(no_evidence(2).offsets, [0, 0, 0])


class TestFusion:
    def test_weighted_mean_of_ranks(self) -> None:
        doubts = {"a": np.asarray([1.0, 2.0, 3.0]), "b": np.asarray([9.0, 5.0, 5.0])}
        np.testing.assert_allclose(fuse_ranks(doubts, {"a": 2.0, "b": 1.0}, 3), [1 / 3, (2 * 0.5 + 0.25) / 3, (2 + 0.25) / 3])

    def test_a_signal_of_weight_zero_is_reported_but_not_fused(self) -> None:
        planted = planted_pairs(0, n_groups=30, n_latents=20, informative=5).inputs
        scoring = score_pairs(planted, ScoringParams({"margin": 1.0, "knn": 0.0}))
        np.testing.assert_allclose(scoring.suspicion_P, unit_ranks(-planted.margins_P))
        assert np.isfinite(scoring.signals["knn"]).all()

    def test_without_any_weight_there_is_no_suspicion(self) -> None:
        planted = planted_pairs(0, n_groups=30, n_latents=20, informative=5).inputs
        assert np.isnan(score_pairs(planted, ScoringParams({"margin": 0.0})).suspicion_P).all()

    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_planted_wrong_labels_are_found_better_than_by_the_margin(self, seed: int) -> None:
        planted = planted_pairs(seed)
        scoring = score_pairs(planted.inputs, ScoringParams(FUSED))
        found = average_precision(planted.flipped, scoring.suspicion_P)
        assert found >= 3 * planted.flipped.mean()
        assert found > 1.5 * average_precision(planted.flipped, scoring.signals["margin"])
        assert ((scoring.suspicion_P >= 0) & (scoring.suspicion_P <= 1)).all()

    def test_every_signal_of_the_spec_can_be_asked_for(self) -> None:
        planted = planted_pairs(3, n_groups=120)
        data = replace(planted.inputs, paper=PaperFeatures(np.arange(12), np.ones(12)))
        weights = dict.fromkeys(("latents", "knn", "probe_cv", "dense", "margin", "paper"), 1.0)
        scoring = score_pairs(data, ScoringParams(weights))
        assert set(scoring.signals) == set(weights)
        assert not scoring.left_out
        assert all(np.isfinite(values).all() for values in scoring.signals.values())
        for name in ("latents", "knn", "margin", "paper"):
            assert average_precision(planted.flipped, scoring.signals[name]) > planted.flipped.mean(), name

    def test_evidence_of_flipped_pairs_speaks_against_the_label(self) -> None:
        planted = planted_pairs(0)
        scoring = score_pairs(planted.inputs, ScoringParams(FUSED))
        totals = np.add.reduceat(np.append(scoring.evidence.contributions, 0.0), scoring.evidence.offsets[:-1])
        assert totals[planted.flipped].mean() < 0 < totals[~planted.flipped].mean()

    def test_evidence_contributions_are_terms_of_the_latents_score(self) -> None:
        planted = planted_pairs(0, n_groups=40, n_latents=30, informative=8)
        scoring = score_pairs(planted.inputs, ScoringParams(FUSED, evidence=1000))
        totals = [
            scoring.evidence.contributions[a:b].sum()
            for a, b in zip(scoring.evidence.offsets[:-1], scoring.evidence.offsets[1:], strict=True)
        ]
        np.testing.assert_allclose(totals, -scoring.signals["latents"], atol=1e-9)

    def test_same_seed_same_result_and_row_order_does_not_matter(self) -> None:
        planted = planted_pairs(1, n_groups=60, n_latents=40, informative=10).inputs
        order = np.random.default_rng(0).permutation(len(planted.margins_P))
        one, two = (
            score_pairs(planted, ScoringParams(FUSED, seed=5)),
            score_pairs(planted.take(order), ScoringParams(FUSED, seed=5)),
        )
        np.testing.assert_allclose(one.suspicion_P[order], two.suspicion_P, atol=1e-9)


def two_axes() -> SignalInputs:
    """A safety axis and a chat axis of other scale."""
    one, two = planted_pairs(0, n_groups=50).inputs, planted_pairs(1, n_groups=30, axis="chat").inputs
    assert one.latents is not None
    assert two.latents is not None
    latents = LatentSums(
        sparse.csr_array(sparse.vstack([one.latents.chosen_PS, two.latents.chosen_PS])),
        sparse.csr_array(sparse.vstack([one.latents.rejected_PS, two.latents.rejected_PS])),
        np.concatenate([one.latents.n_positions_P2, two.latents.n_positions_P2]),
    )
    return SignalInputs(
        np.concatenate([one.groups_P, two.groups_P]),
        np.concatenate([one.axes_P, two.axes_P]),
        np.concatenate([one.subsets_P, two.subsets_P]),
        np.concatenate([one.margins_P, 100 * two.margins_P]),
        latents,
    )


class TestAxes:
    def test_an_axis_is_scored_as_if_it_were_alone(self) -> None:
        both = two_axes()
        whole = score_pairs(both, ScoringParams(FUSED))
        chat = np.flatnonzero(both.axes_P == "chat")
        alone = score_pairs(both.take(chat), ScoringParams(FUSED))
        np.testing.assert_allclose(whole.suspicion_P[chat], alone.suspicion_P)
        np.testing.assert_allclose(whole.signals["latents"][chat], alone.signals["latents"])
        assert whole.folds == {"chat": 5, "safety": 5}

    def test_an_axis_of_one_group_is_ranked_by_what_needs_no_folds(self) -> None:
        data = two_axes()
        groups = data.groups_P.copy()
        groups[data.axes_P == "chat"] = "only"
        scoring = score_pairs(replace(data, groups_P=groups), ScoringParams(FUSED))
        chat = data.axes_P == "chat"
        assert "single group" in scoring.left_out["latents@chat"]
        assert np.isnan(scoring.signals["latents"][chat]).all()
        assert np.isfinite(scoring.signals["latents"][~chat]).all()
        np.testing.assert_allclose(scoring.suspicion_P[chat], unit_ranks(-data.margins_P[chat]))
        assert scoring.folds["chat"] == 0


class TestMissing:
    def test_without_an_sae_the_rest_is_fused_and_the_gap_is_named(self) -> None:
        data = replace(planted_pairs(0, n_groups=30).inputs, latents=None)
        scoring = score_pairs(data, ScoringParams(FUSED))
        assert scoring.left_out == {"latents": "there are no latents"}
        assert set(scoring.signals) == {"margin"}
        assert scoring.pair_score_P is None
        np.testing.assert_allclose(scoring.suspicion_P, unit_ranks(-data.margins_P))
        assert len(scoring.evidence.latent_ids) == 0

    @pytest.mark.parametrize("name", ["latents", "knn", "probe_cv", "dense", "paper"])
    def test_each_signal_says_what_it_lacks(self, name: str) -> None:
        data = planted_pairs(0, n_groups=20).inputs
        bare = replace(data, latents=None, head_delta_PD=None, dense_delta_PD=None)
        assert missing_input(name, bare) is not None
        assert missing_input("margin", bare) is None

    def test_the_paper_estimator_needs_labelled_features(self) -> None:
        scoring = score_pairs(planted_pairs(0, n_groups=20).inputs, ScoringParams(FUSED, "paper"))
        assert scoring.left_out == {"paper": "there are no labelled safety features"}
        assert np.isnan(scoring.suspicion_P).all()


def test_the_paper_estimator_ranks_by_the_paper_score_of_all_pairs() -> None:
    data = replace(planted_pairs(0, n_groups=40).inputs, paper=PaperFeatures(np.arange(10), np.tile([1.0, -1.0], 5)))
    assert data.latents is not None
    assert data.paper is not None
    scoring = score_pairs(data, ScoringParams(FUSED, "paper"))
    expected = paper_pair_scores(data.latents, data.paper)
    assert scoring.pair_score_P is not None
    np.testing.assert_allclose(scoring.pair_score_P, expected)
    np.testing.assert_allclose(scoring.signals["paper"], -expected)
    np.testing.assert_allclose(scoring.suspicion_P, unit_ranks(-expected))
    terms = latent_delta(data.latents).toarray()[0, :10] * data.paper.signs
    first = scoring.evidence.contributions[: scoring.evidence.offsets[1]]
    np.testing.assert_allclose(np.sort(first), np.sort(terms[np.argsort(-np.abs(terms))[: len(first)]]), atol=1e-6)


@pytest.mark.parametrize("seen", [True, False])
def test_an_sae_that_adds_something_is_used(seen: bool) -> None:
    data = planted_pairs(3).inputs
    scoring = score_pairs(data, ScoringParams({"latents": 1.0}, labels_seen=seen))
    doubt = scoring.doubts["safety"]
    assert doubt.sae is not None
    assert doubt.sae.lo is not None
    assert doubt.sae.lo > 0
    assert doubt.sae.fair != seen
    assert not doubt.sae_left_out
    np.testing.assert_array_equal(scoring.suspicion_P, score_pairs(data, ScoringParams({"latents": 1.0})).suspicion_P)


@pytest.mark.parametrize("seen", [True, False])
def test_an_sae_that_adds_nothing_is_left_out_where_that_can_be_told(seen: bool) -> None:
    data = planted_pairs(3).inputs
    assert data.latents is not None
    useless = planted_pairs(4, informative=0).inputs
    told = replace(data, latents=useless.latents, dense_delta_PD=latent_delta(data.latents).toarray())
    scoring = score_pairs(told, ScoringParams({"latents": 1.0, "knn": 0.5}, labels_seen=seen))
    doubt = scoring.doubts["safety"]
    assert doubt.sae is not None
    assert doubt.sae.hi is not None
    assert doubt.sae.hi < 0
    assert doubt.sae_left_out != seen
    dense = score_pairs(told, ScoringParams({"dense": 1.0})).suspicion_P
    assert np.allclose(scoring.suspicion_P, dense) != seen


def test_what_the_sae_adds_is_not_told_beside_signals_that_saw_the_labels_or_without_a_dense_probe() -> None:
    data = planted_pairs(3).inputs
    assert score_pairs(data, ScoringParams(FUSED)).doubts["safety"].sae is None
    assert score_pairs(replace(data, dense_delta_PD=None), ScoringParams({"latents": 1.0})).doubts["safety"].sae is None
    assert score_pairs(data, ScoringParams({"dense": 1.0})).doubts["safety"].sae is None


@pytest.mark.parametrize(("n_groups", "told"), [(29, False), (30, True)])
def test_what_the_sae_adds_takes_thirty_groups(n_groups: int, told: bool) -> None:
    data = planted_pairs(3, n_groups=n_groups).inputs
    doubt = score_pairs(data, ScoringParams({"latents": 1.0}, labels_seen=False)).doubts["safety"]
    assert (doubt.sae is not None) == told
    assert told or not doubt.sae_left_out
