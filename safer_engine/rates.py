"""Rates of work measured on this machine, kept beside the artifacts for the next estimate."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safer_engine.errors import ResourceError
from safer_engine.publishing import publishing
from safer_engine.spec import AuditSpec
from safer_engine.store import ArtifactStore

MATMUL = "matmul"
"""What the rate of a square matrix product is kept under, beside those of the stages."""


def rate_name(what: str, spec: AuditSpec) -> str:
    """What the rate of a stage is kept under: it depends on the device and the precision, and that of labels on who labels."""
    if what == "labels":
        what = f"labels-{spec.labels.labeller.kind}"
    return f"{what}/{spec.runtime.device}/{spec.model.dtype}"


def read_rates(path: Path | None) -> dict[str, float]:
    """The rates by name, in units of work a second; empty where there are none or the file is damaged."""
    try:
        read = json.loads(path.read_text()) if path else {}
    except (OSError, ValueError):
        return {}  # an estimate without memory is still an estimate
    return {str(key): float(value) for key, value in read.items() if isinstance(value, (int, float)) and value > 0}


def remember_rates(path: Path | None, found: Mapping[str, float]) -> None:
    """Keep rates; those under other names stay. A full disk, or None, is no place for them."""
    if path is None or not found:
        return
    with suppress(ResourceError), publishing(path) as temporary:
        temporary.write_text(json.dumps({**read_rates(path), **found}, sort_keys=True, indent=1))


def machine_flops(device: str, dtype: str) -> float:
    """Floating-point operations a second of a square matrix product, from a quarter of a second of them."""
    import torch

    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    width = 4096 if device.startswith("cuda") else 512
    left = torch.ones(width, width, device=device, dtype=kind)
    product = left @ left
    rounds, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.25:
        product = left @ left
        rounds += 1
        if device.startswith("cuda"):
            torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    assert bool(torch.isfinite(product).all())
    return float(2 * width**3 * rounds / elapsed)


def rates_file(store: ArtifactStore) -> Path | None:
    """Where rates are kept beside artifacts; None for a store that is no local folder."""
    root = getattr(store, "root", None)
    return root / "rates.json" if isinstance(root, Path) else None
