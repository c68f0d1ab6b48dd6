"""Figures of the label-noise benchmark: a table over seeds, and what the SAE adds with its interval."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.label_noise_rows import (
    DEFAULT,
    DEFAULT_DENSE,
    DENSE,
    DENSE_INSTEAD,
    FUSION,
    LATENTS,
    MARGIN,
    PAPER,
    PROBE,
    RETRAINED,
    WITHOUT,
)
from safer_engine.errors import SpecError
from safer_engine.science.stats import auroc, average_precision, precision_at

Floats = NDArray[np.float64]
NAMES = ("pair_id", "group", "axis", "subset", "flipped")
BUDGETS = (0.01, 0.02, 0.05, 0.1)
AXIS = "safety"
RESAMPLES = 1000
COMPARED = (
    *((FUSION, other) for other in (RETRAINED, WITHOUT, DENSE_INSTEAD, DEFAULT, MARGIN, PAPER)),
    *((DEFAULT, other) for other in (RETRAINED, DEFAULT_DENSE, MARGIN, PROBE, PAPER)),
    (LATENTS, DENSE),
)
"""Rows whose ratio is printed, where a cell has both; FUSION over RETRAINED decides, over the next two is what the SAE adds."""


@dataclass(frozen=True)
class Figures:
    """One row of one cell: average precision by subset, AUROC (mean over subsets), precision at each budget of the axis."""

    precision: dict[str, float]
    auroc: float
    at: tuple[float, ...]

    @property
    def macro(self) -> float:
        return float(np.mean(list(self.precision.values())))


@dataclass(frozen=True)
class Ratio:
    """Macro average precision of one row over another's, with the ends of its 95 % interval."""

    estimate: float
    lo: float
    hi: float


def figures(frame: Any, row: str) -> Figures:
    """Figures of a row on the flipped axis."""
    axis = frame[frame.axis == AXIS]
    by_subset = dict(list(axis.groupby("subset")))
    return Figures(
        precision={str(name): average_precision(part.flipped, part[row]) for name, part in by_subset.items()},
        auroc=float(np.mean([auroc(part.flipped, part[row]) for part in by_subset.values()])),
        at=tuple(precision_at(axis.flipped, axis[row], budget) for budget in BUDGETS),
    )


def ratio(frames: list[Any], row: str, other: str, seed: int = 0) -> Ratio:
    """Macro average precision of `row` over that of `other`, paired: seeds are drawn, and groups within each seed.

    A draw of a seed gives every group a multiplicity, the same for both rows.
    """
    rng = np.random.default_rng(seed)
    estimate = np.mean([figures(frame, row).macro for frame in frames]) / np.mean(
        [figures(frame, other).macro for frame in frames]
    )
    drawn = [resampled(frame, (row, other), rng) for frame in frames]
    picks = rng.integers(len(frames), size=(RESAMPLES, len(frames)))
    tops, bottoms = (np.mean([[drawn[s][k, r] for s in picks[r]] for r in range(RESAMPLES)], axis=1) for k in (0, 1))
    lo, hi = np.quantile(tops / bottoms, [0.025, 0.975])
    return Ratio(float(estimate), float(lo), float(hi))


def resampled(frame: Any, rows: tuple[str, str], rng: np.random.Generator) -> Floats:
    """Macro average precision of two rows in resamples of the groups, [2, RESAMPLES]."""
    axis = frame[frame.axis == AXIS]
    codes = np.unique(axis.group, return_inverse=True)[1]
    n_groups = codes.max() + 1
    times = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=RESAMPLES)[:, codes]
    subsets = axis.subset.to_numpy()
    found = np.zeros((2, RESAMPLES))
    for k, row in enumerate(rows):
        values, truth = axis[row].to_numpy(), axis.flipped.to_numpy()
        parts = [np.flatnonzero(subsets == name) for name in np.unique(subsets)]
        found[k] = np.mean([weighted_precision(truth[at], values[at], times[:, at]) for at in parts], axis=0)
    return found


def weighted_precision(truth: NDArray[np.bool_], score: Floats, times: NDArray[np.int64]) -> Floats:
    """Average precision with each row taken `times` times, [R] for times [R, P]; rows of equal score in their given order."""
    order = np.argsort(-score, kind="stable")
    weights, hits = times[:, order].astype(np.float64), truth[order].astype(np.float64)
    taken, right = np.cumsum(weights, axis=1), np.cumsum(weights * hits, axis=1)
    precision = np.divide(right, taken, out=np.zeros_like(right), where=taken > 0)
    return np.asarray((precision * weights * hits).sum(axis=1) / np.maximum(right[:, -1], 1.0))


def markdown_table(out: Path) -> str:
    """The tables of all cells in a folder, one for each (target, share), and the gaps to the comparator over all of them."""
    import pandas as pd

    from benchmarks.label_noise_gaps import gap_tables

    blocks, cells = [], {}
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        paths = sorted(folder.glob("seed-*/scores.parquet"))
        if paths:
            cells[folder.name] = [pd.read_parquet(path) for path in paths]
            blocks.append(_block(folder.name, [path.parent.name for path in paths], cells[folder.name]))
            blocks.append("\n".join(_facts(path.parent) for path in paths))
    blocks += [text for text in [gap_tables(cells)] if text]
    return "\n\n".join(blocks) if blocks else "no cell has scores yet"


