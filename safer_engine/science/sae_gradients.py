"""Loss and gradients of one SAE training step, by hand and sparse.

Only the encoder product is dense. The decoder is a weighted sum of k rows per position, the gradient of the activations
exists at the active entries alone, and each weight gradient is again a weighted sum of rows, over the positions at which
a latent is active. No dense [B, S] gradient is ever made. The result equals automatic differentiation of the dense form.

Losses: batch-variance normalised error (FVU) or the paper's NMSE (arXiv 2507.00665); AuxK: arXiv 2406.04093, appendix A.2,
its error normalised by the variance of the residual it models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from safer_engine.science.sae import SaeKind
from safer_engine.science.topk import Selected, TopK, above, batch_top_k, block_rows, joined, largest, top_k

_GUESS_SHARE = 0.9


@dataclass(frozen=True)
class Weights:
    """Weights of an SAE in training, or one gradient for each; float32.

    Attributes:
        W_enc_SD: encoder, one row per latent (transposed against the stored form: rows are what is gathered).
        W_dec_SD: decoder, one direction per latent.
    """

    W_enc_SD: Tensor
    b_enc_S: Tensor
    W_dec_SD: Tensor
    b_dec_D: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        yield from (self.W_enc_SD, self.b_enc_S, self.W_dec_SD, self.b_dec_D)

    def rows(self, latents_M: Tensor) -> Weights:
        """The weights of some latents; the decoder bias is shared."""
        return Weights(self.W_enc_SD[latents_M], self.b_enc_S[latents_M], self.W_dec_SD[latents_M], self.b_dec_D)


@dataclass(frozen=True)
class StepSettings:
    """What the loss of a step depends on besides weights and data.

    Attributes:
        aux_k: latents per position in the AuxK loss; 0 turns it off.
        matmul: precision of the encoder product; None: that of the weights. A coarser one only chooses the latents;
            their values are computed again in the weights' precision, at the chosen entries.
    """

    kind: SaeKind
    k: int
    relu: bool
    loss: Literal["fvu", "nmse"]
    aux_k: int
    aux_weight: float
    matmul: torch.dtype | None = None


@dataclass(frozen=True)
class StepOutcome:
    """What one batch says.

    Attributes:
        gradients: of loss + aux_weight · aux_loss.
        loss: reconstruction loss, scalar tensor; aux_loss: scalar tensor, 0 where nothing is dead.
        fired_S: bool, latents with a positive activation in this batch.
        l0: mean number of positive activations per position, scalar tensor.
        smallest: smallest positive activation, scalar tensor; infinite where there is none.
    """

    gradients: Weights
    loss: Tensor
    aux_loss: Tensor
    fired_S: Tensor
    l0: Tensor
    smallest: Tensor


@dataclass(frozen=True)
class _Error:
    loss: Tensor
    grad_BD: Tensor


def step_gradients(
    weights: Weights, x_BD: Tensor, settings: StepSettings, dead_S: Tensor | None = None, guess: float | None = None
) -> StepOutcome:
    """Loss and gradients on one batch of scaled activations.

    Args:
        x_BD: scaled activations [B, D], float32.
        dead_S: bool; latents that the AuxK loss revives. None: no AuxK loss.
        guess: the batch top-k threshold of the previous step, if known.
    """
    with torch.no_grad():
        centred_BD = x_BD - weights.b_dec_D
        code = _encode(weights, centred_BD, settings, guess)
        decoded = _decode(code, weights.W_dec_SD)
        residual_BD = centred_BD - decoded.rows_BD
        error = _fvu(residual_BD, centred_BD) if settings.loss == "fvu" else _nmse(residual_BD, x_BD)
        gradients = _backpropagate(weights, centred_BD, decoded, error.grad_BD, settings.relu)
        gradients.b_dec_D.add_(error.grad_BD.sum(0))
        aux_loss = error.loss.new_zeros(())
        if dead_S is not None and settings.aux_k > 0:
            aux_loss = _add_aux(gradients, weights, centred_BD, residual_BD, dead_S.nonzero().squeeze(1), settings)
        positive_N = code.values_N > 0
        fired_S = torch.zeros(len(weights.b_enc_S), dtype=torch.bool, device=x_BD.device)
        fired_S[code.columns_N[positive_N]] = True
        smallest = code.values_N.masked_fill(~positive_N, torch.inf).amin() if len(code.values_N) else aux_loss + torch.inf
        return StepOutcome(gradients, error.loss, aux_loss, fired_S, positive_N.sum() / len(x_BD), smallest)


def _encode(weights: Weights, centred_BD: Tensor, settings: StepSettings, guess: float | None) -> Selected:
    own = weights.W_enc_SD.dtype
    kind = settings.matmul or own
    product = _Product(weights.b_enc_S.to(kind), centred_BD.to(kind), weights.W_enc_SD.to(kind).T)
    if settings.kind == "batch_topk":
        code = _batch_code(product, settings.k * len(centred_BD), guess)
    else:
        code = joined([_rows(top_k(pre_BS, settings.k)) for pre_BS in product.blocks()])
    if kind != own:
        exact_N = _dots(weights.W_enc_SD, code, centred_BD) + weights.b_enc_S[code.columns_N]
        code = Selected(exact_N, code.columns_N, code.offsets_B1)
    return Selected(code.values_N.clamp(min=0), code.columns_N, code.offsets_B1) if settings.relu else code


@dataclass(frozen=True)
class _Product:
    """The encoder product, block by block of rows or whole."""

    bias_S: Tensor
    centred_BD: Tensor
    encoder_DS: Tensor

    def blocks(self) -> Iterator[Tensor]:
        """Pre-activations of some rows after others, all in one buffer: each is overwritten by the next."""
        n_latents = len(self.bias_S)
        rows = min(block_rows(n_latents, self.bias_S.device), len(self.centred_BD))
        buffer_BS = self.bias_S.new_empty(rows, n_latents)
        for block_BD in torch.split(self.centred_BD, rows):
            yield torch.addmm(self.bias_S, block_BD, self.encoder_DS, out=buffer_BS[: len(block_BD)])

    def whole(self) -> Tensor:
        """All pre-activations."""
        return torch.addmm(self.bias_S, self.centred_BD, self.encoder_DS)


def _batch_code(product: _Product, wanted: int, guess: float | None) -> Selected:
    """The largest entries of all rows: from those above the last threshold where they are enough, else from all."""
    if guess is not None and guess > 0:
        found = joined([above(pre_BS, guess * _GUESS_SHARE) for pre_BS in product.blocks()])
        if len(found.values_N) >= wanted:
            return largest(found, wanted)
    return batch_top_k(product.whole(), wanted)


def _rows(top: TopK) -> Selected:
    n, k = top.columns_BK.shape
    offsets_B1 = torch.arange(0, n * k + 1, k, device=top.columns_BK.device)
    return Selected(top.values_BK.flatten(), top.columns_BK.flatten(), offsets_B1)


@dataclass(frozen=True)
class _Decoded:
    """Σ values · rows of the decoder, without its bias, and the graph back to the values."""

    code: Selected
    weights_N: Tensor
    rows_BD: Tensor
    graph_BD: Tensor


def _decode(code: Selected, W_dec_SD: Tensor) -> _Decoded:
    with torch.enable_grad():
        weights_N = code.values_N.detach().requires_grad_()
        graph_BD = _bag(code.columns_N, W_dec_SD, code.offsets_B1, weights_N)
    return _Decoded(code, weights_N, graph_BD.detach(), graph_BD)


def _bag(indices_N: Tensor, table_RD: Tensor, offsets_M1: Tensor, weights_N: Tensor) -> Tensor:
    """Row m of the result: Σ over n in [offsets[m], offsets[m+1]) of weights[n] · table[indices[n]]."""
    return F.embedding_bag(indices_N, table_RD, offsets_M1, mode="sum", per_sample_weights=weights_N, include_last_offset=True)


def _dots(table_SD: Tensor, code: Selected, vectors_BD: Tensor) -> Tensor:
    """table[columns[n]] · vectors[rows[n]] for each entry n: the derivative of `_bag` along its weights."""
    with torch.enable_grad():
        weights_N = torch.ones_like(code.values_N, dtype=table_SD.dtype, requires_grad=True)
        rows_BD = _bag(code.columns_N, table_SD, code.offsets_B1, weights_N)
        (dots_N,) = torch.autograd.grad(rows_BD, weights_N, vectors_BD)
    return dots_N


def _fvu(residual_BD: Tensor, target_BD: Tensor) -> _Error:
    """Σ‖residual‖² / Σ‖target − mean target‖²; the target's mean is near 0, so the variance loses no digits."""
    norm, target_norm = torch.linalg.vector_norm(residual_BD), torch.linalg.vector_norm(target_BD)
    total = target_norm.square() - len(target_BD) * target_BD.mean(0).square().sum()
    return _Error(norm.square() / total, residual_BD * (-2 / total))


