import numpy as np
import pytest
from scipy import sparse
from scipy.stats import ttest_1samp

from safer_engine.errors import NumericalError
from safer_engine.science import salience as module
from safer_engine.science.latent_acts import ResponseActs, SideActs
from safer_engine.science.salience import (
    AxisSalience,
    eligible_latents,
    gather_rows,
    headline,
    rank_latents,
    salience,
)

S = 9


def side(dense_PS: np.ndarray) -> SideActs:
    rows = sparse.csr_array(dense_PS.astype(np.float32))
    rows.sort_indices()
    return SideActs(rows.indptr.astype(np.int64), rows.indices.astype(np.int32), rows.data)


def acts_of(chosen: np.ndarray, rejected: np.ndarray, n_positions: np.ndarray) -> ResponseActs:
    return ResponseActs(side(chosen), side(rejected), n_positions.astype(np.int32), chosen.shape[1])


class Drawn:
    """Random sums: a third of the entries are positive; groups of one to four pairs, not in order."""

    def __init__(self, seed: int = 0, pairs: int = 60) -> None:
        rng = np.random.default_rng(seed)
        self.chosen, self.rejected = (
            (rng.gamma(2, 3, (pairs, S)) * (rng.random((pairs, S)) < 0.33)).astype(np.float32).astype(float) for _ in range(2)
        )
        self.positions = rng.integers(1, 30, (pairs, 2))
        self.groups = rng.permutation(np.repeat(np.arange(pairs), rng.integers(1, 5, pairs))[:pairs])
        self.acts = acts_of(self.chosen, self.rejected, self.positions)

    def group_means(self) -> tuple[np.ndarray, np.ndarray]:
        sides = []
        for number, sums in enumerate((self.chosen, self.rejected)):
            means = sums / self.positions[:, number : number + 1]
            sides.append(np.array([means[self.groups == group].mean(axis=0) for group in np.unique(self.groups)]))
        return sides[0], sides[1]


def test_the_paired_mean_is_what_its_description_says() -> None:
    drawn = Drawn()
    plus, minus = (side_GS.mean(axis=0) for side_GS in drawn.group_means())
    C = 2 * np.concatenate([plus, minus]).mean()
    found = salience(drawn.acts, drawn.groups, "paired_mean")
    np.testing.assert_allclose(found.salience_S, (plus - minus) / (plus + minus + C), rtol=1e-12)
    np.testing.assert_allclose(found.a_chosen_S, plus, rtol=1e-12)
    np.testing.assert_allclose(found.a_rejected_S, minus, rtol=1e-12)
    assert found.n_groups == len(np.unique(drawn.groups))


def test_t_is_the_one_sample_t_of_group_differences() -> None:
    drawn = Drawn(1)
    plus, minus = drawn.group_means()
    found = salience(drawn.acts, drawn.groups, "paired_mean")
    np.testing.assert_allclose(found.t_S, ttest_1samp(plus - minus, 0).statistic, rtol=1e-9)


def test_the_interval_is_the_one_of_the_jackknife_over_groups() -> None:
    drawn = Drawn(2, pairs=400)
    names = np.unique(drawn.groups)
    found = salience(drawn.acts, drawn.groups, "paired_mean")
    left_out = np.array(
        [salience(drawn.acts, drawn.groups, "paired_mean", np.flatnonzero(drawn.groups != g)).salience_S for g in names]
    )
    n = len(names)
    error = np.sqrt((n - 1) / n * ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0))
    np.testing.assert_allclose((found.hi_S - found.lo_S) / 2 / error, 1.97, rtol=0.08)


def test_the_interval_covers_the_true_contrast() -> None:
    rates = np.array([0.1, 0.3, 0.6, 0.05, 0.5, 0.2, 0.2, 0.4, 0.3])
    shift = np.array([0.1, 0, -0.2, 0.05, 0, 0, 0.2, 0, -0.1])
    plus, minus = (rates + shift) * 2, rates * 2
    truth = (plus - minus) / (plus + minus + 2 * np.concatenate([plus, minus]).mean())
    covered = []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        chosen, rejected = (rng.gamma(2, 1, (200, S)) * (rng.random((200, S)) < rate) for rate in (rates + shift, rates))
        found = salience(acts_of(chosen, rejected, np.ones((200, 2))), np.arange(200), "paired_mean")
        covered.append((found.lo_S <= truth) & (truth <= found.hi_S))
    assert 0.92 <= np.mean(covered) <= 0.98


def test_the_paper_contrast_is_of_sums_and_does_not_depend_on_groups() -> None:
    drawn = Drawn(3)
    plus, minus = drawn.chosen.sum(axis=0), drawn.rejected.sum(axis=0)
    expected = (plus - minus) / (plus + minus + 2 * np.concatenate([plus, minus]).mean())
    found = salience(drawn.acts, drawn.groups, "paper")
    np.testing.assert_allclose(found.salience_S, expected, rtol=1e-12)
    np.testing.assert_allclose(found.a_chosen_S, plus, rtol=1e-12)
    alone = salience(drawn.acts, np.arange(60), "paper")
    np.testing.assert_allclose(alone.salience_S, expected, rtol=1e-12)


