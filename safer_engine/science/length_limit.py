"""How many tokens a model can read, from its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet", "data2vec-text")
"""Model types whose first positions, up to and with the padding id, are never used by text."""


def position_limit(config: Mapping[str, Any]) -> int | None:
    """Longest sequence in tokens by the positions of a model's config; None where the config sets no limit."""
    text = config.get("text_config") or config
    positions = text.get("max_position_embeddings") or text.get("n_positions")
    if not isinstance(positions, int) or positions < 1:
        return None
    if text.get("model_type") in _POSITIONS_AFTER_PADDING:
        positions -= int(text.get("pad_token_id") or 0) + 1
    return positions
