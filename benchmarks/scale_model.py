"""What an audit of a large reward model would cost: formulas of sizes and work, fed with what `benchmarks.scale` measured.

Sizes follow from the layouts in `safer_engine.artifacts`; work from the shapes of models; what depends on neither (text
tables, requests, rows, seconds of a CPU) is measured at small sizes and continued as a straight line. So every figure for a
large model is an estimate. Nothing here opens a file or imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from safer_engine.activation_files import part_names, shard_count
from safer_engine.science.sae_budget import sae_width, training_size
from safer_engine.spec import RuntimeSpec, TopKSpec
from safer_engine.spec_causal import CausalSpec

SHARD_ROW_BYTES = 10
"""Of a position beside its activation: pair 4, side 1, position 4, flags 1."""
PART_BYTES = 16 << 20
"""Part of a multipart upload (`SAFER_S3_PART_BYTES`)."""
HELD_OUT = 0.1
_OF_SERVICE = ("tallies", "counters", "leaders", "audit_log")
SCORED_ENTRIES = 800
"""(response, latent) with an activation a pair in the case `pair_scores` of `benchmarks.scale_memory`."""


@dataclass(frozen=True)
class Shape:
    """A decoder with a scalar head, by the numbers of its public config."""

    name: str
    d_in: int
    n_blocks: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    vocabulary: int

    @property
    def body_parameters(self) -> int:
        """Parameters that every token is multiplied with: all but the embeddings."""
        attention = 2 * self.d_in**2 * (1 + self.n_kv_heads / self.n_heads)
        return int(self.n_blocks * (attention + 3 * self.d_in * self.d_ff))

    @property
    def parameters(self) -> int:
        """All parameters, the small norms and the head left out."""
        return self.body_parameters + self.vocabulary * self.d_in


SHAPES = (
    Shape("1B", 2048, 16, 8192, 32, 8, 128_256),
    Shape("8B", 4096, 32, 14_336, 32, 8, 128_256),
    Shape("70B", 8192, 80, 28_672, 64, 8, 128_256),
)
"""The shapes of Llama 3.2 1B, 3.1 8B and 3.1 70B."""
PAIRS = (10_000, 1_000_000, 10_000_000)


@dataclass(frozen=True)
class Assumptions:
    """What the figures rest on beside what was measured.

    Attributes:
        tokens: of one text (prompt and response); response: share of them in the response.
        gpu, flops, gpu_bytes: the GPU, its dense bfloat16 products a second and its memory, from its data sheet.
        utilisation: share of `flops` that is reached.
        start: seconds from a unit's message to its work; `causal`, which computes nothing, takes as long on a machine at rest.
        network, disk: bytes a second of one worker.
        cpu_bytes, gpu_host_bytes: memory a stage may take on a CPU and on a GPU worker; home_bytes: a GPU worker's disk.
    """

    tokens: int = 350
    response: float = 0.6
    evaluation_pairs: int = 1000
    gpu: str = "NVIDIA H100 SXM"
    flops: float = 989e12
    gpu_bytes: float = 80e9
    utilisation: float = 0.4
    start: float = 1.0
    network: float = 1e9
    disk: float = 2e9
    cpu_bytes: float = 0.9 * 16 * 2**30
    gpu_host_bytes: float = 0.9 * 64 * 2**30
    home_bytes: float = 300 * 2**30

    @property
    def positions(self) -> float:
        """Positions of a pair whose activations are kept."""
        return 2 * self.tokens * self.response


@dataclass(frozen=True)
class Line:
    """A straight line through measurements; `residual`: its largest distance from one, as a share of the largest value."""

    fixed: float
    slope: float
    residual: float

    def at(self, x: float) -> float:
        """Its value."""
        return self.fixed + self.slope * x


def fit(points: Mapping[float, float]) -> Line:
    """Least squares; neither part below 0, since a cost has none below it."""
    x, y = np.array(list(points)), np.array(list(points.values()), dtype=np.float64)
    slope = max(0.0, float(np.polyfit(x, y, 1)[0])) if len(x) > 1 else 0.0
    fixed = max(0.0, float((y - slope * x).mean()))
    if fixed == 0.0 and float(x @ x):
        slope = float(x @ y / (x @ x))
    return Line(fixed, slope, float(np.abs(y - fixed - slope * x).max() / max(float(np.abs(y).max()), 1e-12)))


@dataclass(frozen=True)
class Sizes:
    """What an audit's sizes are counted in."""

    pairs: int
    tokens: float
    positions: float
    d_in: int
    width: int = 2

    @property
    def shards(self) -> int:
        """Activation shards."""
        return shard_count(self.pairs, RuntimeSpec().shard_pairs)

    @property
    def parts(self) -> int:
        """Parts that workers share the reading in; 1: none."""
        return max(1, len(part_names(self.shards)))


def sizes_of(shape: Shape, pairs: int, given: Assumptions) -> Sizes:
    """The sizes of an audit in bfloat16."""
    return Sizes(pairs, 2.0 * given.tokens * pairs, given.positions * pairs, shape.d_in)


