"""What causal effects cost beside the extraction of the same pairs, in one run.

    python -m benchmarks.causal MODEL DATA.jsonl [--pairs 5000] [--kept 512] [--sample 64] [--features 64]

Pairs, pairs whose residual streams are kept, those of them that mean-ablation is run on, and features as given; controls
and sets as the spec's defaults. The SAE is trained for 200 steps only: what it learns changes little of what ablation costs.
Prints seconds of `activations` and `causal` and their ratio: the goal is at most 3.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.machine_line import machine_line
from safer_engine import pipeline
from safer_engine.api import prepare
from safer_engine.artifacts import Absent, CausalEffects
from safer_engine.events import NullObserver
from safer_engine.spec import AuditSpec
from safer_engine.stages.causal import CausalStage
from safer_engine.store import LocalArtifactStore


class Clock(NullObserver):
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def stage_finished(self, stage: str, outcome: str, seconds: float) -> None:
        """See `Observer.stage_finished`."""
        self.seconds[stage] = seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--pairs", type=int, default=5000)
    parser.add_argument("--kept", type=int, default=512)
    parser.add_argument("--sample", type=int, default=64)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    document = {
        "model": {"path": asked.model},
        "dataset": {"source": {"kind": "local", "path": asked.data}, "sample": asked.pairs},
        "causal": {"pairs": asked.kept, "sample": asked.sample, "features": asked.features},
        "sae": {"kind": "topk", "min_steps": 200, "max_steps": 200},
        "runtime": {"device": asked.device},
    }
    clock = Clock()
    stages = pipeline.STAGES[: [stage.name for stage in pipeline.STAGES].index(CausalStage.name) + 1]
    with tempfile.TemporaryDirectory() as folder:
        request = prepare(AuditSpec.model_validate(document))
        found = pipeline.run(request, LocalArtifactStore(Path(folder)), clock, stages=stages)[CausalEffects]
        if isinstance(found, Absent):
            sys.exit(f"no causal effects: {found.reason}")
        assert isinstance(found, CausalEffects)
        meta = found.meta
    extraction, causal = clock.seconds["activations"], clock.seconds["causal"]
    print(machine_line())
    counts = f"{asked.pairs} pairs, {meta['n_pairs']} kept, {meta['n_features']} features, {meta['n_controls']} controls"
    print(f"{counts}, {meta['runs']} runs of the upper blocks")
    print(f"extraction {extraction:.1f} s, causal {causal:.1f} s, ratio {causal / extraction:.2f}")
    print(f"agreement {meta['agreement']}, null {meta['null']}, correlation {meta['correlation']}, verified {meta['verified']}")


if __name__ == "__main__":
    main()
