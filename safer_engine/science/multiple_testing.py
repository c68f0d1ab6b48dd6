"""Adjusting p-values for how many were looked at. Arrays in, arrays out; NaN is a test that was not made, and stays NaN.

`benjamini_hochberg` (1995, procedure 1) keeps the expected share of false ones among the discoveries at the level where tests
are independent or positively dependent (PRDS); `benjamini_yekutieli` (2001, theorem 1.3) does so under any dependence, at the
price of a factor of about log m; `holm` (1979) keeps the chance of any false discovery at the level.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def benjamini_hochberg(p: Floats) -> Floats:
    """q-values in [0, 1]: the smallest false-discovery rate at which each test is a discovery."""
    return _step_up(p, 1.0)


def benjamini_yekutieli(p: Floats) -> Floats:
    """The same, valid under any dependence."""
    n = int(np.isfinite(p).sum())
    return _step_up(p, float((1 / np.arange(1, n + 1)).sum()))


def holm(p: Floats) -> Floats:
    """Adjusted p-values in [0, 1] of the step-down procedure."""
    adjusted, made = np.full(len(p), np.nan), np.flatnonzero(np.isfinite(p))
    order = made[np.argsort(p[made], kind="stable")]
    raised = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(raised), 1)
    return adjusted


def _step_up(p: Floats, factor: float) -> Floats:
    q, made = np.full(len(p), np.nan), np.flatnonzero(np.isfinite(p))
    order = made[np.argsort(p[made], kind="stable")]
    raised = factor * p[order] * len(order) / np.arange(1, len(order) + 1)
    q[order] = np.minimum(np.minimum.accumulate(raised[::-1])[::-1], 1)
    return q
