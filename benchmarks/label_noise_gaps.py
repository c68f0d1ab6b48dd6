"""Is the fusion worse than the retrained margin in a cell of the label-noise benchmark? Differences, a tolerance, Holm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.label_noise_rows import DEFAULT, FUSION, RETRAINED
from benchmarks.label_noise_table import RESAMPLES, figures, resampled
from safer_engine.science.multiple_testing import holm

TOLERANCE = 0.02
LEVEL = 0.05


@dataclass(frozen=True)
class Gap:
    """Macro average precision of a row less that of the retrained margin in one cell.

    Attributes:
        lo, hi: ends of the 95 % interval over seeds × groups.
        p_worse_allowed: one-sided p of "the row is worse by `TOLERANCE` or more", Holm over the cells; small: it is not.
        p_not_worse: one-sided p of "it is worse by no more than that", Holm over the cells; small: it is worse.
    """

    cell: str
    n_seeds: int
    estimate: float
    lo: float
    hi: float
    p_worse_allowed: float
    p_not_worse: float

    @property
    def said(self) -> str:
        """What the level allows to say."""
        if self.p_worse_allowed <= LEVEL:
            return f"not worse by {TOLERANCE:g}"
        return f"worse by more than {TOLERANCE:g}" if self.p_not_worse <= LEVEL else "open"


def gaps(cells: Mapping[str, list[Any]], row: str, seed: int = 0) -> list[Gap]:
    """Gaps of a row in all cells that have it and the retrained margin; Holm over these cells, in both directions."""
    both = {name: frames for name, frames in cells.items() if {row, RETRAINED} <= set(frames[0].columns)}
    drawn = {name: _differences(frames, row, seed) for name, frames in both.items()}
    worse = holm(np.asarray([(1 + (values <= -TOLERANCE).sum()) / (RESAMPLES + 1) for values in drawn.values()]))
    fine = holm(np.asarray([(1 + (values >= -TOLERANCE).sum()) / (RESAMPLES + 1) for values in drawn.values()]))
    found = []
    for at, (name, frames) in enumerate(both.items()):
        estimate = float(np.mean([figures(one, row).macro - figures(one, RETRAINED).macro for one in frames]))
        lo, hi = (float(end) for end in np.quantile(drawn[name], [0.025, 0.975]))
        found.append(Gap(name, len(frames), estimate, lo, hi, float(worse[at]), float(fine[at])))
    return found


def gap_tables(cells: Mapping[str, list[Any]]) -> str:
    """A table for each of the two default fusions, where cells have them."""
    blocks = []
    for row in (FUSION, DEFAULT):
        found = gaps(cells, row)
        heads = (f"{row} less {RETRAINED}, by cell", "seeds", "macro AP", "95 %", "p: worse by 0.02 or more", "says")
        lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
        for one in found:
            interval = f"{one.lo:+.3f} … {one.hi:+.3f}"
            lines.append(
                f"| {one.cell} | {one.n_seeds} | {one.estimate:+.3f} | {interval} | {one.p_worse_allowed:.3f} | {one.said} |"
            )
        blocks += ["\n".join(lines)] if found else []
    return "\n\n".join(blocks)


def _differences(frames: list[Any], row: str, seed: int) -> Any:
    """The mean difference in resamples of seeds, and of groups within each seed, [RESAMPLES]."""
    rng = np.random.default_rng(seed)
    drawn_SR = np.stack([np.subtract(*resampled(frame, (row, RETRAINED), rng)) for frame in frames])
    picks_RS = rng.integers(len(frames), size=(RESAMPLES, len(frames)))
    return drawn_SR[picks_RS, np.arange(RESAMPLES)[:, None]].mean(axis=1)
