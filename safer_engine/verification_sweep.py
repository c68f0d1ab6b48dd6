"""How much to edit: arms at several budgets, the best chosen on half of the evaluation groups and judged on the other half.

The budget that looks best among several does so partly by chance, so what it looks like where it was chosen says too much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from safer_engine.science.crossed import Difference
from safer_engine.science.outcomes import Judged, OutcomeRules
from safer_engine.verification_answers import PAIRS, Answers, answer_facts, judged_facts, judged_of
from safer_engine.verification_arms import EditedPairs

Swept = Mapping[float, tuple[EditedPairs, dict[str, Answers]]]


@dataclass(frozen=True)
class Sweep:
    """Arms at several budgets.

    Attributes:
        swept: by budget, what is edited and what models of those arms answer.
        axes: edited at any budget, and in both halves of the evaluation pairs: the gain is measured on these.
        chosen: the budget of the largest gain on the choosing half; the smaller of two alike. None where no axis is in both.
        judged: what it shows on the other half. against: its differences there from `as given` and `random`.
        n_choosing, n_judging: evaluation pairs of each half.
    """

    swept: Swept
    axes: tuple[str, ...]
    chosen: float | None
    judged: Judged | None
    against: dict[str, Difference]
    n_choosing: int
    n_judging: int

    @property
    def decided(self) -> bool:
        """No further seed can change what is said of the chosen budget."""
        return self.judged is None or self.judged.decided

    @classmethod
    def of(cls, swept: Swept, choosing: frozenset[str], rules: OutcomeRules) -> Sweep:
        """Choose a budget and judge it.

        Args:
            choosing: evaluation groups by which it is chosen; it is judged on all others.
        """
        halves: dict[float, tuple[Answers, Answers]] = {}
        for budget, (_, answers) in swept.items():
            judging = frozenset(np.unique(answers[PAIRS].groups_N).tolist()) - choosing
            halves[budget] = (answers[PAIRS].of_groups(choosing), answers[PAIRS].of_groups(judging))
        edited = {axis for pairs, _ in swept.values() for axis in pairs.edited_axes}
        one, other = next(iter(halves.values()))
        axes = tuple(sorted(edited & set(one.axes) & set(other.axes)))
        sizes = (len(one.axes_N), len(other.axes_N))
        if not axes:
            return cls(swept, (), None, None, {}, *sizes)
        gains = {budget: half[0].difference(("edits", "as given"), axes).estimate for budget, half in halves.items()}
        chosen = min(gains, key=lambda budget: (-gains[budget], budget))
        held = halves[chosen][1]
        against = {name: held.difference(("edits", name), axes) for name in ("as given", "random")}
        return cls(swept, axes, chosen, judged_of(held, axes, rules), against, *sizes)


def sweep_facts(sweep: Sweep) -> dict[str, Any]:
    """A sweep as JSON."""
    return {
        "budgets": [
            {"budget": budget, "edits": pairs.counts, **answer_facts(answers)} for budget, (pairs, answers) in sweep.swept.items()
        ],
        "axes": list(sweep.axes),
        "chosen": sweep.chosen,
        "judged": None if sweep.judged is None else judged_facts(sweep.judged),
        "against": [{"reference": name, **asdict(found)} for name, found in sweep.against.items()],
        "n_choosing": sweep.n_choosing,
        "n_judging": sweep.n_judging,
    }