def shard_bytes(sizes: Sizes) -> float:
    """Activation shards, their headers (some 350 bytes each) left out."""
    return sizes.positions * (sizes.d_in * sizes.width + SHARD_ROW_BYTES)


def head_bytes(sizes: Sizes) -> float:
    """`head.safetensors`: both sides of every pair in float32."""
    return 2.0 * sizes.pairs * sizes.d_in * 4


def residual_bytes(sizes: Sizes, pairs: int) -> float:
    """Whole residual streams of some pairs, with one byte a token that says whether it is in a shard."""
    share = min(pairs, sizes.pairs) / sizes.pairs
    return share * sizes.tokens * (sizes.d_in * sizes.width + 1)


def sae_bytes(d_in: int, d_sae: int) -> float:
    """`sae.safetensors`: encoder, decoder and both biases in float32."""
    return 4.0 * (2 * d_in * d_sae + d_in + d_sae)


def distinct_latents(d_sae: int, k: int, positions: float) -> float:
    """Latents that fire in a response where every latent is as likely as any other: no real SAE has more on average."""
    return d_sae * (1.0 - math.exp(positions * math.log1p(-k / d_sae)))


def acts_bytes(pairs: int, entries: float) -> float:
    """`acts.safetensors`: index and sum of each entry, where the rows begin, counted positions."""
    return 8.0 * entries + 2 * 8 * (pairs + 1) + 8 * pairs


@dataclass(frozen=True)
class Cost:
    """What one audit would take: an estimate.

    Attributes:
        gpu_hours: by stage, with every GPU of the worker counted while it is held.
        gpus: of one worker.
        entries: (response, latent) with an activation.
        bytes: artifacts by name.
        serial_hours: of stages that one worker computes alone.
        requests, rows, messages: of S3, SQL and Redis.
        workers: that read activations, so that all is done within a day; None: no number of them suffices.
    """

    shape: Shape
    pairs: int
    gpus: int
    entries: float
    gpu_hours: dict[str, float]
    bytes: dict[str, float]
    serial_hours: dict[str, float]
    requests: float
    rows: float
    messages: float

    @property
    def storage(self) -> float:
        """Bytes of all artifacts."""
        return sum(self.bytes.values())

    @property
    def workers(self) -> int | None:
        """See the class."""
        left = 24.0 - sum(self.serial_hours.values())
        reading = self.gpu_hours["activations"] / self.gpus
        return None if left <= 0 else max(1, math.ceil(reading / left))


@dataclass(frozen=True)
class Measured:
    """Lines through the measurements of `benchmarks.scale` and slopes of `benchmarks.scale_memory`."""

    document: Mapping[str, Any]

    @property
    def runs(self) -> list[dict[str, Any]]:
        """One job each."""
        return list(self.document["service"]["runs"])

    def line(self, stage: str, *names: str, over: str = "pairs") -> Line:
        """A figure of a stage over a size."""
        return fit({run[over]: _within(run["stages"][stage], names) for run in self.runs})

    def requests(self, stage: str) -> Line:
        """S3 requests over shards; those of multipart uploads follow from bytes and are left out."""
        return fit(
            {run["shards"]: sum(n for kind, n in run["stages"][stage]["s3"].items() if kind != "part") for run in self.runs}
        )

    def total(self, name: str, over: str = "shards") -> Line:
        """SQL rows of a job; those of the service itself are left out."""
        return fit({run[over]: sum(n for table, n in run[name].items() if table not in _OF_SERVICE) for run in self.runs})

    def memory(self, case: str) -> float:
        """Bytes of one more unit."""
        return float(self.document["memory"]["cases"][case]["bytes"])

    def seconds(self, case: str) -> float:
        """CPU seconds of one more unit."""
        return float(self.document["memory"]["cases"][case]["seconds"])

    @property
    def sha256(self) -> float:
        """Bytes a second."""
        return float(self.document["memory"]["sha256"])

    @property
    def tokens_per_pair(self) -> float:
        """Of the measured jobs."""
        return float(np.mean([run["tokens"] / run["pairs"] for run in self.runs]))


