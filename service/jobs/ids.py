"""Identifiers that sort by the time they were made."""

from __future__ import annotations

import secrets
import time

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_RANDOM_BITS, _LENGTH = 80, 26


def is_id(text: str) -> bool:
    """Whether a text could be such an identifier."""
    return len(text) == _LENGTH and set(text) <= set(_ALPHABET)


def new_id() -> str:
    """26 characters of Crockford's base 32: 48 bits of milliseconds, then 80 random bits (the layout of a ULID)."""
    value = (time.time_ns() // 1_000_000 & (1 << 48) - 1) << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
    return "".join(_ALPHABET[value >> 5 * place & 31] for place in reversed(range(_LENGTH)))