def test_swapping_the_sides_turns_every_sign() -> None:
    drawn = Drawn(4)
    swapped = acts_of(drawn.rejected, drawn.chosen, drawn.positions[:, ::-1])
    for estimator in ("paired_mean", "paper"):
        one = salience(drawn.acts, drawn.groups, estimator)
        other = salience(swapped, drawn.groups, estimator)
        np.testing.assert_allclose(other.salience_S, -one.salience_S, atol=1e-14)
        np.testing.assert_allclose(other.lo_S, -one.hi_S, atol=1e-12)
        np.testing.assert_allclose(other.t_S, -one.t_S, atol=1e-9)


def test_a_longer_response_moves_the_sums_but_not_the_means() -> None:
    drawn = Drawn(5)
    longer = acts_of(5 * drawn.chosen, drawn.rejected, drawn.positions * np.array([5, 1]))
    before, after = (salience(acts, drawn.groups, "paired_mean").salience_S for acts in (drawn.acts, longer))
    np.testing.assert_allclose(after, before, atol=1e-12)
    before, after = (salience(acts, drawn.groups, "paper").salience_S for acts in (drawn.acts, longer))
    assert (after > before + 0.1).all()


def test_a_large_group_weighs_as_much_as_a_small_one() -> None:
    chosen, rejected = np.zeros((11, S)), np.zeros((11, S))
    chosen[:10, 0] = 1.0  # one group of ten pairs
    rejected[10, 0] = 1.0  # one group of one pair
    found = salience(acts_of(chosen, rejected, np.ones((11, 2))), np.array([0] * 10 + [1]), "paired_mean")
    assert found.salience_S[0] == pytest.approx(0, abs=1e-12)
    assert salience(acts_of(chosen, rejected, np.ones((11, 2))), np.zeros(11, dtype=int), "paper").salience_S[0] > 0.5


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_results_do_not_depend_on_the_chunks_or_the_order_of_pairs(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    drawn = Drawn(6)
    whole = salience(drawn.acts, drawn.groups, "paired_mean")
    monkeypatch.setattr(module, "_CHUNK_PAIRS", chunk)
    order = np.random.default_rng(0).permutation(60)
    mixed = acts_of(drawn.chosen[order], drawn.rejected[order], drawn.positions[order])
    found = salience(mixed, drawn.groups[order], "paired_mean")
    for name in ("salience_S", "lo_S", "hi_S", "t_S"):
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name), rtol=1e-9, atol=1e-12)


def test_pairs_without_positions_are_left_out_and_counted() -> None:
    drawn = Drawn(7)
    positions = drawn.positions.copy()
    positions[[2, 5], 0] = 0
    found = salience(acts_of(drawn.chosen, drawn.rejected, positions), drawn.groups, "paired_mean")
    kept = np.setdiff1d(np.arange(60), [2, 5])
    expected = salience(drawn.acts, drawn.groups, "paired_mean", kept)
    np.testing.assert_allclose(found.salience_S, expected.salience_S)
    assert (found.n_left_out, expected.n_left_out) == (2, 0)
    with pytest.raises(NumericalError, match="both sides"):
        salience(acts_of(drawn.chosen, drawn.rejected, 0 * positions), drawn.groups, "paired_mean")


def test_one_group_has_a_contrast_but_no_interval() -> None:
    drawn = Drawn(8)
    found = salience(drawn.acts, np.zeros(60, dtype=np.int64), "paired_mean")
    assert np.isfinite(found.salience_S).all()
    assert np.isnan(found.lo_S).all()
    assert np.isnan(found.t_S).all()


def test_a_latent_that_never_fires_has_salience_zero_and_one_without_spread_no_t() -> None:
    chosen, rejected = np.zeros((6, S)), np.zeros((6, S))
    chosen[:, 1] = 2.0
    found = salience(acts_of(chosen, rejected, np.ones((6, 2))), np.arange(6), "paired_mean")
    assert found.salience_S[0] == found.lo_S[0] == found.hi_S[0] == found.t_S[0] == 0
    assert found.salience_S[1] == pytest.approx(2 / (2 + 2 / S))
    assert np.isnan(found.t_S[1])


def test_a_non_finite_sum_is_refused() -> None:
    drawn = Drawn(9)
    chosen = drawn.chosen.copy()
    chosen[0, 0] = np.inf
    with pytest.raises(NumericalError, match="not finite"):
        salience(acts_of(chosen, drawn.rejected, drawn.positions), drawn.groups, "paper")


