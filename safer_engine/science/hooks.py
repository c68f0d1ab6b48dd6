"""Reading and replacing the residual stream while a reward model runs, and running only a part of its blocks.

"After block L" (1-based) is the place everything here refers to. Hooks and bypasses live inside `with` blocks and are
gone afterwards, also after an error. They change the model while they last: one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from safer_engine.errors import ModelRefused
from safer_engine.science.reward_model import RewardModel, residual_into, residual_of

See = Callable[[Tensor], Tensor | None]
"""Is given the residual stream [B, T, D]; a tensor it returns takes its place."""


def check_layer(rm: RewardModel, layer: int) -> None:
    """Refuse a hook point that is not there.

    Raises:
        ModelRefused: `layer` is out of range, or the model changes the stream between this block and the next.
    """
    if not 1 <= layer <= rm.info.n_blocks:
        raise ModelRefused(f"there is no block {layer}: the model has {rm.info.n_blocks}", f"choose 1 … {rm.info.n_blocks}")
    if layer in rm.info.rewired_after:
        raise ModelRefused(
            f"the model alters the residual stream between block {layer} and the next", "choose another hook.layer"
        )


@contextmanager
def on_residual(rm: RewardModel, layer: int, see: See) -> Iterator[None]:
    """Call `see` with the residual stream after block `layer` in every forward pass inside the `with` block."""
    check_layer(rm, layer)

    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        changed = see(residual_of(output))
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = rm.blocks[layer - 1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replace_residual(rm: RewardModel, layer: int, h_BTD: Tensor) -> Iterator[None]:
    """Put `h_BTD` in the place of the residual stream after block `layer`; its shape must be the batch's."""

    def put(found: Tensor) -> Tensor:
        if found.shape != h_BTD.shape:
            raise ValueError(f"a residual stream of shape {tuple(h_BTD.shape)} cannot replace one of {tuple(found.shape)}")
        return h_BTD.to(found.device, found.dtype)

    with on_residual(rm, layer, put):
        yield


def head_vectors(rm: RewardModel, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """One forward pass; the vector the head reads of each sequence.

    Args:
        ids_BT: token ids, int64 [B, T]; shorter sequences are padded with `rm.info.pad_id`, on the right unless the
            model's positions are relative.
        mask_BT: 1 for tokens, 0 for padding; None where nothing is padded.

    Returns:
        [B, d_head] in the model's dtype, on the head's device. The reward is linear in it: `RewardModel.rewards`.
    """
    ids_BT = ids_BT.to(rm.device)
    mask_BT = None if mask_BT is None else mask_BT.to(rm.device)
    caught: list[Tensor] = []
    handle = rm.head.register_forward_pre_hook(lambda _module, args: caught.append(args[0]))
    try:
        rm.model(input_ids=ids_BT, attention_mask=_needed_mask(rm, mask_BT))
    finally:
        handle.remove()
    read = caught[-1]
    if read.ndim == 2:
        return read
    at_B = rm.head_positions(ids_BT, mask_BT).to(read.device)
    return read[torch.arange(len(read), device=read.device), at_B]


def rewards(rm: RewardModel, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Rewards of a batch (see `head_vectors`): float64 [B]."""
    return rm.rewards(head_vectors(rm, ids_BT, mask_BT))


def residual(rm: RewardModel, layer: int, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """The residual stream after block `layer`, [B, T, D]; the blocks above are not run. Values at padding mean nothing."""
    caught: list[Tensor] = []
    with on_residual(rm, layer, caught.append), _bypassed(rm, range(layer, rm.info.n_blocks), None):
        head_vectors(rm, ids_BT, mask_BT)
    return caught[-1]


def upper_blocks(rm: RewardModel, layer: int) -> Callable[[Tensor, Tensor | None, Tensor], Tensor]:
    """Rewards of (residual stream, mask, token ids): `rewards_from_residual` after block `layer`."""
    return partial(rewards_from_residual, rm, layer)


def rewards_from_residual(
    rm: RewardModel, layer: int, h_BTD: Tensor, attention_mask_BT: Tensor | None, input_ids_BT: Tensor
) -> Tensor:
    """Rewards from a given residual stream after block `layer`: only the blocks above it are run.

    The blocks up to `layer` are bypassed, so masks, rotary tables and positions are the library's own and, given the
    stream that a forward pass has there, the rewards are exactly that pass's.

    Args:
        h_BTD: [B, T, D]; any dtype and device, cast to the model's. Values at padding are ignored.
        attention_mask_BT, input_ids_BT: as for `head_vectors`, of the same batch.

    Returns:
        float64 [B], on the head's device; differentiable with respect to `h_BTD`.
    """
    check_layer(rm, layer)
    block = next(rm.blocks[layer - 1].parameters())
    h_BTD = h_BTD.to(block.device, rm.head.weight.dtype)
    with _bypassed(rm, range(layer), h_BTD):
        return rewards(rm, input_ids_BT, attention_mask_BT)


def _needed_mask(rm: RewardModel, mask_BT: Tensor | None) -> Tensor | None:
    """The mask, or None where it changes nothing: no padding, or a causal model padded on the right.

    Without one, attention takes the faster kernels that need no mask.
    """
    if mask_BT is None or bool(mask_BT.all()):
        return None
    padded_right = bool((mask_BT[:, :-1] >= mask_BT[:, 1:]).all())
    return None if rm.info.causal and padded_right else mask_BT


@contextmanager
def _bypassed(rm: RewardModel, indices: range, h_BTD: Tensor | None) -> Iterator[None]:
    """Make some blocks (0-based) return `h_BTD`, or what they were given where it is None, without computing."""

    def passes(*args: Any, **kwargs: Any) -> Any:
        value = residual_into(args, kwargs) if h_BTD is None else h_BTD
        return (value, *[None] * (rm.info.tuple_blocks - 1)) if rm.info.tuple_blocks else value

    with ExitStack() as stack:
        for index in indices:
            stack.enter_context(_forward_replaced(rm.blocks[index], passes))
        yield


@contextmanager
def _forward_replaced(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = block.__dict__.get("forward")
    block.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del block.__dict__["forward"]
        else:
            block.__dict__["forward"] = own
