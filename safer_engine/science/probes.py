"""Cross-validated linear Bradley–Terry probes on differences of activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import expit

from safer_engine.errors import NumericalError
from safer_engine.science.pair_deltas import Delta, require_finite

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)
"""Strengths of the ridge penalty tried, strongest first."""
_CHUNK = 8192
_ITERATIONS = 200


@dataclass(frozen=True)
class Probe:
    """A direction without intercept: the margin of a pair is Δ·weights.

    Attributes:
        weights_D: in units of Δ's own columns (the scaling is folded in).
        penalty: the ridge strength it was fitted with.
    """

    weights_D: Floats
    penalty: float


def probe_doubt(delta_PD: Delta, *, folds_P: Ints, penalties: tuple[float, ...] = PENALTIES) -> Floats:
    """Minus the margin Δ·w of a Bradley–Terry probe fitted on the other folds; float64 [P], higher = more doubtful.

    Within the training folds one fold chooses the penalty by its mean log-loss, then all of them are fitted again. Margins are in
    nats of log-odds, so they compare between folds. The activations may come from a model that saw the labels: the probe is
    cross-fitted, the features are not.

    Args:
        delta_PD: Δ of the pairs of one axis, dense or CSR.
        folds_P: fold of each pair, at least two folds; with two, the strongest penalty is used.
        penalties: ridge strengths, strongest first.
    """
    require_finite(delta_PD, "Δ")
    out = np.zeros(delta_PD.shape[0])
    n_folds = int(folds_P.max()) + 1
    for fold in range(n_folds):
        train = np.flatnonzero(folds_P != fold)
        penalty = penalties[0]
        if n_folds > 2 and len(penalties) > 1:
            chooser = folds_P[train] == (fold + 1) % n_folds
            penalty = _choose(delta_PD[train[~chooser]], delta_PD[train[chooser]], penalties)
        held_out = np.flatnonzero(folds_P == fold)
        probe = fit_probe(delta_PD[train], penalty)
        out[held_out] = -(delta_PD[held_out] @ probe.weights_D)
    return out


def fit_probe(delta_PD: Delta, penalty: float, start_D: Floats | None = None) -> Probe:
    """Minimise mean log(1 + e^{−x·w}) + penalty/2 · ‖w‖², x = Δ with columns of unit mean square, divided by √D.

    No intercept: a row and its mirror image get opposite margins. Columns that are always 0 get weight 0.

    Args:
        start_D: starting weights, in units of Δ's columns.

    Raises:
        NumericalError: the fit did not give finite weights.
    """
    scale_D = _column_scale(delta_PD)
    start = (
        np.zeros(len(scale_D)) if start_D is None else np.divide(start_D, scale_D, out=np.zeros_like(scale_D), where=scale_D > 0)
    )

    def objective(v_D: Floats) -> tuple[float, Floats]:
        loss, gradient, weights = 0.0, np.zeros_like(v_D), v_D * scale_D
        for block in _blocks(delta_PD):
            margin = block @ weights
            loss += float(np.logaddexp(0.0, -margin).sum())
            gradient -= block.T @ expit(-margin)
        n = delta_PD.shape[0]
        return loss / n + penalty / 2 * float(v_D @ v_D), gradient * scale_D / n + penalty * v_D

    fit = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": _ITERATIONS})
    if not np.isfinite(fit.x).all():
        raise NumericalError("the Bradley–Terry probe did not converge to finite weights")
    return Probe(np.asarray(fit.x * scale_D), penalty)


def _choose(train_PD: Delta, chooser_PD: Delta, penalties: tuple[float, ...]) -> float:
    losses, weights = [], None
    for penalty in penalties:
        weights = fit_probe(train_PD, penalty, weights).weights_D
        losses.append(float(np.logaddexp(0.0, -(chooser_PD @ weights)).mean()))
    return penalties[int(np.argmin(losses))]


def _column_scale(delta_PD: Delta) -> Floats:
    total = np.zeros(delta_PD.shape[1])
    for block in _blocks(delta_PD):
        total += np.asarray((block * block).sum(axis=0)).ravel()
    rms = np.sqrt(total / delta_PD.shape[0])
    return np.asarray(np.divide(1.0, rms * np.sqrt(len(rms)), out=np.zeros_like(rms), where=rms > 0))


def _blocks(delta_PD: Delta) -> Iterator[Delta]:
    for start in range(0, delta_PD.shape[0], _CHUNK):
        block = delta_PD[start : start + _CHUNK].astype(np.float64)
        yield sparse.csr_array(block) if sparse.issparse(block) else block
