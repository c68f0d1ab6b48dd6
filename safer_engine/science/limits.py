"""Sizes below which a figure is not told. Numbers alone, so that whoever words a report need not import what computes them."""

SAE_ADDS_GROUPS = 30
"""Groups of an axis, to tell what the SAE adds: with a handful of pairs the density that labels are judged by is a guess."""