def test_a_planted_latent_comes_first_with_its_sign() -> None:
    rng = np.random.default_rng(0)
    chosen, rejected = (rng.gamma(1, 1, (300, 40)) * (rng.random((300, 40)) < 0.2) for _ in range(2))
    rejected[:150, 17] += 2
    found = salience(acts_of(chosen, rejected, np.full((300, 2), 4)), np.arange(300) // 2, "paired_mean")
    assert rank_latents(found.salience_S, np.ones(40, dtype=bool))[0] == 17
    assert found.hi_S[17] < -0.2
    assert found.t_S[17] < -8


def test_ranking_is_by_size_then_by_latent_and_only_of_the_eligible() -> None:
    s = np.array([0.2, -0.5, 0.5, 0.9, 0.1])
    assert rank_latents(s, np.array([True, True, True, False, True])).tolist() == [1, 2, 0, 4]


def test_eligibility_looks_only_at_how_often_a_latent_fires() -> None:
    firings = np.array([0, 1, 10, 500, 501])
    assert eligible_latents(firings, 1000, 0.01, 0.5).tolist() == [False, False, True, True, False]
    assert eligible_latents(firings, 1000, 0.0, 1.0).tolist() == [False, True, True, True, True]


def test_the_headline_is_the_axis_a_latent_answers_to() -> None:
    rng = np.random.default_rng(3)
    chosen, rejected = (rng.gamma(1, 1, (200, S)) for _ in range(2))
    chosen[:100, 2] += 3  # only in the first half
    rejected[100:, 2] += 3  # the other way round in the second
    rejected[100:, 5] += 3
    acts, groups = acts_of(chosen, rejected, np.ones((200, 2))), np.arange(200)
    overall = salience(acts, groups, "paired_mean")
    axes = [
        AxisSalience(name, salience(acts, groups, "paired_mean", rows))
        for name, rows in (("chat", np.arange(100)), ("safety", np.arange(100, 200)), ("tiny", np.arange(5)))
    ]
    everyone = np.ones(S, dtype=bool)
    found = headline(overall, axes, everyone, 2)
    assert abs(overall.salience_S[2]) < 0.1
    assert abs(found.salience.salience_S[2]) > 0.3
    assert found.axis_S[5] == "safety"
    assert found.salience.salience_S[5] == axes[1].salience.salience_S[5]
    assert found.salience.lo_S[5] == axes[1].salience.lo_S[5]
    assert "tiny" not in found.axis_S  # too few groups to decide
    assert sorted(found.ranked.tolist()) == list(range(S))
    assert found.ranked[:2].tolist() == [2, 5]
    assert headline(overall, axes[:1], everyone, 2).axis_S == (None,) * S
    alone = headline(overall, [axes[2], axes[2]], everyone, 2)
    assert alone.salience is overall
    assert alone.ranked.tolist() == rank_latents(overall.salience_S, everyone).tolist()


def test_a_small_axis_of_noise_does_not_crowd_out_what_a_large_one_shows() -> None:
    rng, n_large, n_small, d_sae, candidates = np.random.default_rng(0), 2000, 25, 1024, 128
    n = n_large + n_small

    def drawn() -> sparse.csr_array:
        rows = sparse.random_array((n, d_sae), density=0.03, rng=rng, format="csr", dtype=np.float32)
        rows.data = (20 * rng.exponential(1, len(rows.data))).astype(np.float32)
        rows.sort_indices()
        return rows

    chosen, rejected = drawn(), drawn()
    planted = (chosen.indices < 30) & (np.repeat(np.arange(n), np.diff(chosen.indptr)) < n_large)
    chosen.data[planted] *= 2
    sides = [SideActs(one.indptr.astype(np.int64), one.indices.astype(np.int32), one.data) for one in (chosen, rejected)]
    acts, groups = ResponseActs(sides[0], sides[1], np.full((n, 2), 40, np.int32), d_sae), np.arange(n)
    axes = [
        AxisSalience("large", salience(acts, groups, "paired_mean", np.arange(n_large))),
        AxisSalience("small", salience(acts, groups, "paired_mean", np.arange(n_large, n))),
    ]
    eligible = np.ones(d_sae, dtype=bool)
    eligible[40:50] = False
    found = headline(salience(acts, groups, "paired_mean"), axes, eligible, candidates)
    first = found.ranked[:candidates]
    assert (first < 30).sum() >= 25
    assert sum(found.axis_S[latent] == "small" for latent in first) == round(candidates * n_small / n)
    assert sorted(found.ranked.tolist()) == np.flatnonzero(eligible).tolist()


def test_rows_are_gathered_in_the_order_asked_for() -> None:
    drawn = Drawn(10)
    wanted = np.array([5, 0, 59, 5])
    np.testing.assert_array_equal(gather_rows(drawn.acts.chosen, wanted, S).toarray(), drawn.chosen[wanted])
