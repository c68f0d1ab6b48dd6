"""Peak memory of what holds all pairs at once, by their number: where an audit of millions would break first.

    python -m benchmarks.scale_memory [--write]

Each case runs at two sizes, each in a process of its own, on made-up tables; the growth between the two is what one more
pair (or one more entry) costs. `--write` keeps the figures in `benchmarks/scale.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine_line import machine_line

RESULTS = Path(__file__).with_name("scale.json")
LATENTS, ENTRIES = 8192, 400
"""Latents, and latents that fire in a response, of the case `pair_scores`."""
SIZES = {
    "pairs": (20_000, 80_000),
    "residual_choice": (50_000, 200_000),
    "contexts": (8, 32),
    "pair_scores": (8_000, 16_000),
    "edits": (10_000, 40_000),
    "report": (2_000, 8_000),
}
UNITS = {
    "pairs": "pair", "residual_choice": "pair", "contexts": "entry", "pair_scores": "pair", "edits": "pair", "report": "pair",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases, comma-separated; default: all")
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {RESULTS.name}")
    parser.add_argument("--case", nargs=2, metavar=("NAME", "SIZE"), help="one case, in this process")
    arguments = parser.parse_args()
    if arguments.case:
        name, size = arguments.case
        print(json.dumps(CASES[name](int(size))))
        return
    found = {name: growth(name) for name in (arguments.only.split(",") if arguments.only else SIZES)}
    facts = {"machine": machine_line(), "sha256": sha256_rate(), "cases": found}
    show(found)
    if arguments.write:
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        facts["cases"] = {**kept.get("memory", {}).get("cases", {}), **found}
        RESULTS.write_text(json.dumps({**kept, "memory": facts}, indent=1, sort_keys=True) + "\n")


def growth(name: str) -> dict[str, Any]:
    """Bytes and seconds per unit, from a small and a large size."""
    runs = []
    for size in SIZES[name]:
        command = [sys.executable, "-m", "benchmarks.scale_memory", "--case", name, str(size)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            before = peak = own_bytes(process.pid)
            while process.poll() is None:
                peak = max(peak, own_bytes(process.pid))
                time.sleep(0.001)
            found = json.loads(process.stdout.read())
        runs.append({**found, "bytes": found.get("held", 0) + peak - before})
    small, large = runs
    units = large["units"] - small["units"]
    per = {what: (large[what] - small[what]) / units for what in ("bytes", "seconds")}
    return {"unit": UNITS[name], "bytes": per["bytes"], "seconds": per["seconds"], "runs": runs}


def sha256_rate() -> float:
    """Bytes a second of CPU time."""
    block, began = bytes(1 << 28), time.process_time()
    hashlib.sha256(block).digest()
    return len(block) / (time.process_time() - began)


def taken(work: Callable[[], object], units: int) -> dict[str, float]:
    """CPU seconds of some work; its memory is looked at by the process that started this one, from the first line on."""
    print("begins", flush=True)
    began = time.process_time()
    work()
    return {"units": units, "seconds": time.process_time() - began}


def own_bytes(pid: int) -> int:
    """Memory of a process that no file backs: what the system cannot take back. 0 where it has ended."""
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * resource.getpagesize()


def pairs_case(size: int) -> dict[str, float]:
    """The survey of a dataset and the table of its rows: every pair's names and fate are held."""
    from safer_engine.pair_tables import Written, health, survey, write_prompt_keys, write_rows
    from safer_engine.sources.resolved import ResolvedDataset
    from safer_engine.spec import DatasetSpec, MemorySource

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(size):
            answers = (f"answer {number} {side} " + "some words that make a long response " * 4 for side in "ab")
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in answers)
            yield {"prompt": [{"role": "user", "content": f"question {number}?"}], "chosen": chosen, "rejected": rejected}

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            found = survey(ResolvedDataset("0", "memory", rows), DatasetSpec(source=MemorySource()), 0)
            written = Written((None,) * size, 0, 0, ())
            write_rows(Path(folder) / "rows.arrow", found, written)
            write_prompt_keys(Path(folder) / "prompts.arrow", found)
            health(found, written)

    return taken(work, size)


def residual_choice_case(size: int) -> dict[str, float]:
    """The choice of the pairs whose residual streams are kept."""
    import pyarrow as pa

    from safer_engine.science.readings import choose_residual_pairs

    table = pa.table({"pair_id": [f"{n:016x}" for n in range(size)], "group": [f"{n:012x}" for n in range(size)]})

    def work() -> None:
        choose_residual_pairs(table["pair_id"].to_pylist(), table["group"].to_pylist(), 512, 0.1, 0)

    return taken(work, size)


def contexts_case(shards: int) -> dict[str, float]:
    """Joining the strongest contexts of all shards: ten of each of 32 768 latents a shard."""
    from safer_engine.science.contexts import TopContexts, merge_contexts

    rng = np.random.default_rng(0)
    latents = np.repeat(np.arange(32_768, dtype=np.int32), 10)
    size = len(latents)

    def part(shard: int) -> TopContexts:
        responses = np.sort(rng.integers(512 * shard, 512 * (shard + 1), size))
        return TopContexts(latents, rng.random(size, dtype=np.float32), responses, np.zeros(size, np.int32))

    parts = [part(shard) for shard in range(shards)]
    held = sum(array.nbytes for one in parts for array in vars(one).values())
    groups = np.arange(256 * shards, dtype=np.int64)
    found = taken(lambda: merge_contexts(parts, 10, groups), size * shards)
    return {**found, "held": held}


