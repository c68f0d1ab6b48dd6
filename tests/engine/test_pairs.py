"""Survey of a dataset: ids, groups, drops, leakage and sampling on rows whose fate is known."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safer_engine.errors import DatasetRefused
from safer_engine.science.drops import Drop
from safer_engine.science.pair_formats import Layout, read_pairs
from safer_engine.science.pairs import Candidate, Entry, Sampling, candidate, group_pairs, prompt_keys, row_statuses, select

LONG = "This answer is long enough that nobody would write the very same words twice by chance, surely."


def row(prompt: str = "p", chosen: Any = "good", rejected: str = "bad", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def candidates(rows: list[dict[str, Any]], layout: str = "trl") -> list[Candidate]:
    return [candidate(pair) for pair in read_pairs(rows, Layout(layout, {}, "safer"))]


def entries(rows: list[dict[str, Any]], sampling: Sampling = Sampling(), layout: str = "trl") -> tuple[Entry, ...]:  # noqa: B008
    return select(candidates(rows, layout), sampling)


def test_given_ids_are_kept_and_others_come_from_the_content() -> None:
    first, second, third = entries([row(id="a"), row("q"), row("q2", id=None)])
    assert first.pair_id == first.row_id == "a"
    assert second.pair_id == second.digest[:16]
    assert third.pair_id == third.digest[:16] != second.pair_id
    again = entries([row("other"), row("q")])[1]
    assert again.pair_id == second.pair_id, "an id from the content doesn't depend on the place"


def test_content_digest_covers_what_the_pair_says_and_nothing_else() -> None:
    base = entries([row()])[0].digest
    assert entries([row(id="x", group="g", axis="safety", note=3)])[0].digest == base
    for other in (row("p2"), row(chosen="better"), row(rejected="worse"), row(chosen="bad", rejected="good")):
        assert entries([other])[0].digest != base


def test_the_same_id_twice_is_refused_by_name() -> None:
    with pytest.raises(DatasetRefused, match="same id: a, b"):
        entries([row(str(n), id=name) for n, name in enumerate("aabbc")])


def test_an_id_that_looks_like_a_part_of_another_is_refused() -> None:
    several = {"id": "x", "prompt": "p", "chosen": ["a"], "rejected": ["b", "c"]}
    with pytest.raises(DatasetRefused, match="x#1"):
        entries([several, row("q", id="x#1")], layout="rewardbench")


def test_a_row_of_several_pairs() -> None:
    rows = [{"prompt": "p", "chosen": ["a"], "rejected": ["b", "c"]}, row("q", id="y")]
    found = entries(rows, layout="rewardbench")
    assert [entry.pair_id for entry in found] == [f"{found[0].row_id}#1", f"{found[0].row_id}#2", "y"]
    assert found[0].row_digest == found[1].row_digest != found[0].digest
    assert found[0].group == found[1].group != found[2].group


def test_duplicates_are_dropped_and_still_have_an_id_of_their_own() -> None:
    found = entries([row(), row(), row(chosen=" good"), row(axis="safety"), row(id="z")])
    reasons = [entry.reason for entry in found]
    assert reasons == [None, Drop.DUPLICATE, None, Drop.DUPLICATE, Drop.DUPLICATE]
    assert len({entry.pair_id for entry in found}) == 5
    assert found[1].pair_id == f"{found[0].pair_id}~2"


def test_unusable_sides() -> None:
    found = entries([row(chosen=" \n"), row(rejected=""), row(chosen="same ", rejected="same"), row(chosen=3)])
    assert [entry.reason for entry in found] == [Drop.EMPTY_SIDE, Drop.EMPTY_SIDE, Drop.IDENTICAL_SIDES, Drop.MALFORMED]


def test_pairs_in_both_orders_are_flagged_and_kept() -> None:
    found = entries([row("p", "a", "b"), row("p", "b", "a"), row("q", "b", "a"), row("p", "a", "c")])
    assert [entry.both_orders for entry in found] == [True, True, False, False]
    assert all(entry.reason is None for entry in found)


def test_groups_link_same_first_turns_and_same_long_responses() -> None:
    rows = [
        row("How do I  bake BREAD?", "x1", "y1"),
        row("how do i bake bread?", "x2", LONG),
        row("another question", LONG.upper(), "y3"),
        row("a third one", "short", "y4"),
        row("a fourth one", "short", "y5"),
        row("", "nothing before", "this"),
    ]
    groups = group_pairs(candidates(rows))
    assert groups[0] == groups[1] == groups[2]
    assert len(set(groups)) == 4
    backwards = group_pairs(candidates(rows[::-1]))
    assert backwards == groups[::-1], "names don't depend on the order"


def test_the_first_user_turn_counts_not_the_whole_prompt() -> None:
    ask = {"role": "user", "content": "Hi there"}
    more = [ask, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "And?"}]
    system = [{"role": "system", "content": "Be brief"}, ask]
    groups = group_pairs(candidates([{**row(), "prompt": prompt} for prompt in ([ask], more, system)]))
    assert len(set(groups)) == 1


def test_given_groups_are_kept() -> None:
    rows = [row("same", "a", LONG, group="g1"), row("same", "b", LONG, group="g2"), row("same", "c", "d")]
    first, second, third = group_pairs(candidates(rows))
    assert (first, second) == ("g1", "g2")
    assert third not in ("g1", "g2")


def test_evaluation_prompts_seen_in_training_are_dropped() -> None:
    keys = prompt_keys(candidates([row("How are you?"), row("", "no prompt", "x"), row("broken", chosen=None)]))
    rows = [row("how  are you? "), row("How are we?"), row("", "n", "m"), row("how are you?", "same", "same")]
    reasons = [entry.reason for entry in select(candidates(rows), Sampling(), keys)]
    assert reasons == [Drop.IN_TRAINING_DATA, None, None, Drop.IDENTICAL_SIDES]


def test_row_statuses_have_one_line_per_row() -> None:
    rows = [
        {"id": "a", "prompt": "p", "chosen": ["x"], "rejected": ["x", "y"]},
        {"id": "b", "prompt": "q", "chosen": ["x"], "rejected": ["x", "x"]},
        row("r", id="c", chosen=1),
    ]
    found = entries(rows, layout="rewardbench")
    statuses = row_statuses(found, [entry.reason for entry in found])
    assert [(s.row, s.pair_id, s.reason) for s in statuses] == [
        (0, "a", None),
        (1, "b", Drop.IDENTICAL_SIDES),
        (2, "c", Drop.MALFORMED),
    ]


ROWS = st.lists(
    st.builds(
        row,
        prompt=st.sampled_from(["p0", "p1", "p2", "p3", ""]),
        chosen=st.sampled_from(["a", "b", LONG, ""]),
        rejected=st.sampled_from(["a", "c", LONG + "!", "d"]),
        axis=st.sampled_from(["safety", "chat", None]),
    ),
    min_size=1,
    max_size=30,
)


@given(rows=ROWS)
def test_every_pair_has_one_fate_and_a_unique_id(rows: list[dict[str, Any]]) -> None:
    found = entries(rows)
    assert len(found) == len(rows)
    assert len({entry.pair_id for entry in found}) == len(rows)
    kept = [entry.digest for entry in found if entry.reason is None]
    assert len(kept) == len(set(kept))


@given(rows=ROWS)
def test_groups_are_the_connected_parts_of_shared_keys(rows: list[dict[str, Any]]) -> None:
    """Against a second implementation: spread labels along shared keys until nothing changes."""
    found = candidates(rows)
    labels = list(range(len(found)))
    changed = True
    while changed:
        changed = False
        for i, one in enumerate(found):
            for j, other in enumerate(found):
                linked = set(one.links) & set(other.links) or (one.digest == other.digest)
                if linked and labels[i] != labels[j]:
                    labels[i] = labels[j] = min(labels[i], labels[j])
                    changed = True
    groups = group_pairs(found)
    for i in range(len(found)):
        for j in range(len(found)):
            assert (groups[i] == groups[j]) == (labels[i] == labels[j])


def many() -> list[dict[str, Any]]:
    """Forty groups of one to three pairs, three quarters of them safety."""
    return [
        row(f"prompt {g}", f"good {g} {i}", "bad", axis="chat" if g % 4 == 0 else "safety")
        for g in range(40)
        for i in range(1 + g % 3)
    ]


@pytest.mark.parametrize("stratify", [None, "axis", "subset"])
@pytest.mark.parametrize("size", [2, 17, 40])
def test_samples_take_whole_groups(size: int, stratify: Any) -> None:
    found = entries(many(), Sampling(size, stratify, seed=3))
    fates: dict[str, set[Any]] = {}
    for entry in found:
        fates.setdefault(entry.group, set()).add(entry.reason)
    assert all(len(reasons) == 1 for reasons in fates.values())
    kept = sum(entry.reason is None for entry in found)
    assert size - 3 < kept <= size
    assert kept + sum(entry.reason is Drop.SAMPLED_OUT for entry in found) == len(found)


def test_a_stratified_sample_keeps_the_shares() -> None:
    found = entries(many(), Sampling(40, "axis", seed=1))
    whole, kept = Counter(e.axis for e in found), Counter(e.axis for e in found if e.reason is None)
    for axis in whole:
        assert abs(kept[axis] - 40 * whole[axis] / len(found)) <= 2


def test_samples_depend_on_the_seed_and_not_on_the_order() -> None:
    rows = many()

    def kept(order: list[dict[str, Any]], seed: int) -> set[str]:
        return {entry.pair_id for entry in entries(order, Sampling(20, seed=seed)) if entry.reason is None}

    assert kept(rows, 0) == kept(rows[::-1], 0)
    assert kept(rows, 0) != kept(rows, 1)


def test_a_sample_larger_than_the_data_is_the_data() -> None:
    assert all(entry.reason is None for entry in entries(many(), Sampling(10_000, "axis")))
