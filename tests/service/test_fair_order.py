"""Which unit comes next: priority, fair share between projects, age, and room for jobs to start."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from service.jobs.fair_order import Candidate, Shares, fair_order


def unit(number: int, project: str = "a", priority: int = 0, *, starts: bool = False) -> Candidate:
    return Candidate(number, f"job-{number}", project, priority, (f"{number:04}", number), starts)


def shares(active: dict[str, int] | None = None, room: int = 100, served: dict[str, float] | None = None) -> Shares:
    return Shares(active or {}, dict.fromkeys("abc", room), served or {})


def test_the_oldest_comes_first_within_a_project() -> None:
    assert fair_order([unit(3), unit(1), unit(2)], shares(), 2) == (1, 2)


def test_priority_goes_before_share_and_age() -> None:
    assert fair_order([unit(1, "a"), unit(2, "b", priority=5)], shares({"b": 50}), 2) == (2, 1)


def test_the_project_with_least_running_comes_first() -> None:
    candidates = [unit(1, "a"), unit(2, "a"), unit(3, "a"), unit(4, "b"), unit(5, "b")]
    assert fair_order(candidates, shares({"a": 1}), 5) == (4, 1, 5, 2, 3)


def test_among_equals_the_one_served_longest_ago_comes_first() -> None:
    candidates = [unit(1, "a"), unit(2, "b"), unit(3, "c")]
    assert fair_order(candidates, shares(served={"a": 9.0, "b": 5.0}), 3) == (3, 2, 1)


def test_a_project_without_room_goes_on_with_what_runs() -> None:
    candidates = [unit(1, starts=True), unit(2), unit(3, "b", starts=True)]
    none = Shares({}, {"a": 0, "b": 1}, {})
    assert fair_order(candidates, none, 5) == (2, 3)


def test_room_is_used_up_as_jobs_start() -> None:
    candidates = [unit(number, starts=True) for number in range(1, 6)]
    assert fair_order(candidates, shares(room=2), 5) == (1, 2)


_units = st.builds(
    lambda number, project, priority, starts: unit(number, project, priority, starts=starts),
    st.integers(1, 10**6), st.sampled_from("abc"), st.integers(-1, 1), st.booleans(),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.lists(_units, max_size=25, unique_by=lambda each: each.unit_id),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 5)),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 3)),
    st.integers(0, 12),
)
def test_every_order_is_fair(found: list[Candidate], active: dict[str, int], room: dict[str, int], limit: int) -> None:
    chosen = fair_order(found, Shares(active, room, {}), limit)
    by_id = {each.unit_id: each for each in found}
    picked = [by_id[number] for number in chosen]
    assert len(set(chosen)) == len(chosen) <= limit
    started = Counter(each.project for each in picked if each.starts)
    assert all(count <= room.get(project, 0) for project, count in started.items())
    left = [each for each in found if each.unit_id not in chosen]
    may_go = [each for each in left if not each.starts or started[each.project] < room.get(each.project, 0)]
    assert len(chosen) == limit or not may_go
    if picked:
        assert all(each.priority <= min(one.priority for one in picked) for each in may_go)
    handed = Counter(active)
    for one in picked:
        equal = [other for other in picked[picked.index(one) :] if other.priority == one.priority and not other.starts]
        assert all(handed[one.project] <= handed[other.project] for other in equal)
        handed[one.project] += 1
