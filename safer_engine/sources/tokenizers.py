"""The tokenizer of a reward model on this machine, as the one way of rendering conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safer_engine.errors import ModelRefused
from safer_engine.science.length_limit import position_limit
from safer_engine.spec import ModelSpec

if TYPE_CHECKING:
    from safer_engine.science.rendering import Renderer


def load_renderer(folder: Path, spec: ModelSpec, trust_remote_code: bool = False) -> Renderer:
    """Load a model's tokenizer and find out how it writes conversations.

    Sequences are limited to `spec.max_length` tokens, or to the positions the model has if those are fewer.

    Args:
        folder: model folder; nothing is fetched.

    Raises:
        ModelRefused: no tokenizer, a slow one, one that needs code of its own, or one that can't be relied on.
    """
    from transformers import AutoTokenizer

    from safer_engine.science.rendering import make_renderer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelRefused(
            f"the tokenizer in {folder} can't be loaded: {error}", "save a fast tokenizer (tokenizer.json) beside the model"
        ) from error
    limit = usable_length(folder, spec.max_length)
    return make_renderer(tokenizer, limit, spec.truncation_side, spec.add_special_tokens)


def usable_length(folder: Path, max_length: int) -> int:
    """Longest sequence in tokens: `max_length`, or the number of positions in the model's config if that is smaller."""
    path = folder / "config.json"
    config = json.loads(path.read_bytes()) if path.is_file() else {}
    positions = position_limit(config)
    return max_length if positions is None else min(max_length, positions)
