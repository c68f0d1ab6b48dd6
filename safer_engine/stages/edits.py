"""What is recommended for every input row."""

from __future__ import annotations

import json
from collections import Counter
from typing import ClassVar, Literal

from safer_engine.artifacts import Artifact, Edits, PairScores, PairSet
from safer_engine.edit_lines import edit_lines
from safer_engine.stage import Draft, Inputs, StageContext


class EditsStage:
    """See `Edits` for what is written."""

    name: ClassVar[str] = "edits"
    version: ClassVar[int] = 3
    resource: ClassVar[Literal["cpu", "gpu"]] = "cpu"
    consumes: ClassVar[tuple[type[Artifact], ...]] = (PairSet, PairScores)
    produces: ClassVar[type[Artifact]] = Edits
    reads: ClassVar[tuple[str, ...]] = ("edits",)
    opens: ClassVar[tuple[str, ...]] = ()

    def run(self, ctx: StageContext, inputs: Inputs) -> Draft:
        """Recommend an action for each row, within each axis and the budget."""
        pairs, scores = inputs.get(PairSet), inputs.get(PairScores)
        lines = edit_lines(pairs.rows, pairs.pairs, scores.scores, ctx.spec.edits)
        with ctx.work.publish("edits.jsonl") as path, path.open("w", encoding="utf-8", newline="\n") as handle:
            for line in lines:
                handle.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        by_axis: dict[str, Counter[str]] = {}
        for line in lines:
            by_axis.setdefault(str(line["axis"]), Counter())[line["action"]] += 1
        return Draft(
            {
                **ctx.spec.edits.model_dump(),
                "n_rows": len(lines),
                "actions": dict(Counter(line["action"] for line in lines)),
                "statuses": dict(Counter(line["status"] for line in lines)),
                "axes": {axis: dict(counts) for axis, counts in sorted(by_axis.items())},
            }
        )
