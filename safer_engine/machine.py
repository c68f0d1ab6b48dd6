"""Facts about the machine, and what a piece of work costs on it."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from safer_engine.cost import Cost
from safer_engine.errors import SpecError
from safer_engine.spec import AuditSpec
from safer_engine.spec_retraining import RetrainingSpec

_PACKAGES = ("safer-audit", "torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "scikit-learn", "pyarrow")


def resolve_device(wanted: str) -> str:
    """`cpu`, `cuda` or `cuda:N` for what the spec asks. Imports torch only where a GPU driver is present.

    Raises:
        SpecError: CUDA was asked for and there is none.
    """
    if wanted == "cpu":
        return "cpu"
    present = any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg")) and _cuda_works()
    if wanted == "auto":
        return "cuda" if present else "cpu"
    if not wanted.startswith("cuda"):
        raise SpecError(f"unknown device {wanted!r}", "use auto, cpu, cuda or cuda:N")
    if not present:
        raise SpecError(f"device {wanted} was asked for, but CUDA is not available", "use --device cpu")
    return wanted


def has_fast_bfloat16(device: str) -> bool:
    """Whether bfloat16 products are faster than float32 ones on this device.

    On CPUs that takes AMX. AVX512-BF16 alone was measured at 0.5 to 0.8 of float32's rate (`benchmarks.sae_step`). The flag
    decides and not a measurement, so that the same machine always resolves a spec to the same precision.
    """
    if device.startswith("cuda"):
        import torch

        return bool(torch.cuda.is_bf16_supported())
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def resolve_spec(spec: AuditSpec) -> AuditSpec:
    """The spec with every `auto` that changes results replaced by what this machine makes of it."""
    device = resolve_device(spec.runtime.device)
    model, sae = spec.model, spec.sae
    if model.dtype == "auto":
        model = model.model_copy(update={"dtype": "bfloat16" if device.startswith("cuda") else "float32"})
    if sae.dtype == "auto":
        sae = sae.model_copy(update={"dtype": "bfloat16" if has_fast_bfloat16(device) else "float32"})
    runtime = spec.runtime.model_copy(update={"device": device})
    retraining = settled_retraining(spec.retraining, device)
    return spec.model_copy(update={"model": model, "sae": sae, "retraining": retraining, "runtime": runtime})


def settled_retraining(spec: RetrainingSpec | None, device: str) -> RetrainingSpec | None:
    """The section with its precision decided, for the kind of device that will train."""
    if spec is None or spec.recipe.dtype != "auto":
        return spec
    recipe = spec.recipe.model_copy(update={"dtype": "bfloat16" if device.startswith("cuda") else "float32"})
    return spec.model_copy(update={"recipe": recipe})


def provenance(device: str) -> dict[str, Any]:
    """Versions and machine, for a manifest."""
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "device": device,
        "versions": {name: version for name, version in versions.items() if version},
    }


class Measurement:
    """Time and memory of a piece of work; complete after the block of `measured` ends."""

    def __init__(self) -> None:
        self._wall = time.perf_counter()
        self._cpu = time.process_time()
        self.cost = Cost()

    @property
    def seconds(self) -> float:
        """Wall time since the start."""
        return time.perf_counter() - self._wall

    def so_far(self) -> Cost:
        """What the work took until now, GPU memory left out."""
        return Cost(
            seconds=round(self.seconds, 3),
            cpu_seconds=round(time.process_time() - self._cpu, 3),
            peak_memory_bytes=_peak_memory(),
        )

    def finish(self) -> None:
        """Fill in `cost`."""
        self.cost = self.so_far().model_copy(update={"peak_gpu_bytes": _peak_gpu()})


@contextmanager
def measured() -> Iterator[Measurement]:
    """Measure a block: wall and CPU seconds, peak resident memory of the process during it, peak GPU memory."""
    _reset_peaks()
    measurement = Measurement()
    try:
        yield measurement
    finally:
        measurement.finish()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cuda_works() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _reset_peaks() -> None:
    """Reset the kernel's high-water mark, where it lets us; else the peak is that of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_memory() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no /proc: fall through to the portable figure
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _peak_gpu() -> int | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    peak = int(torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()
    return peak
