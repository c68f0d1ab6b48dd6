"""Signals: cross-fitting, known answers, planted wrong labels."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import minimize_scalar

from safer_engine.errors import NumericalError
from safer_engine.science.folds import group_folds
from safer_engine.science.pair_deltas import LatentDelta, LatentSums, latent_delta, latent_sums
from safer_engine.science.probes import fit_probe, probe_doubt
from safer_engine.science.signals import MIN_SUBSET, knn_doubt, margin_doubt, matched_filter, project, unit_ranks
from safer_engine.science.stats import auroc, average_precision
from tests.helpers.planted_pairs import planted_pairs


class TestFolds:
    def test_no_group_lies_in_two_folds_and_folds_are_balanced(self) -> None:
        groups = [f"g{i % 37}" for i in range(400)]
        folds = group_folds(groups, 5, seed=3)
        assert all(len({f for f, g in zip(folds, groups, strict=True) if g == name}) == 1 for name in set(groups))
        sizes = np.bincount(folds)
        assert len(sizes) == 5
        assert sizes.max() - sizes.min() <= 12

    def test_a_fold_follows_the_group_not_the_row_order(self) -> None:
        groups = np.asarray([f"g{i // 2}" for i in range(60)])
        order = np.random.default_rng(0).permutation(60)
        np.testing.assert_array_equal(group_folds(groups, 4, 7)[order], group_folds(groups[order], 4, 7))

    def test_another_seed_gives_other_folds(self) -> None:
        groups = [f"g{i}" for i in range(50)]
        assert (group_folds(groups, 5, 0) != group_folds(groups, 5, 1)).any()

    def test_fewer_groups_than_folds_gives_as_many_folds_as_groups(self) -> None:
        assert set(group_folds(["a", "b", "b"], 5, 0)) == {0, 1}

    @pytest.mark.parametrize(("groups", "n"), [(["a", "a"], 5), (["a", "b"], 1), ([], 5)])
    def test_what_cannot_be_held_out_is_refused(self, groups: list[str], n: int) -> None:
        with pytest.raises(ValueError, match="two groups"):
            group_folds(groups, n, 0)


class TestDeltas:
    def test_means_are_per_response_so_length_does_not_count(self) -> None:
        sums = LatentSums(sparse.csr_array([[8.0, 0.0]]), sparse.csr_array([[4.0, 1.0]]), np.array([[4, 2]]))
        np.testing.assert_allclose(latent_delta(sums).toarray(), [[0.0, -0.5]])

    def test_square_roots_are_taken_of_means(self) -> None:
        sums = LatentSums(sparse.csr_array([[36.0]]), sparse.csr_array([[8.0]]), np.array([[4, 2]]))
        np.testing.assert_allclose(latent_delta(sums, root=True).toarray(), [[3.0 - 2.0]])

    def test_a_response_without_positions_has_means_of_zero(self) -> None:
        sums = LatentSums(sparse.csr_array([[0.0]]), sparse.csr_array([[3.0]]), np.array([[0, 3]]))
        np.testing.assert_allclose(latent_delta(sums).toarray(), [[-1.0]])

    def test_sums_are_built_from_csr_parts(self) -> None:
        chosen = (np.array([0, 1, 1]), np.array([2], np.int32), np.array([1.5], np.float32))
        rejected = (np.array([0, 0, 2]), np.array([0, 1], np.int32), np.array([2.0, 1.0], np.float32))
        sums = latent_sums(chosen, rejected, np.array([[1, 1], [1, 2]]), 3)
        np.testing.assert_allclose(latent_delta(sums).toarray(), [[0, 0, 1.5], [-1, -0.5, 0]])

    def test_rows_of_a_difference_are_those_of_the_whole(self) -> None:
        planted = planted_pairs(0, n_groups=60, n_latents=30, informative=8).inputs.latents
        assert planted is not None
        parts = [(m.indptr, m.indices, m.data) for m in (planted.chosen_PS, planted.rejected_PS)]
        mapped = LatentDelta(latent_sums(parts[0], parts[1], planted.n_positions_P2, planted.n_latents))
        whole = latent_delta(planted).toarray()
        assert mapped.shape == whole.shape
        np.testing.assert_array_equal(mapped[np.array([5, 0, 5])].toarray(), whole[[5, 0, 5]])
        np.testing.assert_array_equal(mapped[3:9].toarray(), whole[3:9])

    def test_a_difference_reads_the_rows_it_is_asked_for_and_no_other(self) -> None:
        sums = np.array([1.0, 2.0], np.float32)
        part = (np.array([0, 1, 2]), np.array([0, 1], np.int32), sums)
        delta = LatentDelta(latent_sums(part, (np.zeros(3), np.zeros(0, np.int32), sums[:0]), np.ones((2, 2)), 2))
        sums[1] = math.nan  # as where a file is damaged after it was looked at
        np.testing.assert_array_equal(delta[np.array([0])].toarray(), [[1.0, 0.0]])
        with pytest.raises(NumericalError, match="not finite"):
            delta[1:]

    @pytest.mark.parametrize(
        ("indptr", "indices"), [([0, 2], [0]), ([1, 1], [0]), ([0, 1, 0], [0]), ([0, 1], [3]), ([0, 1], [-1]), ([0, 1, 1], [0])]
    )
    def test_parts_that_do_not_fit_together_are_refused(self, indptr: list[int], indices: list[int]) -> None:
        part = (np.array(indptr), np.array(indices, np.int32), np.ones(1, np.float32))
        with pytest.raises(ValueError, match="rows|entries|latents"):
            latent_sums(part, part, np.ones((1, 2)), 3)

    @pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
    def test_a_sum_that_cannot_be_is_refused(self, value: float) -> None:
        part = (np.array([0, 1]), np.array([0], np.int32), np.array([value], np.float32))
        with pytest.raises(NumericalError, match="finite and not negative"):
            latent_sums(part, part, np.array([[1, 1]]), 1)


class TestMatchedFilter:
    def test_equals_the_formula_written_out(self) -> None:
        """One subset, no prior: score = scale · Σ Δ_i mean_i / (var_i + λ·mean var), moments over the other fold."""
        rng = np.random.default_rng(0)
        delta = rng.normal(0.3, 1.0, (40, 6)) * np.arange(1, 7)
        folds = np.arange(40) % 2
        found = matched_filter(delta, folds_P=folds, subsets_P=np.zeros(40), shrinkage=0.5, subset_prior=0.0)
        raw, scale = np.empty(40), np.empty(40)
        for fold in (0, 1):
            train = delta[folds != fold]
            direction = train.mean(0) / (train.var(0) + 0.5 * train.var(0).mean())
            raw[folds == fold] = delta[folds == fold] @ direction
        for fold in (0, 1):
            others = raw[folds != fold]
            scale[folds == fold] = 2 * others.mean() / others.var()
        np.testing.assert_allclose(found.score_P, raw * scale, rtol=1e-9)

    def test_sparse_and_dense_agree(self) -> None:
        planted = planted_pairs(0, n_groups=80, n_latents=50, informative=10).inputs
        assert planted.latents is not None
        delta = latent_delta(planted.latents)
        folds = group_folds(planted.groups_P, 5, 0)
        one = matched_filter(delta, folds_P=folds, subsets_P=planted.subsets_P)
        two = matched_filter(delta.toarray(), folds_P=folds, subsets_P=planted.subsets_P)
        np.testing.assert_allclose(one.score_P, two.score_P, rtol=1e-6, atol=1e-9)

    def test_the_score_is_the_projection_on_the_returned_directions(self) -> None:
        planted = planted_pairs(1, n_groups=60, n_latents=40, informative=10).inputs
        assert planted.latents is not None
        delta = latent_delta(planted.latents)
        found = matched_filter(delta, folds_P=group_folds(planted.groups_P, 3, 0), subsets_P=planted.subsets_P)
        np.testing.assert_allclose(project(delta, found.weights_CS, found.cell_P), found.score_P, rtol=1e-9)
        np.testing.assert_array_equal(found.doubt_P, -found.score_P)

    def test_a_groups_own_rows_do_not_reach_its_direction(self) -> None:
        rng = np.random.default_rng(2)
        delta = rng.normal(0.2, 1.0, (60, 5))
        folds = np.arange(60) % 3
        changed = delta.copy()
        changed[folds == 0] += 0.7
        before = matched_filter(delta, folds_P=folds, subsets_P=np.zeros(60))
        after = matched_filter(changed, folds_P=folds, subsets_P=np.zeros(60))
        cell = before.cell_P[folds == 0][0]
        one, two = before.weights_CS[cell], after.weights_CS[cell]
        np.testing.assert_allclose(one / np.linalg.norm(one), two / np.linalg.norm(two), rtol=1e-9)

    def test_subsets_have_their_own_direction_and_small_ones_the_axis_direction(self) -> None:
        rng = np.random.default_rng(4)
        n = 600
        subset = np.asarray(["a"] * 290 + ["b"] * 290 + ["tiny"] * (MIN_SUBSET - 1) + ["c"])
        delta = rng.normal(0, 1, (n, 4))
        delta[:290, 0] += 1.0
        delta[290:580, 1] += 1.0
        found = matched_filter(delta, folds_P=np.arange(n) % 2, subsets_P=subset, subset_prior=10.0)
        weights = {name: found.weights_CS[found.cell_P[np.flatnonzero(subset == name)[0]]] for name in ("a", "b", "tiny", "c")}
        assert weights["a"][0] > 2 * abs(weights["a"][1])
        assert weights["b"][1] > 2 * abs(weights["b"][0])
        tiny = weights["tiny"] / np.linalg.norm(weights["tiny"])
        assert (tiny[:2] > 0.4).all()
        assert len(found.weights_CS) == 6, "two subsets and one pooled cell, in two folds"

    def test_a_subset_without_evidence_is_neutral_beside_one_with(self) -> None:
        rng = np.random.default_rng(5)
        delta = rng.normal(0, 1, (2000, 8))
        delta[:1000, :4] += 0.8
        subset = np.repeat(["clear", "noise"], 1000)
        found = matched_filter(delta, folds_P=np.arange(2000) % 5, subsets_P=subset)
        assert found.score_P[:1000].std() > 4 * found.score_P[1000:].std()

    def test_latents_that_never_vary_get_no_weight(self) -> None:
        delta = np.zeros((20, 3))
        found = matched_filter(delta, folds_P=np.arange(20) % 2, subsets_P=np.zeros(20))
        assert not found.weights_CS.any()
        assert not found.score_P.any()

    def test_scores_without_spread_are_scaled_without_a_word(self) -> None:
        delta = np.full((3, 2), 3.0)
        delta[0] = 5.0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = matched_filter(delta, folds_P=np.arange(3), subsets_P=np.zeros(3))
        assert np.isfinite(found.score_P).all()

    def test_a_value_that_is_not_finite_is_refused(self) -> None:
        delta = np.ones((4, 2))
        delta[1, 1] = np.nan
        with pytest.raises(NumericalError):
            matched_filter(delta, folds_P=np.arange(4) % 2, subsets_P=np.zeros(4))


class TestNeighbours:
    def test_equals_a_plain_loop(self) -> None:
        rng = np.random.default_rng(0)
        delta = rng.normal(size=(30, 5))
        groups = np.arange(30) // 3
        unit = delta / np.linalg.norm(delta, axis=1, keepdims=True)
        expected = []
        for row in range(30):
            cosines = [float(unit[row] @ unit[other]) for other in range(30) if groups[other] != groups[row]]
            expected.append(-np.mean(sorted(cosines, key=abs, reverse=True)[:4]))
        for matrix in (delta, sparse.csr_array(delta)):
            np.testing.assert_allclose(knn_doubt(matrix, groups_P=groups, neighbours=4), expected, atol=1e-6)

    def test_a_flipped_row_disagrees_with_its_neighbours(self) -> None:
        rng = np.random.default_rng(1)
        delta = rng.normal(0, 0.2, (40, 6)) + 1.0
        delta[7] *= -1
        doubt = knn_doubt(delta, groups_P=np.arange(40), neighbours=10)
        assert doubt.argmax() == 7
        assert doubt[7] > 0.5
        assert np.delete(doubt, 7).max() < -0.5

    def test_own_group_never_votes(self) -> None:
        delta = np.asarray([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        assert not knn_doubt(delta, groups_P=np.asarray([0, 0, 1, 1]), neighbours=2).any()

    def test_a_pair_without_any_difference_has_no_opinion(self) -> None:
        delta = sparse.csr_array(np.asarray([[0.0, 0.0], [1.0, 0.0], [1.0, 0.1]]))
        assert knn_doubt(delta, groups_P=np.arange(3), neighbours=2)[0] == 0.0

    def test_drawn_references_bound_the_work_and_need_a_generator(self) -> None:
        delta = np.random.default_rng(2).normal(1.0, 0.3, (50, 4))
        with pytest.raises(ValueError, match="generator"):
            knn_doubt(delta, groups_P=np.arange(50), max_references=10)
        doubt = knn_doubt(delta, groups_P=np.arange(50), max_references=10, rng=np.random.default_rng(0))
        np.testing.assert_array_equal(
            doubt, knn_doubt(delta, groups_P=np.arange(50), max_references=10, rng=np.random.default_rng(0))
        )
        assert (doubt < 0).all()


class TestProbe:
    def test_one_column_has_the_closed_form_minimum(self) -> None:
        delta = np.asarray([[1.0], [2.0], [-0.5], [1.5]])
        rms = math.sqrt(float((delta**2).mean()))

        def objective(v: float) -> float:
            return float(np.logaddexp(0, -delta[:, 0] / rms * v).mean() + 0.05 * v * v)

        best = minimize_scalar(objective).x / rms
        assert fit_probe(delta, 0.1).weights_D[0] == pytest.approx(best, rel=1e-4)

    def test_mirror_images_get_opposite_margins_and_scaling_a_column_changes_nothing(self) -> None:
        rng = np.random.default_rng(0)
        delta = rng.normal(0.4, 1.0, (200, 5))
        folds = np.arange(200) % 4
        doubt = probe_doubt(delta, folds_P=folds)
        np.testing.assert_allclose(
            doubt, probe_doubt(delta * np.asarray([1, 10, 100, 0.1, 3]), folds_P=folds), rtol=1e-3, atol=1e-3
        )
        np.testing.assert_allclose(fit_probe(-delta, 0.1).weights_D, -fit_probe(delta, 0.1).weights_D, rtol=1e-4, atol=1e-6)

    def test_sparse_and_dense_agree(self) -> None:
        delta = np.random.default_rng(1).normal(0.2, 1, (90, 12)) * (np.random.default_rng(2).random((90, 12)) < 0.3)
        folds = np.arange(90) % 3
        np.testing.assert_allclose(
            probe_doubt(delta, folds_P=folds), probe_doubt(sparse.csr_array(delta), folds_P=folds), rtol=1e-6, atol=1e-8
        )

    def test_held_out_rows_do_not_reach_their_probe(self) -> None:
        delta = np.random.default_rng(3).normal(0.3, 1, (60, 4))
        folds = np.arange(60) % 3
        changed = delta.copy()
        changed[0] *= -1.0
        first, second = probe_doubt(delta, folds_P=folds), probe_doubt(changed, folds_P=folds)
        assert second[0] == pytest.approx(-first[0])

    def test_two_folds_use_the_strongest_penalty(self) -> None:
        delta = np.random.default_rng(4).normal(0.3, 1, (40, 3))
        folds = np.arange(40) % 2
        expected = -(delta[folds == 0] @ fit_probe(delta[folds == 1], 0.5).weights_D)
        np.testing.assert_allclose(probe_doubt(delta, folds_P=folds, penalties=(0.5, 1e-6))[folds == 0], expected)

    def test_dead_columns_get_no_weight(self) -> None:
        delta = np.random.default_rng(5).normal(0.5, 1, (30, 3))
        delta[:, 1] = 0.0
        assert fit_probe(delta, 0.1).weights_D[1] == 0.0

    def test_finds_a_planted_direction(self) -> None:
        rng = np.random.default_rng(6)
        delta = rng.normal(0, 1, (800, 30))
        delta[:, :3] += 0.9
        flipped = rng.random(800) < 0.1
        delta[flipped] *= -1
        assert auroc(flipped, probe_doubt(delta, folds_P=np.arange(800) % 5)) > 0.9


class TestRanks:
    def test_ties_share_their_mean_and_the_range_is_the_unit_interval(self) -> None:
        np.testing.assert_allclose(unit_ranks(np.asarray([3.0, 1.0, 3.0, 9.0])), [0.5, 0.0, 0.5, 1.0])

    def test_a_lone_value_lies_in_the_middle(self) -> None:
        assert unit_ranks(np.asarray([4.2])) == [0.5]

    def test_not_a_number_cannot_be_ranked(self) -> None:
        with pytest.raises(NumericalError):
            unit_ranks(np.asarray([1.0, np.nan]))
        with pytest.raises(NumericalError):
            margin_doubt(np.asarray([np.inf]))


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_wrong_labels_are_found_by_the_latents(seed: int) -> None:
    planted = planted_pairs(seed)
    data = planted.inputs
    assert data.latents is not None
    folds = group_folds(data.groups_P, 5, 0)
    prevalence = planted.flipped.mean()
    margin = average_precision(planted.flipped, margin_doubt(data.margins_P))
    for root in (False, True):
        delta = latent_delta(data.latents, root=root)
        own = average_precision(planted.flipped, matched_filter(delta, folds_P=folds, subsets_P=data.subsets_P).doubt_P)
        shared = average_precision(planted.flipped, matched_filter(delta, folds_P=folds, subsets_P=np.zeros(len(folds))).doubt_P)
        assert own >= 3 * prevalence
        assert own > margin
        assert own > shared, "subsets that differ in direction must not share one"
    neighbours = knn_doubt(latent_delta(data.latents, root=True), groups_P=data.groups_P)
    assert average_precision(planted.flipped, neighbours) > 1.5 * prevalence
