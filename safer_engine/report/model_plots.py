"""What plots of the SAE are drawn from."""

from __future__ import annotations

from pydantic import Field

from safer_engine.report.nodes import Count, Node


class Curve(Node):
    """The course of the SAE's training, thinned out."""

    positions: list[float]
    loss: list[float]
    dead_share: list[float | None]


class Overview(Node):
    """All latents as a grid of counts: firing rate against salience."""

    log10_rate_edges: list[float]
    salience_edges: list[float]
    counts: list[list[Count]] = Field(description="[rate bin][salience bin].")
    silent: Count = Field(description="Latents that never fired: in no bin.")