def cost(shape: Shape, pairs: int, measured: Measured, given: Assumptions) -> Cost:
    """What an audit with the default spec would take."""
    sae, sizes = TopKSpec(), sizes_of(shape, pairs, given)
    d_sae = sae_width(sae, shape.d_in)
    entries = 2 * pairs * distinct_latents(d_sae, sae.k, given.positions / 2)
    sent = artifact_bytes(shape, sizes, entries, measured)
    work = flops(shape, sizes, given)
    gpus = gpus_of(shape, d_sae, given)
    hours = {name: each / (given.flops * given.utilisation) / 3600 for name, each in work.items()}
    fetched = sent["activations"] / given.network + 2 * sent["activations"] / measured.sha256
    serial = {
        "pairs": measured.line("pairs", "cpu_seconds", over="tokens").at(sizes.tokens) / 3600,
        "sae": hours["sae"] + (fetched + passes_of(sizes) * sent["activations"] / given.disk) / 3600,
        "latents": hours["latents"] + (fetched + latents_seconds(sizes.positions * sae.k, measured)) / 3600,
        "pair_scores": measured.seconds("pair_scores") / SCORED_ENTRIES * entries / 3600,
        "edits": measured.seconds("edits") * pairs / 3600,
        "report": measured.seconds("report") * pairs / 3600,
    }
    starts = sizes.parts * start_seconds(shape, sent["pairs"], measured, given) / 3600
    held = {
        "activations": (hours["activations"] + starts) * gpus,
        "sae": serial["sae"] * gpus,
        "latents": serial["latents"] * gpus,
    }
    multipart = sum(sent.values()) / PART_BYTES * 3  # sent once, fetched by the workers of sae and latents
    asked = sum(measured.requests(stage).at(sizes.shards) for stage in measured.runs[0]["stages"])
    return Cost(
        shape=shape,
        pairs=pairs,
        gpus=gpus,
        entries=entries,
        gpu_hours=held,
        bytes=sent,
        serial_hours=serial,
        requests=asked + multipart,
        rows=measured.total("sql_rows").at(sizes.shards),
        messages=len(measured.runs[0]["stages"]) - 1 + (sizes.parts if sizes.parts > 1 else 0),
    )


def passes_of(sizes: Sizes) -> float:
    """How often `sae` reads all activations: once for the scale, half for the held-out measures, and its training."""
    training = training_size(TopKSpec(), max(1, int(sizes.positions * (1 - HELD_OUT))))
    return 1.5 + training.batch * training.steps / sizes.positions


def start_seconds(shape: Shape, pairs_bytes: float, measured: Measured, given: Assumptions) -> float:
    """Seconds until a part's process reads: its start, weights read from the disk, the table of pairs hashed."""
    return given.start + 2.0 * shape.parameters / given.disk + pairs_bytes / measured.sha256


def latents_seconds(cells: float, measured: Measured) -> float:
    """CPU seconds of the stage `latents`, which follow the number of active latents (positions × k)."""
    k = int(measured.document["service"]["spec"]["sae"]["k"])
    return measured.line("latents", "cpu_seconds", over="positions").slope * cells / k


def flops(shape: Shape, sizes: Sizes, given: Assumptions) -> dict[str, float]:
    """Floating-point operations of the stages that use a GPU, as `safer_engine.planning` counts them.

    The reward needs every block, so the whole model is run, once; the hook reads in passing. Attention scores (under 2 % at
    350 tokens) are left out.
    """
    sae = TopKSpec()
    dense = 2.0 * shape.d_in * sae_width(sae, shape.d_in)
    training = training_size(sae, max(1, int(sizes.positions * (1 - HELD_OUT))))
    reading = 2.0 * shape.body_parameters
    return {
        "activations": reading * (sizes.tokens + 2 * given.tokens * given.evaluation_pairs),
        "sae": 3 * dense * training.batch * training.steps,
        "latents": 1.5 * dense * sizes.positions,
    }


def gpus_of(shape: Shape, d_sae: int, given: Assumptions) -> int:
    """GPUs that hold the model in bfloat16, the SAE in training (eight bytes times four a weight) and a batch."""
    held = 2.0 * shape.parameters + 32.0 * shape.d_in * d_sae + RuntimeSpec().batch_tokens * shape.d_in * 2 * 24
    return math.ceil(held / (0.9 * given.gpu_bytes))


def artifact_bytes(shape: Shape, sizes: Sizes, entries: float, measured: Measured) -> dict[str, float]:
    """Bytes of each stage's artifact. Text tables grow with tokens as measured, tables of pairs with pairs."""
    reading = shard_bytes(sizes) + head_bytes(sizes) + residual_bytes(sizes, CausalSpec().pairs)
    return {
        "pairs": _sum_lines(measured, "pairs", sizes),
        "activations": reading + measured.line("activations", "bytes", "rewards.arrow").at(sizes.pairs),
        "sae": sae_bytes(shape.d_in, sae_width(TopKSpec(), shape.d_in)),
        "latents": acts_bytes(sizes.pairs, entries),
        "pair_scores": measured.line("pair_scores", "bytes", "pair_scores.arrow").at(sizes.pairs),
        "edits": measured.line("edits", "bytes", "edits.jsonl").at(sizes.pairs),
        "report": measured.line("report", "bytes").at(sizes.pairs),
    }


def _sum_lines(measured: Measured, stage: str, sizes: Sizes) -> float:
    text = measured.line(stage, "bytes", "pairs.arrow", over="tokens").at(sizes.tokens)
    return text + sum(measured.line(stage, "bytes", name).at(sizes.pairs) for name in ("rows.arrow", "prompts.arrow"))


def _within(found: Any, names: tuple[str, ...]) -> float:
    for name in names:
        found = found.get(name, 0) if isinstance(found, Mapping) else found
    return float(sum(found.values())) if isinstance(found, Mapping) else float(found or 0)
