import numpy as np
import pytest

from safer_engine.science.contexts import TopContexts, merge_contexts, sample_contexts, span_round, without_groups_of
from safer_engine.science.held_out import PoolActs, Sequences, draw_pool, match_windows


def contexts(latents: list[int], activations: list[float], responses: list[int], positions: list[int]) -> TopContexts:
    return TopContexts(
        np.asarray(latents, dtype=np.int32),
        np.asarray(activations, dtype=np.float32),
        np.asarray(responses, dtype=np.int64),
        np.asarray(positions, dtype=np.int32),
    )


def drawn(n: int, seed: int) -> TopContexts:
    rng = np.random.default_rng(seed)
    return contexts(
        rng.integers(0, 3, n).tolist(),
        rng.exponential(size=n).tolist(),
        rng.permutation(4 * n)[:n].tolist(),
        rng.integers(0, 9, n).tolist(),
    )


def test_a_sample_does_not_depend_on_how_parts_were_made() -> None:
    every = drawn(300, 0)
    groups = np.random.default_rng(1).integers(0, 120, 600)
    whole = sample_contexts([every], 7, groups, 5)
    parts = [every.take(np.arange(start, 300, 3)) for start in range(3)]
    joined = sample_contexts([sample_contexts([part], 7, groups, 5) for part in parts], 7, groups, 5)
    np.testing.assert_array_equal(whole.responses_N, joined.responses_N)
    for latent in range(3):
        mine = groups[whole.responses_N[whole.latents_N == latent] // 2]
        assert len(set(mine.tolist())) == len(mine) == 7
    other = sample_contexts([every], 7, groups, 6)
    assert other.responses_N.tolist() != whole.responses_N.tolist()


def test_the_first_drawn_goes_by_activation() -> None:
    """Of two responses with activations 3 and 1, the first is drawn in three of four."""
    n = 4000
    latents = np.repeat(np.arange(n), 2).tolist()
    pair = contexts(latents, [3.0, 1.0] * n, [0, 2] * n, [0] * (2 * n))
    found = sample_contexts([pair], 1, np.arange(2), 9)
    assert np.mean(found.responses_N == 0) == pytest.approx(0.75, abs=0.02)


def test_groups_that_were_shown_are_left_out() -> None:
    every = drawn(300, 3)
    groups = np.random.default_rng(4).integers(0, 60, 600)
    shown = merge_contexts([every], 5, groups)
    left = without_groups_of(sample_contexts([every], 15, groups, 0), shown, 10, groups)
    for latent in range(3):
        seen = set(groups[shown.responses_N[shown.latents_N == latent] // 2].tolist())
        mine = groups[left.responses_N[left.latents_N == latent] // 2].tolist()
        assert len(mine) == 10
        assert not seen & set(mine)


def sequences(lengths: list[int], strata: list[int], groups: list[int]) -> Sequences:
    n = np.asarray(lengths)
    return Sequences(n, np.zeros_like(n), n, np.asarray(strata), np.asarray(groups))


def test_a_match_is_of_the_stratum_near_in_length_and_place_and_silent() -> None:
    made = sequences([100, 90, 100, 40, 100, 100], [0, 0, 1, 0, 0, 0], [0, 1, 2, 3, 0, 4])
    everywhere = {at: np.arange(made.lengths_R[at]) for at in range(1, 6)}
    fired = contexts([7], [2.0], [0], [50])
    shown = contexts([7], [9.0], [5], [10])
    pool = PoolActs(everywhere, {7: {1: np.asarray([44])}})
    match = match_windows(fired, shown, pool, made, 10)[0]
    assert (match.row, match.response) == (0, 1)  # 2 is of another stratum, 4 of its own group, 5 of a group shown
    assert match.position in (38, 39, 50, 51)  # nearest to the middle whose window leaves out token 44
    span = span_round(match.position, 90, 10)
    assert not span.start <= 44 < span.stop
    loud = PoolActs(everywhere, {7: {1: np.arange(90)}})
    assert match_windows(fired, shown, loud, made, 10)[0].response == 3
    assert match_windows(fired, shown, PoolActs(everywhere, {7: {1: np.arange(90), 3: np.arange(40)}}), made, 10) == []


def test_no_group_matches_two_windows_of_a_latent() -> None:
    made = sequences([50] * 8, [0] * 8, [0, 1, 2, 3, 4, 4, 5, 5])
    pool = PoolActs({at: np.arange(50) for at in range(4, 8)}, {})
    fired = contexts([1, 1, 1, 2], [1.0] * 4, [0, 1, 2, 3], [5, 6, 7, 8])
    found = match_windows(fired, contexts([], [], [], []), pool, made, 10)
    assert [match.row for match in found] == [0, 1, 3]
    assert {int(made.groups_R[match.response]) for match in found[:2]} == {4, 5}
    assert [match.position for match in found] == [5, 6, 8]


def test_the_pool_takes_every_stratum_and_a_group_once() -> None:
    rng = np.random.default_rng(0)
    strata, groups = rng.integers(0, 4, 3000), rng.integers(0, 900, 3000)
    made = sequences([10] * 3000, strata.tolist(), groups.tolist())
    pool = draw_pool(made, 20, np.random.default_rng(1))
    assert (np.diff(pool) > 0).all()
    assert set(strata[pool].tolist()) == {0, 1, 2, 3}
    assert len({(a, b) for a, b in zip(strata[pool], groups[pool], strict=True)}) == len(pool)
    assert all((strata[pool] == one).sum() <= 512 for one in range(4))
