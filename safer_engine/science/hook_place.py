"""Which block the hook is at. Needs no torch."""

from __future__ import annotations

from safer_engine.errors import ModelRefused


def hook_layer(n_blocks: int, layer: int | None, depth: float) -> int:
    """The hook's block, 1-based: `layer`, or round(depth · n_blocks), at least 1, where none is given.

    Raises:
        ModelRefused: the model has no such block.
    """
    chosen = max(1, round(depth * n_blocks)) if layer is None else layer
    if not 1 <= chosen <= n_blocks:
        raise ModelRefused(f"hook.layer is {layer}, but the model has {n_blocks} blocks", f"choose 1 … {n_blocks}")
    return chosen