def keep(out: Path, kept: Path) -> list[Path]:
    """Copy what the table is made of to a folder of records: ranks of the flipped axis in the scores' place, groups as numbers.

    The table of `kept` is the table of `out`, to the last digit; no text and no id of a pair is in it.
    """
    import pandas as pd
    from scipy.stats import rankdata

    written = []
    for source in sorted(out.glob("*/seed-*/scores.parquet")):
        frame = pd.read_parquet(source)
        axis = frame[frame.axis == AXIS]
        columns: dict[str, Any] = {"group": np.unique(axis.group, return_inverse=True)[1].astype(np.int32)}
        columns |= {name: axis[name].to_numpy() for name in ("axis", "subset", "flipped")}
        rows = [column for column in frame.columns if column not in NAMES]
        columns |= {row: rankdata(axis[row], method="min").astype(np.uint16) for row in rows}
        target = kept / source.relative_to(out)
        target.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(columns).to_parquet(target, compression="zstd")
        (target.parent / "facts.json").write_bytes((source.parent / "facts.json").read_bytes())
        written.append(target)
    return written


def _block(name: str, seeds: list[str], frames: list[Any]) -> str:
    rows = [column for column in frames[0].columns if column not in NAMES]
    others = {seed for seed, frame in zip(seeds, frames, strict=True) if set(rows) != set(frame.columns) - set(NAMES)}
    if others:
        raise SpecError(f"{name}: {', '.join(sorted(others))} has other rows than {seeds[0]}", "score them alike: --rescore")
    found = {row: [figures(frame, row) for frame in frames] for row in rows}
    subsets = list(found[rows[0]][0].precision)
    shares = [float(frame[frame.axis == AXIS].flipped.mean()) for frame in frames]
    heads = ["ranking of the safety pairs", "macro AP", *subsets, "AUROC", *(f"P@{budget:.0%}" for budget in BUDGETS)]
    lines = [
        f"**{name}**: {', '.join(seeds)}; {_spread(shares)} of the safety pairs are flipped",
        "",
        f"| {' | '.join(heads)} |",
        f"|{' --- |' * len(heads)}",
    ]
    for row in sorted(rows, key=lambda row: np.mean([one.macro for one in found[row]])):
        cells = [_spread([one.macro for one in found[row]])]
        cells += [_spread([one.precision[subset] for one in found[row]]) for subset in subsets]
        cells += [_spread([one.auroc for one in found[row]])]
        cells += [_spread([one.at[at] for one in found[row]]) for at in range(len(BUDGETS))]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    lines.append("")
    for row, other in (pair for pair in COMPARED if set(pair) <= set(rows)):
        compared = ratio(frames, row, other)
        lines.append(f"- {row} / {other}: {compared.estimate:.2f} (95 %: {compared.lo:.2f} … {compared.hi:.2f})")
    return "\n".join(lines)


def _facts(folder: Path) -> str:
    """What the reward model and the SAE of a cell are worth."""
    path = folder / "facts.json"
    facts = json.loads(path.read_bytes()) if path.is_file() else {}
    figures = {**facts.get("accuracy", {}), "FVU": facts.get("sae", {}).get("fvu"), "L0": facts.get("sae", {}).get("l0")}
    found = [f"{name} {value:.3f}" for name, value in figures.items() if isinstance(value, float)]
    told = ", ".join(f"{row} {bits:.3f}" for row, bits in facts.get("label_bits", {}).items())
    lines = [f"- {folder.name}: {', '.join(found) or 'no facts'}" + (f"; bits a label: {told}" if told else "")]
    for row, fitted in facts.get("probabilities", {}).items():
        lines.append(f"  - {row}: " + (_told(fitted) if "reliability" in fitted else f"a rank: {fitted['reason']}"))
    return "\n".join(lines)


def _told(fitted: dict[str, Any]) -> str:
    """Share of wrong labels as estimated, and reliability by subset."""
    parts = [f"share {fitted['share']:.3f} [{fitted['lo']:.3f}, {fitted['hi']:.3f}]"]
    for subset, one in fitted["reliability"].items():
        brier, ece = (f"{one[name]['value']:.3f} [{one[name]['lo']:.3f}, {one[name]['hi']:.3f}]" for name in ("brier", "ece"))
        parts.append(
            f"{subset or 'all'}: {one['share']:.3f} flipped, Brier {brier} (constant {one['constant']:.3f}), ECE {ece} "
            f"(chance {one['ece_chance']:.3f}), {one['flipped_above_half']} of {one['n_above_half']} above ½ flipped"
        )
    return "; ".join(parts)


def _spread(values: list[float]) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    mean = float(np.mean(values))
    return f"{mean:.3f} ± {float(np.std(values, ddof=1)):.3f}" if len(values) > 1 else f"{mean:.3f}"