def pair_scores_case(size: int) -> dict[str, float]:
    """The stage `pair_scores` with the default signal."""
    with tempfile.TemporaryDirectory() as folder:
        stage, made, found = _score_world(Path(folder), size)
        return taken(lambda: made.run(stage, found), size)


def edits_case(size: int) -> dict[str, float]:
    """The stage `edits`, eight latents of evidence a pair."""
    import pyarrow as pa

    from safer_engine.artifacts import PairScores, PairSet
    from safer_engine.stages.edits import EditsStage
    from tests.helpers.score_artifacts import ScoreArtifacts

    ids = [f"{n:016x}" for n in range(size)]
    same = {"axis": ["all"] * size, "subset": ["all"] * size, "group": ids}
    pairs = pa.table({"pair_id": ids, "row": np.arange(size), "both_orders": np.zeros(size, bool)})
    rows = {"row": np.arange(size), "pair_id": ids, "content_digest": [4 * one for one in ids], **same}
    rows |= {"status": ["scored"] * size, "reason": pa.array([None] * size, pa.string())}
    item = pa.StructArray.from_arrays([np.zeros(8 * size, np.int32), np.ones(8 * size)], ["latent_id", "contribution"])
    figures = {name: np.random.default_rng(0).random(size) for name in ("reward_margin", "suspicion", "signal_latents")}
    scores = {"pair": np.arange(size, dtype=np.int32), "pair_id": ids, **same, **figures}
    scores |= {"pair_score": pa.array([None] * size, pa.float64()), "suspicion_kind": ["rank"] * size}
    scores["evidence"] = pa.ListArray.from_arrays(pa.array(8 * np.arange(size + 1), pa.int32()), item)
    with tempfile.TemporaryDirectory() as folder:
        made = ScoreArtifacts(Path(folder))
        found = {
            PairSet: made.pairs(pairs, pa.table(rows)),
            PairScores: made.commit("pair_scores", PairScores, {"pair_scores.arrow": pa.table(scores)}),
        }
        return taken(lambda: made.run(EditsStage(), found), size)


def report_case(size: int) -> dict[str, float]:
    """The report over made-up artifacts; their pairs come one, two and three to a group."""
    from safer_engine.artifacts import Artifact
    from safer_engine.report.build import ReportRequest
    from safer_engine.report.write import write_report
    from tests.helpers.fake_artifacts import build

    with tempfile.TemporaryDirectory() as folder:
        world = build(Path(folder), groups=size // 2)
        count = sum(isinstance(one, Artifact) for one in world.found.values()) and len(world.rows)
        with world.store.open_work("report", "benchmark") as work:
            request = ReportRequest(world.spec, world.sources, world.found, "2026-01-01T00:00:00+00:00")
            return taken(lambda: write_report(request, work.publish), count)


def _score_world(folder: Path, size: int) -> tuple[Any, Any, Any]:
    from scipy import sparse

    from safer_engine.artifacts import Activations, Labels, Latents, PairSet
    from safer_engine.science.pair_deltas import LatentSums
    from safer_engine.science.pair_scoring import SignalInputs
    from safer_engine.stages.pair_scores import PairScoresStage
    from tests.helpers.score_artifacts import ScoreArtifacts, pair_tables

    rng = np.random.default_rng(0)
    indptr = np.arange(0, (size + 1) * ENTRIES, ENTRIES, dtype=np.int64)

    def side() -> Any:
        steps = rng.integers(1, LATENTS // ENTRIES, (size, ENTRIES), dtype=np.int32)
        columns = np.cumsum(steps, axis=1, dtype=np.int32).ravel()
        return sparse.csr_array((rng.random(size * ENTRIES, dtype=np.float32), columns, indptr), shape=(size, LATENTS))

    names = np.array([f"g{number}" for number in range(size)])
    same = np.full(size, "all")
    data = SignalInputs(
        groups_P=names,
        axes_P=same,
        subsets_P=same,
        margins_P=rng.normal(size=size),
        latents=LatentSums(side(), side(), np.full((size, 2), 200)),
        head_delta_PD=np.zeros((size, 4), np.float32),
    )
    made = ScoreArtifacts(folder)
    found = {
        PairSet: made.pairs(*pair_tables(data)),
        Activations: made.activations(data, {}, 4),
        Latents: made.latents(data, np.zeros(LATENTS)),
        Labels: made.labels([], []),
    }
    return PairScoresStage(), made, found


CASES: dict[str, Callable[[int], dict[str, float]]] = {
    "pairs": pairs_case,
    "residual_choice": residual_choice_case,
    "contexts": contexts_case,
    "pair_scores": pair_scores_case,
    "edits": edits_case,
    "report": report_case,
}


def show(found: dict[str, dict[str, Any]]) -> None:
    table = Table("case", "unit", "bytes a unit", "CPU µs a unit", title="what one more unit costs")
    for name, one in found.items():
        table.add_row(name, one["unit"], f"{one['bytes']:,.0f}", f"{1e6 * one['seconds']:,.1f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
