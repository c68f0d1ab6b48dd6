"""Which groups are held out."""

from __future__ import annotations

import hashlib


def is_held_out(group: str, share: float, seed: int) -> bool:
    """Whether a group is kept from SAE training: the one definition, by hash, so that it needs no stored list."""
    raw = hashlib.sha256(f"{seed}/held-out/{group}".encode()).digest()
    return int.from_bytes(raw[:8], "big") < share * 2.0**64
