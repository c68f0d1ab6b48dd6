"""The sparse autoencoder as a frozen value: scaling, sparse encoding, decoding, and its two file forms.

    x_n = (x − shift) / scale          per position; scale and shift depend on the normalisation
    z   = TopK(W_enc (x_n − b_dec) + b_enc)
    x̂_n = z W_dec + b_dec,  x̂ = x̂_n · scale + shift

TopK: arXiv 2406.04093 eq. 1; batch top-k with a threshold at inference: arXiv 2412.06410 eq. 5–7; LayerNorm inputs and
negative values kept (relu false): arXiv 2507.00665.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from safer_engine.errors import ArtifactError, NumericalError
from safer_engine.science.topk import Selected, above, block_rows, top_k

SaeKind = Literal["topk", "batch_topk"]


@dataclass(frozen=True)
class Normalisation:
    """How activations are scaled before the SAE.

    Attributes:
        kind: `scalar`: x_n = x · scale; `layernorm`: x_n = (x − mean) / (std + eps) over the d_in dimensions of each
            position, std unbiased (arXiv 2507.00665).
        scale: the factor of `scalar` (1.0 under `layernorm`).
        eps: the ε of `layernorm`.
    """

    kind: Literal["scalar", "layernorm"]
    scale: float = 1.0
    eps: float = 1e-6


@dataclass(frozen=True)
class Normalised:
    """Scaled activations and the way back: x = x_n · scale + shift.

    Attributes:
        x_BD: scaled activations, float32.
        scale_B1: [B, 1], float32: 1/s for the scalar, std + eps for LayerNorm. A change of δ in x_n is scale · δ in x.
        shift_B1: [B, 1], float32.
    """

    x_BD: Tensor
    scale_B1: Tensor
    shift_B1: Tensor

    def undo(self, x_hat_BD: Tensor) -> Tensor:
        """Scaled reconstructions [B, D] in raw units."""
        return x_hat_BD * self.scale_B1 + self.shift_B1


@dataclass(frozen=True)
class SparseActs:
    """Activations of the latents at B positions, sparse.

    Attributes:
        values_BK: float32. 0 fills rows with fewer than K active latents. Negative only where the SAE keeps negative
            values (relu false): those take part in the reconstruction, but are not activations.
        indices_BK: latent ids, int64; distinct within a row where the value is not 0.
    """

    values_BK: Tensor
    indices_BK: Tensor

    @property
    def positive_BK(self) -> Tensor:
        """Values with everything that is no activation set to 0."""
        return self.values_BK.clamp(min=0)

    def dense(self, d_sae: int) -> Tensor:
        """All latents [B, S]; for tests and small batches."""
        dense_BS = self.values_BK.new_zeros(len(self.values_BK), d_sae)
        return dense_BS.scatter_add_(1, self.indices_BK, self.values_BK)


@dataclass(frozen=True)
class SaeShape:
    """What an SAE is, apart from its weights.

    Attributes:
        kind: `topk` (k per position) or `batch_topk` (k on average; a threshold at inference).
        relu: whether negative values after top-k are dropped.
    """

    kind: SaeKind
    d_in: int
    d_sae: int
    k: int
    relu: bool
    normalisation: Normalisation


@dataclass(frozen=True)
class Sae:
    """A trained sparse autoencoder; weights float32, on one device.

    Attributes:
        W_enc_DS, b_enc_S, W_dec_SD, b_dec_D: weights; rows of W_dec are the latents' directions in scaled units.
        threshold: what a `batch_topk` activation must exceed at inference; None for `topk`.
    """

    shape: SaeShape
    W_enc_DS: Tensor
    b_enc_S: Tensor
    W_dec_SD: Tensor
    b_dec_D: Tensor
    threshold: float | None = None

    def __post_init__(self) -> None:
        d_in, d_sae = self.shape.d_in, self.shape.d_sae
        expected = {"W_enc_DS": (d_in, d_sae), "b_enc_S": (d_sae,), "W_dec_SD": (d_sae, d_in), "b_dec_D": (d_in,)}
        for name, size in expected.items():
            weight: Tensor = getattr(self, name)
            if tuple(weight.shape) != size or weight.dtype != torch.float32:
                raise ArtifactError(f"SAE weight {name} is {weight.dtype} {tuple(weight.shape)}, not float32 {size}")
            if not bool(weight.isfinite().all()):
                raise NumericalError(f"SAE weight {name} has non-finite values", "train again with a lower sae.lr")
        if (self.shape.kind == "batch_topk") != (self.threshold is not None):
            raise ArtifactError("a batch_topk SAE needs a threshold, a topk SAE has none")
        if not 0 < self.shape.k <= d_sae:
            raise ArtifactError(f"k = {self.shape.k} is not between 1 and d_sae = {d_sae}")

    def normalise(self, x_BD: Tensor) -> Normalised:
        """Raw activations [B, D] of any float dtype, scaled. Raises NumericalError on non-finite input."""
        return normalise(x_BD, self.shape.normalisation)

    def encode(self, x_BD: Tensor) -> SparseActs:
        """Raw activations [B, D] to sparse latents; each position independent of the others."""
        return self.encode_normalised(self.normalise(x_BD).x_BD)

    def encode_normalised(self, x_BD: Tensor) -> SparseActs:
        """Scaled activations [B, D] to sparse latents."""
        parts = [self._select(self.pre_acts(block_BD)) for block_BD in self._blocks(x_BD)]
        if len(parts) == 1:
            return parts[0]
        width = max(part.values_BK.shape[1] for part in parts)
        values = [F.pad(part.values_BK, (0, width - part.values_BK.shape[1])) for part in parts]
        indices = [F.pad(part.indices_BK, (0, width - part.indices_BK.shape[1])) for part in parts]
        return SparseActs(torch.cat(values), torch.cat(indices))

    def pre_acts(self, x_BD: Tensor) -> Tensor:
        """Dense pre-activations [B, S] of scaled activations."""
        return torch.addmm(self.b_enc_S, x_BD - self.b_dec_D, self.W_enc_DS)

    def decode(self, acts: SparseActs) -> Tensor:
        """Sparse latents to reconstructions [B, D] in scaled units."""
        return weighted_rows(self.W_dec_SD, acts.indices_BK, acts.values_BK) + self.b_dec_D

    def reconstruct(self, x_BD: Tensor) -> Tensor:
        """Raw activations [B, D] to their reconstruction x̂ in raw units, float32."""
        scaled = self.normalise(x_BD)
        return scaled.undo(self.decode(self.encode_normalised(scaled.x_BD)))

    def folded(self) -> Sae:
        """The same map with the scalar input scale inside the weights (its own scale is 1).

        Raises ArtifactError under LayerNorm, which depends on the position and cannot be folded.
        """
        if self.shape.normalisation.kind != "scalar":
            raise ArtifactError("per-position LayerNorm cannot be folded into the weights", "train with sae.normalisation=scalar")
        scale = self.shape.normalisation.scale
        shape = replace(self.shape, normalisation=replace(self.shape.normalisation, scale=1.0))
        return replace(
            self,
            shape=shape,
            W_enc_DS=self.W_enc_DS * scale,
            W_dec_SD=self.W_dec_SD / scale,
            b_dec_D=self.b_dec_D / scale,
        )

    def to(self, device: torch.device | str) -> Sae:
        """The same SAE on another device."""
        weights = {name: getattr(self, name).to(device) for name in ("W_enc_DS", "b_enc_S", "W_dec_SD", "b_dec_D")}
        return replace(self, **weights)

    def tensors(self) -> dict[str, Tensor]:
        """Weights by file name, on the CPU: W_enc, b_enc, W_dec, b_dec and, for batch_topk, threshold."""
        weights = {"W_enc": self.W_enc_DS, "b_enc": self.b_enc_S, "W_dec": self.W_dec_SD, "b_dec": self.b_dec_D}
        tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        if self.threshold is not None:
            tensors["threshold"] = torch.tensor(self.threshold, dtype=torch.float32)
        return tensors

    def facts(self) -> dict[str, Any]:
        """What `tensors` does not say, as JSON values."""
        shape, scaling = self.shape, self.shape.normalisation
        return {
            "kind": shape.kind,
            "d_in": shape.d_in,
            "d_sae": shape.d_sae,
            "k": shape.k,
            "relu": shape.relu,
            "normalisation": {"kind": scaling.kind, "scale": scaling.scale, "eps": scaling.eps},
        }

    @staticmethod
    def restore(tensors: dict[str, Tensor], facts: dict[str, Any]) -> Sae:
        """The SAE of `tensors` and `facts`. Raises ArtifactError where they disagree."""
        try:
            shape = SaeShape(**{**facts, "normalisation": Normalisation(**facts["normalisation"])})
            weights = (tensors["W_enc"], tensors["b_enc"], tensors["W_dec"], tensors["b_dec"])
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"this is not an SAE of ours: {error}") from error
        threshold = float(tensors["threshold"]) if "threshold" in tensors else None
        return Sae(shape, *weights, threshold=threshold)

    def _select(self, pre_BS: Tensor) -> SparseActs:
        if self.threshold is not None:
            return _padded(above(pre_BS, self.threshold))
        top = top_k(pre_BS, self.shape.k)
        values_BK = top.values_BK.clamp(min=0) if self.shape.relu else top.values_BK
        return SparseActs(values_BK, top.columns_BK)

    def _blocks(self, x_BD: Tensor) -> Iterator[Tensor]:
        yield from torch.split(x_BD, block_rows(self.shape.d_sae, x_BD.device))


def normalise(x_BD: Tensor, normalisation: Normalisation) -> Normalised:
    """Scale raw activations [B, D]; computed and returned in float32. Raises NumericalError on non-finite input."""
    x_BD = x_BD.float()
    if x_BD.numel() and not all(math.isfinite(extreme) for extreme in x_BD.aminmax()):  # NaN goes through both
        raise NumericalError("an activation is not finite", "run the reward model in float32 (model.dtype)")
    if normalisation.kind == "scalar":
        scale_B1 = x_BD.new_full((len(x_BD), 1), 1.0 / normalisation.scale)
        return Normalised(x_BD * normalisation.scale, scale_B1, torch.zeros_like(scale_B1))
    shift_B1 = x_BD.mean(dim=1, keepdim=True)
    scale_B1 = x_BD.std(dim=1, keepdim=True, correction=1) + normalisation.eps
    return Normalised((x_BD - shift_B1) / scale_B1, scale_B1, shift_B1)


def scalar_scale(sum_of_squares: float, n_positions: int, d_in: int) -> float:
    """The factor s with mean ‖s·x‖² = d_in, from Σ‖x‖² over n positions. Raises NumericalError when there is none."""
    mean = sum_of_squares / n_positions if n_positions else 0.0
    if not (math.isfinite(mean) and mean > 0):
        raise NumericalError(f"mean squared norm of the activations is {mean}", "check the reward model's weights")
    return math.sqrt(d_in / mean)


def weighted_rows(table_SD: Tensor, indices_BK: Tensor, weights_BK: Tensor) -> Tensor:
    """Σ_k weights[b, k] · table[indices[b, k]] → [B, D], without a dense [B, S] matrix."""
    if indices_BK.shape[1] == 0:
        return table_SD.new_zeros(len(indices_BK), table_SD.shape[1])
    return F.embedding_bag(indices_BK, table_SD, mode="sum", per_sample_weights=weights_BK)


def _padded(found: Selected) -> SparseActs:
    counts_B = found.offsets_B1.diff()
    width = int(counts_B.max()) if len(counts_B) else 0
    rows_N = found.rows_N
    slot_N = torch.arange(len(rows_N), device=rows_N.device) - found.offsets_B1[rows_N]
    values_BK = found.values_N.new_zeros(len(counts_B), width)
    indices_BK = found.columns_N.new_zeros(len(counts_B), width)
    values_BK[rows_N, slot_N] = found.values_N
    indices_BK[rows_N, slot_N] = found.columns_N
    return SparseActs(values_BK, indices_BK)
