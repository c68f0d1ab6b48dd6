"""Arms hold pairs that a model can be trained on, and change as many of them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from safer_engine.science.arms import ARMS, DROP, FLIP, KEEP
from safer_engine.verification_arms import EditedPairs

N = 40


def test_no_arm_spends_an_edit_on_a_pair_that_the_base_cannot_read() -> None:
    names = tuple(f"p{i}" for i in range(N))
    codes = np.asarray([FLIP, DROP, DROP, DROP] + [KEEP] * (N - 4), dtype=np.int8)
    pairs = EditedPairs(names, np.asarray(["safety", "chat"] * (N // 2)), codes, np.linspace(1, -1, N))
    unread = {"p1", "p39", "p38", "p20"}  # one of our edits, and those of the smallest margins
    table = pa.table({"pair_id": [name for name in (*names, "only the base reads it") if name not in unread]})
    found, kept = pairs.read_by(table), pairs.known(table)["pair_id"].to_pylist()
    assert list(found.pair_ids) == kept == [name for name in names if name not in unread]
    assert found.counts == {"drop": 2, "flip": 1}
    assert found.edited_axes == ("chat", "safety")
    np.testing.assert_array_equal(found.margin_P, [pairs.margin_P[names.index(name)] for name in kept])
    for seed in range(5):
        for arm in ARMS[1:]:
            changed = found.of(arm, seed)
            for axis in ("safety", "chat"):
                at = found.axes_P == axis
                assert [int((changed[at] == code).sum()) for code in (DROP, FLIP)] == ([1, 1] if axis == "safety" else [1, 0])


def test_edits_of_unread_pairs_alone_leave_no_axis_to_judge() -> None:
    codes = np.asarray([DROP, KEEP, KEEP], dtype=np.int8)
    pairs = EditedPairs(("a", "b", "c"), np.asarray(["safety"] * 3), codes, np.zeros(3))
    assert pairs.read_by(pa.table({"pair_id": ["b", "c"]})).edited_axes == ()
