"""How far rewards move when a sequence shares its batch with others or is padded: measured before they are trusted.

A reward should depend on its text alone. Padding that leaks into attention or positions, or a wrong pad token, breaks
that silently; low precision blurs it. The yardstick is the spread of the reward margins: a drift of 0.01 SD changes
almost no preference, one of 0.3 SD changes many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from safer_engine.errors import ModelRefused, NumericalError
from safer_engine.science.batches import BatchPlan, IntArray, pad
from safer_engine.science.extraction import Reading, ShardResult, score
from safer_engine.science.hooks import rewards, rewards_from_residual
from safer_engine.science.length_limit import position_limit
from safer_engine.science.reward_model import RewardModel

DRIFT_LIMIT = {"float32": 1e-3, "bfloat16": 5e-2}
"""Largest drift in SD of the margins that passes without a warning, by dtype."""

CHANGED_LIMIT = 0.01
"""Largest share of changed preferences that passes without a warning under bfloat16."""

REFUSE_FACTOR = 5.0
"""Beyond this many times a limit the model is refused."""

_CHECK_PADDING = "check the pad token and padding side, or set model.dtype=float32 or model.attention=eager"
_MIN_CHANGED = 3
_EXTRA_PADDING = 32

Sample = Sequence[tuple[IntArray, IntArray]]
"""Token ids of (chosen, rejected) of some pairs, unpadded."""


@dataclass(frozen=True)
class Invariance:
    """How rewards moved, over a sample of pairs.

    Attributes:
        status: `ok`, `warning` or `refused` by the limits of this module.
        n_pairs: pairs in the sample; margin_sd: SD of their margins, each sequence run alone.
        batch_drift, padding_drift: largest |reward − reward alone| / margin_sd, run in mixed batches and run with
            needless padding; median_drift is the median over both.
        changed: pairs whose preference differs from that of the rewards alone in either condition.
        n_unpadded: sequences run without needless padding, because they are as long as the model can read.
    """

    status: Literal["ok", "warning", "refused"]
    dtype: str
    n_pairs: int
    margin_sd: float
    batch_drift: float
    padding_drift: float
    median_drift: float
    changed: int
    n_unpadded: int = 0

    @property
    def max_drift(self) -> float:
        """The larger of the two drifts, in SD of the margins."""
        return max(self.batch_drift, self.padding_drift)

    def sentence(self) -> str:
        """The finding in one sentence, for a person."""
        untested = "; padding was not tested: every sequence is as long as the model can read"
        return (
            f"rewards move by up to {self.max_drift:.2g} SD of the margins with batching and padding ({self.dtype}, "
            f"{self.n_pairs} pairs, {self.changed} preferences changed)"
            + (untested if self.n_unpadded == 2 * self.n_pairs else "")
        )


def measure_invariance(rm: RewardModel, sample: Sample, plan: BatchPlan) -> Invariance:
    """Compare each sequence run alone with the same run in the audit's batches and run with more padding.

    Args:
        sample: at least 2 pairs, a few dozen for a fair picture.
        plan: how the audit batches.

    Raises:
        ValueError: fewer than 2 pairs.
        ModelRefused: a reward of the sample is not finite.
    """
    if len(sample) < 2:
        raise ValueError("invariance needs at least two pairs")
    sequences = [ids for pair in sample for ids in pair]
    try:
        alone = score(rm, sequences, BatchPlan(tokens=1)).rewards_R.numpy()
    except NumericalError as error:
        raise ModelRefused(f"on the sample of {len(sample)} pairs {error.message}", error.hint) from error
    conditions = (_mixed(rm, sequences, plan), _padded(rm, sequences))
    if not all(np.isfinite(found).all() for found in conditions):
        raise ModelRefused("rewards are not finite when sequences are padded or share a batch", _CHECK_PADDING)
    margins = alone[0::2] - alone[1::2]
    spread = float(np.std(margins, ddof=1))
    drifts = [_in_spreads(np.abs(found - alone), spread) for found in conditions]
    changed = np.zeros(len(sample), dtype=bool)
    for found in conditions:
        changed |= np.sign(found[0::2] - found[1::2]) != np.sign(margins)
    same = [bool(np.array_equal(chosen, rejected)) for chosen, rejected in sample]
    n_changed = int((changed & ~np.array(same)).sum())
    dtype = rm.info.dtype
    return Invariance(
        status=_status(dtype, max(float(drift.max()) for drift in drifts), n_changed, len(sample)),
        dtype=dtype,
        n_pairs=len(sample),
        margin_sd=spread,
        batch_drift=float(drifts[0].max()),
        padding_drift=float(drifts[1].max()),
        median_drift=float(np.median(np.concatenate(drifts))),
        changed=n_changed,
        n_unpadded=_needless_padding(rm, sequences).count(0),
    )


def require_invariance(found: Invariance) -> None:
    """Raises ModelRefused where rewards depend too much on what shares the batch, or do not depend on the text at all."""
    if found.margin_sd == 0:
        raise ModelRefused(
            f"every reward is the same, or every margin is, on a sample of {found.n_pairs} pairs: there is nothing to audit",
            "check the head's weights, model.reward_index and model.reward_weights",
        )
    if found.status == "refused":
        raise ModelRefused(
            found.sentence(),
            _CHECK_PADDING,
        )


def partial_forward_drift(rm: RewardModel, layer: int, result: ShardResult, readings: Sequence[Reading], most: int = 4) -> float:
    """Largest |reward from the kept residual stream − reward of the full pass| over a few sequences, in reward units.

    Zero up to rounding where the upper blocks see only the residual stream; anything else means that effects measured
    by running the upper blocks alone cannot be trusted for this model.
    """
    if result.residuals is None:
        return 0.0
    found = result.residuals
    ids = {(reading.pair, reading.side): (index, reading.ids) for index, reading in enumerate(readings)}
    stops = found.length_n.long().cumsum(0).tolist()
    drift = 0.0
    for number, stop in enumerate(stops[:most]):
        index, sequence = ids[int(found.pair_n[number]), int(found.side_n[number])]
        ids_1T, _ = pad([sequence], rm.info.pad_id)
        h_1TD = found.h_TD[stop - int(found.length_n[number]) : stop][None]
        with torch.inference_mode():
            partial = rewards_from_residual(rm, layer, h_1TD, None, ids_1T)
        drift = max(drift, abs(float(partial[0]) - float(result.rewards_R[index])))
    return drift


def _mixed(rm: RewardModel, sequences: Sequence[IntArray], plan: BatchPlan) -> NDArray[np.float64]:
    """Rewards in batches that mix long and short sequences (worse than the audit's own, which are sorted by length)."""
    width = max(len(ids) for ids in sequences)
    rows = max(2, min(8, plan.tokens // max(1, width)))
    stride = -(-len(sequences) // rows)
    batches = [list(range(first, len(sequences), stride)) for first in range(stride)]
    return _by_batches(rm, sequences, batches, 0)


def _padded(rm: RewardModel, sequences: Sequence[IntArray]) -> NDArray[np.float64]:
    """Rewards of sequences run one by one, with padding that nothing calls for."""
    extras = _needless_padding(rm, sequences)
    return np.concatenate([_by_batches(rm, [ids], [[0]], extra) for ids, extra in zip(sequences, extras, strict=True)])


def _needless_padding(rm: RewardModel, sequences: Sequence[IntArray]) -> list[int]:
    """Columns of padding for each sequence, as far as the model's positions go."""
    limit = position_limit(rm.model.config.to_dict())  # type: ignore[operator, union-attr]
    return [_EXTRA_PADDING if limit is None else max(0, min(_EXTRA_PADDING, limit - len(ids))) for ids in sequences]


def _by_batches(rm: RewardModel, sequences: Sequence[IntArray], batches: list[list[int]], extra: int) -> NDArray[np.float64]:
    found = np.empty(len(sequences))
    with torch.inference_mode():
        for rows in batches:
            ids_BT, mask_BT = pad([sequences[row] for row in rows], rm.info.pad_id, extra)
            found[rows] = rewards(rm, ids_BT, mask_BT).cpu().numpy()
    return found


def _in_spreads(drift: NDArray[np.float64], spread: float) -> NDArray[np.float64]:
    """Drift in units of the spread; where margins do not differ at all, any drift is infinite."""
    if spread > 0:
        return drift / spread
    return np.where(drift > 0, np.inf, 0.0)


def _status(dtype: str, drift: float, changed: int, n_pairs: int) -> Literal["ok", "warning", "refused"]:
    """Limits by dtype. Under bfloat16 a refusal for changed preferences takes at least three of them: near-ties do flip."""
    limit = DRIFT_LIMIT.get(dtype, DRIFT_LIMIT["bfloat16"])
    share = changed / n_pairs if dtype != "float32" else 0.0
    if drift > REFUSE_FACTOR * limit or (share > REFUSE_FACTOR * CHANGED_LIMIT and changed >= _MIN_CHANGED):
        return "refused"
    return "warning" if drift > limit or share > CHANGED_LIMIT else "ok"
