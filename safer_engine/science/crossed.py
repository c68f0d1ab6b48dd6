"""Means of differences between retrained arms, where seeds and prompts are both drawn at random. Arrays in, values out.

Every seed trains every arm once, and every model answers the same prompts, so differences vary with the seed, with the prompt,
and with both together: crossed random effects, d_sg = μ + a_s + b_g + e_sg. An interval over prompts alone would speak of these
trainings only; one over seeds alone of these prompts only. The variance of the mean is V_s + V_g − V_sg, where V_s and V_g are
the variances of the mean over seeds and over groups of prompts, each of which holds that of the interaction, V_sg, once. Moments
of the two-way layout: Searle, Casella, McCulloch, Variance Components (1992), ch. 4. Degrees of freedom are Satterthwaite's
(1946), and with fewer than five seeds one less than seeds at most: V_s may be small there by chance, which his formula believes.

Groups vary about the mean of their subset. A subset of one group tells nothing of that: it is held against the mean of all
subsets, as collapsed strata are (Cochran, Sampling Techniques, 1977, ch. 5A.12). Where nothing varies at all, the groups that
changed are counted: a sign test, and the interval of Clopper and Pearson (1934) turned into a mean.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from safer_engine.errors import NumericalError

Floats = NDArray[np.float64]
_FEW_SEEDS = 5
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Difference:
    """A mean difference with its 95 % interval.

    Attributes:
        lo, hi: None where there is one seed or one group of prompts: nothing tells how far it varies.
        p: two-sided, of the hypothesis that the mean is 0; None with the interval.
        se, df: standard error and its degrees of freedom; None with the interval, `df` also where nothing varies.
    """

    estimate: float
    lo: float | None
    hi: float | None
    p: float | None
    se: float | None
    df: float | None
    n_seeds: int
    n_groups: int
    n_items: int


def cell_name(axis: str, subset: str) -> str:
    """`axis/subset`, no two cells alike: an axis that has a slash, or begins with a quotation mark, stands as a JSON string."""
    quoted = "/" in axis or axis.startswith('"')
    return f"{json.dumps(axis, ensure_ascii=False) if quoted else axis}/{subset}"


def cell_names(axes_N: NDArray[np.str_], subsets_N: NDArray[np.str_]) -> NDArray[np.str_]:
    """Axis and subset of each item, as one name."""
    return np.asarray([cell_name(str(axis), str(subset)) for axis, subset in zip(axes_N, subsets_N, strict=True)], dtype=np.str_)


def means_by_seed(values_SN: Floats, strata_N: NDArray[Any]) -> Floats:
    """The mean over strata of the mean over items, of each seed, [S]; their mean is the estimate of `crossed_mean`."""
    parts = [values_SN[:, strata_N == name].mean(axis=1) for name in np.unique(strata_N)]
    return np.asarray(np.mean(parts, axis=0), dtype=np.float64)


def crossed_mean(
    values_SN: Floats, groups_N: NDArray[Any], strata_N: NDArray[Any] | None = None, level: float = 0.95
) -> Difference:
    """The mean over seeds of the mean over strata of the mean over items.

    Args:
        values_SN: difference of item n between two arms of seed s.
        groups_N: prompt group of each item; items of a group are not independent.
        strata_N: subset of each item; each counts alike, whatever its size. One where None.
        level: of the interval.

    Raises NumericalError where a value is not finite, ValueError where there is none.
    """
    if values_SN.size == 0:
        raise ValueError("there is no difference to take the mean of")
    if not np.isfinite(values_SN).all():
        raise NumericalError("a difference between arms is not finite")
    n_seeds, n_items = values_SN.shape
    stratum_N = np.zeros(n_items, dtype=np.int64) if strata_N is None else np.unique(strata_N, return_inverse=True)[1]
    code_N = np.unique(groups_N, return_inverse=True)[1]
    n_groups, sizes_K = int(code_N.max()) + 1, np.bincount(stratum_N)
    weight_N = 1 / (len(sizes_K) * sizes_K[stratum_N])
    mean_SK = np.stack([np.bincount(stratum_N, weights=row) / sizes_K for row in values_SN])
    seed_S = mean_SK.mean(axis=1)
    estimate = float(seed_S.mean())
    if n_seeds < 2 or n_groups < 2:
        return Difference(estimate, None, None, None, None, None, n_seeds, n_groups, n_items)
    scale_K, df_group = _of_strata(code_N, stratum_N)
    centre_SK = np.where(np.isnan(scale_K), seed_S[:, None], mean_SK)
    scale_N = np.where(np.isnan(scale_K), np.sqrt(len(sizes_K) / max(1, len(sizes_K) - 1)), scale_K)[stratum_N]
    apart_SN = weight_N * scale_N * (values_SN - centre_SK[:, stratum_N])
    apart_SG = np.stack([np.bincount(code_N, weights=row, minlength=n_groups) for row in apart_SN])
    group_G = apart_SG.mean(axis=0)
    v_seed = float(seed_S.var(ddof=1)) / n_seeds
    v_group = float((group_G**2).sum())
    v_both = float(((apart_SG - group_G) ** 2).sum()) / (n_seeds * (n_seeds - 1))
    variance = max(v_seed + v_group - v_both, v_seed, v_group)
    spread = v_seed**2 / (n_seeds - 1) + v_group**2 / df_group + v_both**2 / ((n_seeds - 1) * df_group)
    if variance <= (_ROUNDING * float(np.abs(values_SN).max())) ** 2:
        sum_G: Floats = np.bincount(code_N, weights=weight_N * values_SN[0], minlength=n_groups).astype(np.float64)
        lo, hi, p = _alike(estimate, sum_G, level)
        return Difference(estimate, lo, hi, p, 0.0, None, n_seeds, n_groups, n_items)
    se, df = float(np.sqrt(variance)), max(1.0, variance**2 / spread)
    if n_seeds < _FEW_SEEDS:
        df = min(df, n_seeds - 1.0)
    reach = float(stats.t.ppf((1 + level) / 2, df)) * se
    p = float(2 * stats.t.sf(abs(estimate) / se, df))
    return Difference(estimate, estimate - reach, estimate + reach, p, se, df, n_seeds, n_groups, n_items)


def _of_strata(code_N: NDArray[np.int64], stratum_N: NDArray[np.int64]) -> tuple[Floats, float]:
    """Factors that make up for estimated means of strata, [K], NaN for a stratum of one group; degrees of freedom of groups."""
    stratum_M = np.unique(np.stack([stratum_N, code_N]), axis=1)[0]
    groups_K = np.bincount(stratum_M)
    single_K = groups_K == 1
    scale_K = np.sqrt(groups_K / np.where(single_K, np.nan, groups_K - 1))
    df = int((groups_K[~single_K] - 1).sum()) + max(0, int(single_K.sum()) - 1)
    return scale_K, float(min(max(1, df), int(code_N.max())))


def _alike(estimate: float, group_G: Floats, level: float) -> tuple[float, float, float]:
    """Interval and p where neither seeds nor the groups of a stratum differ: by how many groups changed, and which way.

    A share of groups like those drawn is at least that of Clopper and Pearson's bound; the others may have changed as much the
    other way. No change at all leaves 0 … 0: nothing says how much another group might change.
    """
    moved_G = group_G[group_G != 0]
    if estimate == 0 or not len(moved_G):
        return estimate, estimate, 1.0
    p = float(stats.binomtest(int((moved_G > 0).sum()), len(moved_G)).pvalue)
    near = estimate * (2 * ((1 - level) / 2) ** (1 / len(moved_G)) - 1)
    return min(estimate, near), max(estimate, near), p