def _nmse(residual_BD: Tensor, x_BD: Tensor) -> _Error:
    squares_B = x_BD.square().sum(1)
    loss = (residual_BD.square().sum(1) / squares_B).mean()
    return _Error(loss, residual_BD * (-2 / (len(x_BD) * squares_B))[:, None])


def _backpropagate(weights: Weights, centred_BD: Tensor, decoded: _Decoded, grad_BD: Tensor, relu: bool) -> Weights:
    """Gradients through decoder and encoder, given those of the reconstruction.

    The decoder bias gets what reaches it through the encoder's input.
    """
    code, n_latents = decoded.code, len(weights.b_enc_S)
    (grad_acts_N,) = torch.autograd.grad(decoded.graph_BD, decoded.weights_N, grad_BD)
    if relu:
        grad_acts_N = grad_acts_N.masked_fill_(code.values_N <= 0, 0)
    order_N = _stable_order(code.columns_N, n_latents)
    positions_N = code.rows_N[order_N]
    counts_S = torch.bincount(code.columns_N, minlength=n_latents)
    offsets_S1 = torch.cat([counts_S.new_zeros(1), counts_S.cumsum(0)])
    b_enc_S = torch.zeros_like(weights.b_enc_S).index_add_(0, code.columns_N, grad_acts_N)
    return Weights(
        W_enc_SD=_bag(positions_N, centred_BD, offsets_S1, grad_acts_N[order_N]),
        b_enc_S=b_enc_S,
        W_dec_SD=_bag(positions_N, grad_BD, offsets_S1, code.values_N[order_N]),
        b_dec_D=-(b_enc_S @ weights.W_enc_SD),
    )


