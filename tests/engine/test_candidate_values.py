import numpy as np
import pytest
from scipy import sparse

from safer_engine.science.candidate_values import (
    CandidateValues,
    at_equal_length,
    candidate_values,
    group_means,
    mixed_signs,
    salience_of,
)
from safer_engine.science.prompt_clusters import cluster_texts
from safer_engine.science.salience import salience
from tests.engine.test_salience import Drawn


def values_of(plus: np.ndarray, minus: np.ndarray) -> CandidateValues:
    c = (plus + minus).mean(axis=1)
    return CandidateValues(np.arange(len(plus)), sparse.csr_array(plus), sparse.csr_array(minus), c)


@pytest.mark.parametrize("estimator", ["paired_mean", "paper"])
def test_candidates_have_the_salience_that_all_latents_together_give_them(estimator: str) -> None:
    drawn, wanted = Drawn(11), np.array([7, 2, 5])
    whole = salience(drawn.acts, drawn.groups, estimator).of(wanted)  # type: ignore[arg-type]
    values = candidate_values(drawn.acts, drawn.groups, estimator, np.arange(60), wanted)  # type: ignore[arg-type]
    assert values is not None
    found = salience_of(values, estimator)  # type: ignore[arg-type]
    for name in ("salience_S", "lo_S", "hi_S", "t_S"):
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name), rtol=1e-9)
    half = values.groups_G % 2 == 0
    rows = np.flatnonzero(drawn.groups % 2 == 0)
    part = salience_of(values.part(half), estimator)  # type: ignore[arg-type]
    expected = salience(drawn.acts, drawn.groups, estimator, rows).of(wanted)  # type: ignore[arg-type]
    np.testing.assert_allclose(part.salience_S, expected.salience_S, rtol=1e-9)


def test_group_means_are_over_the_pairs_given() -> None:
    values, groups = np.array([1.0, 3.0, 5.0, 9.0]), np.array([4, 4, 2, 4])
    assert group_means(values, groups, np.array([0, 1, 2]), np.array([2, 4])).tolist() == [5.0, 2.0]


def test_a_latent_that_follows_length_is_length_bound_and_one_that_does_not_is_not() -> None:
    rng, n = np.random.default_rng(0), 1500
    d = rng.normal(0.4, 0.6, n)
    base = rng.gamma(4, 0.5, (n, 3)) + 2
    plus, minus = base.copy(), base + rng.normal(0, 0.4, (n, 3))
    plus[:, 0] += 0.6 * d  # length alone
    plus[:, 1] += 0.3  # the label alone
    plus[:, 2] += 0.3 + 0.6 * d  # both
    found = at_equal_length(values_of(plus, minus), d)
    assert found.length_bound_C.tolist() == [True, False, False]
    size = (plus + minus).mean(axis=0) + (plus + minus).mean()
    np.testing.assert_allclose(found.salience_C, np.array([0, 0.3, 0.3]) / size, atol=0.01)
    assert ((found.lo_C < found.salience_C) & (found.salience_C < found.hi_C)).all()
    turned = at_equal_length(values_of(minus, plus), -d)
    np.testing.assert_allclose(turned.salience_C, -found.salience_C)
    np.testing.assert_allclose(turned.lo_C, -found.hi_C)
    assert turned.length_bound_C.tolist() == [True, False, False]


def test_the_interval_at_equal_length_covers_the_truth_with_unequal_spread() -> None:
    covered, flagged = [], []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        d = rng.normal(0.5, 1, 150)
        base = rng.gamma(4, 0.5, (150, 1)) + 5
        minus = base + rng.normal(0, 0.3, (150, 1)) * (1 + np.abs(d[:, None]))
        found = at_equal_length(values_of(base, minus), d)
        covered.append(found.lo_C[0] <= 0 <= found.hi_C[0])
        flagged.append(found.length_bound_C[0])
    assert 0.91 <= np.mean(covered) <= 0.98
    assert np.mean(flagged) <= 0.05


def test_without_any_difference_of_length_nothing_is_said() -> None:
    rng = np.random.default_rng(1)
    found = at_equal_length(values_of(rng.random((50, 2)), rng.random((50, 2))), np.zeros(50))
    assert np.isnan(found.salience_C).all()
    assert not found.length_bound_C.any()


def test_mixed_needs_both_directions_to_hold() -> None:
    t = np.array([[6.0, 6.0, 1.0, 6.0], [-6.0, 5.0, -1.0, np.nan], [0.5, 0.2, 0.1, -1.5]])
    p, mixed = mixed_signs(t, np.array([100, 100, 100]))
    assert mixed.tolist() == [True, False, False, False]
    assert p[0] < 1e-6
    assert p[1] == 1
    small = mixed_signs(t, np.array([100, 9, 100]))[1]
    assert not small.any()
    assert np.isnan(mixed_signs(t, np.array([100, 9, 5]))[0]).all()


def test_mixed_is_rare_by_chance_where_one_direction_is_true() -> None:
    rng = np.random.default_rng(2)
    t = rng.standard_t(199, (8, 400)) + np.array([8.0] + [0.0] * 7)[:, None]
    assert mixed_signs(t, np.full(8, 200))[1].sum() <= 2


TOPICS = {"cake sugar oven bake": "kitchen", "planet star orbit moon": "sky", "goal league player match": "sport"}


def test_prompts_of_a_topic_are_put_together_and_named() -> None:
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 3, 120)
    texts = [f"please tell me {' '.join(rng.permutation(list(TOPICS)[topic].split())[:3])}" for topic in truth]
    found = cluster_texts(texts, 3)
    for topic in range(3):
        assert len(set(found.cluster_T[truth == topic])) == 1
        cluster = found.cluster_T[truth == topic][0]
        assert set(found.terms[cluster]) == set(list(TOPICS)[topic].split())
    sizes = np.bincount(found.cluster_T)
    assert (np.diff(sizes) <= 0).all()
    again = cluster_texts(texts, 3)
    assert again.terms == found.terms
    np.testing.assert_array_equal(again.cluster_T, found.cluster_T)


def test_fewer_distinct_prompts_give_fewer_clusters() -> None:
    assert set(cluster_texts(["one two"] * 5 + ["three four"] * 2, 8).cluster_T) == {0, 1}
    assert cluster_texts(["", ""], 3).cluster_T.tolist() == [0, 0]
    assert cluster_texts(["a b"], 0).terms == ()
