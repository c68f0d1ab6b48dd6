import itertools

import numpy as np
import pytest
from scipy import sparse

from safer_engine.errors import NumericalError
from safer_engine.science import salience as salience_module
from safer_engine.science import sign_flips
from safer_engine.science.latent_acts import ResponseActs, SideActs
from safer_engine.science.multiple_testing import benjamini_hochberg, benjamini_yekutieli, holm
from safer_engine.science.sign_flips import FlipSettings, FlipTests, Scope, flip_tests, strata_of


def acts_of(chosen: np.ndarray, rejected: np.ndarray) -> ResponseActs:
    sides = []
    for dense in (chosen, rejected):
        rows = sparse.csr_array(dense.astype(np.float32))
        rows.sort_indices()
        sides.append(SideActs(rows.indptr.astype(np.int64), rows.indices.astype(np.int32), rows.data))
    return ResponseActs(sides[0], sides[1], np.ones((len(chosen), 2), dtype=np.int32), chosen.shape[1])


def noise(seed: int, pairs: int, latents: int, density: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    sides = [rng.gamma(1, 1, (pairs, latents)) * (rng.random((pairs, latents)) < density) for _ in range(2)]
    return sides[0], sides[1]


def run(chosen: np.ndarray, rejected: np.ndarray, groups: np.ndarray | None = None, **settings: int) -> FlipTests:
    codes = np.arange(len(chosen)) if groups is None else groups
    everyone = np.ones(chosen.shape[1], dtype=bool)
    scope = [Scope(None, np.arange(len(chosen)))]
    found = FlipSettings(0.05, settings.get("draws", 1024), settings.get("seed", 0))
    return flip_tests(acts_of(chosen, rejected), codes, "paired_mean", scope, everyone, found)


def test_p_is_the_one_of_all_sign_flips() -> None:
    rng = np.random.default_rng(0)
    chosen = rng.integers(1, 9, (12, 1)) + (np.arange(12) < 9)[:, None] * 3.0
    rejected = rng.integers(1, 9, (12, 1)).astype(float)
    chosen[chosen == rejected] += 1
    u = (chosen - rejected).ravel()
    every = np.array(list(itertools.product((-1, 1), repeat=12))) @ u
    exact = (np.abs(every) >= abs(u.sum()) - 1e-9).mean()
    found = run(chosen, rejected, draws=65_536)
    assert found.n_draws == 1024 * -(-found.n_draws // 1024)
    assert found.scopes[0].p_S[0] == pytest.approx(exact, abs=4 * np.sqrt(exact / found.n_draws) + 1e-3)
    assert found.scopes[0].p_max_t_S[0] == pytest.approx(found.scopes[0].p_S[0])  # one latent: nothing to adjust for


def test_planted_latents_are_found_and_others_are_not() -> None:
    chosen, rejected = noise(1, 400, 120)
    chosen[:, 7] *= 3
    rejected[:, 50] *= 3
    one = run(chosen, rejected).scopes[0]
    assert set(np.flatnonzero(one.q_S <= 0.01)) == {7, 50}
    assert set(np.flatnonzero(one.p_max_t_S <= 0.01)) == {7, 50}
    assert (one.q_by_S >= one.q_S).all()
    assert (one.q_S >= one.p_S).all()


def test_under_the_null_p_is_uniform_also_with_large_groups_and_copies_of_latents() -> None:
    shares, any_max_t = [], 0
    for seed in range(30):
        chosen, rejected = noise(seed, 240, 40, density=0.15)
        chosen, rejected = (np.repeat(side, 4, axis=1) for side in (chosen, rejected))  # every latent four times
        groups = np.arange(240) // 3
        swap = np.random.default_rng(seed).random(80) < 0.5
        parts = np.where(swap[groups][:, None], rejected, chosen), np.where(swap[groups][:, None], chosen, rejected)
        one = run(*parts, groups=groups, seed=seed).scopes[0]
        shares.append([(one.p_S <= alpha).mean() for alpha in (0.01, 0.05, 0.1)])
        any_max_t += bool((one.p_max_t_S <= 0.05).any())
    mean, se = np.mean(shares, axis=0), np.std(shares, axis=0, ddof=1) / np.sqrt(30)
    assert (mean <= np.array([0.01, 0.05, 0.1]) + 2 * se).all()
    assert mean[2] > 0.05
    assert any_max_t <= 5


def test_pairs_of_a_group_are_no_independent_evidence() -> None:
    chosen, rejected = noise(3, 12, 64)
    many = [np.repeat(side, 30, axis=0) for side in (chosen, rejected)]
    groups = np.repeat(np.arange(12), 30)
    once, repeated = run(chosen, rejected), run(many[0], many[1], groups=groups)
    np.testing.assert_allclose(repeated.scopes[0].p_S, once.scopes[0].p_S)


def test_latents_of_too_few_active_groups_are_not_tested() -> None:
    chosen, rejected = noise(4, 100, 70)
    chosen[:, 3] = rejected[:, 3] = 1.0  # fires everywhere, differs nowhere
    chosen[:, 4] = rejected[:, 4] = 0.0
    chosen[:9, 4] = 1.0
    one = run(chosen, rejected).scopes[0]
    assert not one.tested_S[[3, 4]].any()
    assert one.tested_S.sum() == 68
    assert one.n_active_S[[3, 4]].tolist() == [0, 9]
    assert np.isnan(one.q_S[[3, 4]]).all()


def test_swapping_all_labels_changes_no_p() -> None:
    chosen, rejected = noise(5, 80, 70)
    first, second = run(chosen, rejected).scopes[0], run(rejected, chosen).scopes[0]
    np.testing.assert_array_equal(first.p_S, second.p_S)


@pytest.mark.parametrize("chunk", [1, 17])
def test_p_does_not_depend_on_how_the_data_are_cut(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    chosen, rejected = noise(6, 60, 66)
    whole = run(chosen, rejected).scopes[0]
    monkeypatch.setattr(salience_module, "_CHUNK_PAIRS", chunk)
    np.testing.assert_allclose(run(chosen, rejected).scopes[0].p_S, whole.p_S, atol=3e-5)


def test_more_flips_are_drawn_where_few_latents_share_them() -> None:
    few, many = noise(7, 60, 4), noise(7, 60, 200)
    assert run(*few, draws=4096).n_draws == 1024
    crowded = run(*many, draws=16_384)
    assert crowded.smallest_p <= 0.05 / (2 * crowded.n_tests)
    assert run(*few, draws=1024).smallest_p == pytest.approx(1 / (1 + 4 * 1024))


def test_scopes_are_adjusted_together_and_share_their_flips() -> None:
    chosen, rejected = noise(8, 200, 70)
    acts, everyone = acts_of(chosen, rejected), np.ones(70, dtype=bool)
    scopes = [Scope("a", np.arange(100)), Scope("b", np.arange(100, 200))]
    both = flip_tests(acts, np.arange(200), "paired_mean", scopes, everyone, FlipSettings(0.05, 1024, 0))
    alone = flip_tests(acts, np.arange(200), "paired_mean", scopes[:1], everyone, FlipSettings(0.05, 1024, 0))
    np.testing.assert_array_equal(both.scopes[0].p_S, alone.scopes[0].p_S)
    assert (both.scopes[0].p_max_t_S >= alone.scopes[0].p_max_t_S).all()
    assert both.n_tests == 140
    joined = benjamini_hochberg(np.concatenate([one.p_S for one in both.scopes]))
    np.testing.assert_array_equal(np.concatenate([one.q_S for one in both.scopes]), joined)


def test_nothing_to_test_gives_no_test() -> None:
    found = run(np.ones((30, 3)), np.ones((30, 3)))
    assert (found.n_tests, found.n_draws, found.smallest_p) == (0, 0, 1.0)
    assert np.isnan(found.scopes[0].p_max_t_S).all()


def test_a_non_finite_sum_is_refused() -> None:
    chosen, rejected = noise(9, 30, 3)
    chosen[2, 1] = np.inf
    with pytest.raises(NumericalError, match="not finite"):
        run(chosen, rejected)


def test_strata_are_octaves_of_enough_latents() -> None:
    effective = np.repeat([10.0, 20.0, 40.0, 80.0, 160.0], [20, 280, 120, 160, 400])
    found = strata_of(effective)
    assert [found[effective == one][0] for one in (160.0, 80.0, 40.0, 20.0, 10.0)] == [0, 1, 1, 2, 2]
    assert set(strata_of(np.array([3.0, 900.0]))) == {0}
    assert len(strata_of(np.zeros(0))) == 0
    assert min(np.bincount(found)) >= sign_flips.MIN_STRATUM


def test_adjusted_p_values_are_those_of_the_textbook() -> None:
    p = np.array([0.01, 0.04, np.nan, 0.03, 0.005])
    np.testing.assert_allclose(benjamini_hochberg(p), [0.02, 0.04, np.nan, 0.04, 0.02])
    np.testing.assert_allclose(benjamini_yekutieli(p), [0.02 * 25 / 12, 0.04 * 25 / 12, np.nan, 0.04 * 25 / 12, 0.02 * 25 / 12])
    np.testing.assert_allclose(holm(p), [0.03, 0.06, np.nan, 0.06, 0.02])
    assert np.isnan(holm(np.array([np.nan]))).all()
