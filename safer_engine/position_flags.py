"""Flags of a stored position, as powers of two that are added: shared by stages and science."""

from __future__ import annotations

SPECIAL = 1  # a special token other than the one the head reads
HIGH_NORM = 2  # norm above 10 × the median
HEAD = 4  # the position the head reads
SENTENCE_END = 8
