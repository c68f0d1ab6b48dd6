"""What stage runs came to, as metrics: which figures there are, and how their rows in SQL become families of Prometheus.

Every figure is counted in the database when a run ends (`service.jobs.tallies`), so it holds however the run was started: by a
worker that stays, a job pod or a job of Slurm, which are gone before anybody could ask them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

_SECONDS = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14400)
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
_RECOVERED = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)


@dataclass(frozen=True)
class Figure:
    """One figure, shown as `safer_<name>`.

    Attributes:
        labels: at most two.
        bounds: upper bounds of a histogram; none: a counter.
        last: a gauge, of the last observation alone.
    """

    name: str
    about: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    last: bool = False

    def bucket(self, value: float) -> int:
        """In which bucket a value lies; 0 where there are none."""
        return bisect_left(self.bounds, value)


@dataclass(frozen=True)
class Tally:
    """A row of what was counted: the observations of a figure under its labels, in one bucket.

    Attributes:
        first, second: values of the figure's labels; empty where it has fewer.
        number, total: of the observations.
    """

    name: str
    first: str
    second: str
    bucket: int
    number: int
    total: float


FIGURES = {
    figure.name: figure
    for figure in (
        Figure(
            "stage_seconds",
            "Seconds of a stage run: computed, cached, absent, failed, stopped, or lost with its worker.",
            ("stage", "outcome"),
            _SECONDS,
        ),
        Figure("stage_errors", "Stage runs that failed.", ("stage", "code")),
        Figure("stage_bytes", "Bytes of the artifacts that stages committed.", ("stage",)),
        Figure("dataset_rows", "Rows that a stage read of a dataset: kept, or why they were dropped.", ("stage", "outcome")),
        Figure("tokens", "Tokens that a stage read.", ("stage",)),
        Figure("gpu_seconds", "Seconds that units of the GPU queue were held by a worker.", ("stage",)),
        Figure("gpu_memory_peak_bytes", "Peak of GPU memory of the last run that computed.", ("stage",), last=True),
        Figure("sae_fvu", "FVU of trained SAEs.", bounds=_SHARES),
        Figure("sae_dead_share", "Share of dead latents.", bounds=_SHARES),
        Figure("reward_recovered", "Margin variance recovered by the SAE.", bounds=_RECOVERED),
    )
}


def families(tallies: Sequence[Tally]) -> Iterable[Metric]:
    """A family for each figure. A histogram without labels is there from the start, so that its first observation counts."""
    for figure in FIGURES.values():
        mine = sorted((row for row in tallies if row.name == figure.name), key=_labels)
        if figure.bounds:
            yield _histogram(figure, mine)
            continue
        kind = GaugeMetricFamily if figure.last else CounterMetricFamily
        family = kind(f"safer_{figure.name}", figure.about, labels=figure.labels)
        for row in mine:
            family.add_metric(_values(figure, _labels(row)), row.total)
        yield family


def _histogram(figure: Figure, rows: Sequence[Tally]) -> Metric:
    family = HistogramMetricFamily(f"safer_{figure.name}", figure.about, labels=figure.labels)
    series = {labels: list(some) for labels, some in groupby(rows, _labels)}
    if not figure.labels:
        series.setdefault(("", ""), [])
    for labels, some in series.items():
        numbers = [sum(row.number for row in some if row.bucket <= bucket) for bucket in range(len(figure.bounds) + 1)]
        buckets = list(zip([*map(repr, map(float, figure.bounds)), "+Inf"], numbers, strict=True))
        family.add_metric(_values(figure, labels), buckets, sum_value=sum(row.total for row in some))
    return family


def _labels(row: Tally) -> tuple[str, str]:
    return row.first, row.second


def _values(figure: Figure, labels: tuple[str, str]) -> Sequence[str]:
    return labels[: len(figure.labels)]