def _stable_order(columns_N: Tensor, n_latents: int) -> Tensor:
    """Order that sorts the entries by latent; narrow integers sort several times faster."""
    narrow = torch.int16 if n_latents <= torch.iinfo(torch.int16).max else torch.int32
    return columns_N.to(narrow).argsort(stable=True)


def _add_aux(
    gradients: Weights, weights: Weights, centred_BD: Tensor, residual_BD: Tensor, dead_M: Tensor, settings: StepSettings
) -> Tensor:
    """The AuxK loss: dead latents model the residual, without the decoder bias. Adds its gradients; returns the loss."""
    if len(dead_M) == 0:
        return residual_BD.new_zeros(())
    some = weights.rows(dead_M)
    k = min(settings.aux_k, len(dead_M))
    auxiliary = StepSettings("topk", k, settings.relu, "fvu", 0, 0.0)
    decoded = _decode(_encode(some, centred_BD, auxiliary, None), some.W_dec_SD)
    error = _fvu(residual_BD - decoded.rows_BD, residual_BD)
    added = _backpropagate(some, centred_BD, decoded, error.grad_BD * settings.aux_weight, settings.relu)
    gradients.W_enc_SD.index_add_(0, dead_M, added.W_enc_SD)
    gradients.b_enc_S.index_add_(0, dead_M, added.b_enc_S)
    gradients.W_dec_SD.index_add_(0, dead_M, added.W_dec_SD)
    gradients.b_dec_D.add_(added.b_dec_D)
    return error.loss
