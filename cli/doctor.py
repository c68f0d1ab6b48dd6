"""`safer-audit doctor`: what this machine has, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import click

from cli.options import json_option, store_option
from cli.output import console, print_json, size, table

_ENGINE = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "pyarrow",
    "pandas",
    "numpy",
    "scipy",
    "sklearn",
    "peft",
)
_SERVICE = ("celery", "redis", "sqlalchemy", "fastapi", "boto3")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table; state is ok, note or missing."""

    what: str
    state: str
    detail: str


@click.command("doctor")
@store_option
@json_option
@click.pass_context
def doctor_command(ctx: click.Context, store: Path | None, as_json: bool) -> None:
    """What this machine has, and what is missing. Exits with 4 when audits cannot run here."""
    from safer_engine.api import default_store

    findings = examine(store or default_store())
    if as_json:
        print_json([vars(finding) for finding in findings])
    else:
        console().print(table("This machine", ("what", "state", "detail"), [tuple(vars(f).values()) for f in findings]))
    if any(finding.state == "missing" for finding in findings):
        ctx.exit(4)


def examine(store: Path) -> list[Finding]:
    """Look at Python, packages, processor, memory, disk and GPU."""
    supported = sys.version_info >= (3, 11)
    findings = [Finding("python", "ok" if supported else "missing", platform.python_version())]
    absent = [name for name in _ENGINE if find_spec(name) is None]
    detail = f"not installed: {', '.join(absent)}; pip install 'safer-audit[engine]'" if absent else _versions()
    findings.append(Finding("engine", "missing" if absent else "ok", detail))
    unserved = [name for name in _SERVICE if find_spec(name) is None]
    note = f"not installed: {', '.join(unserved)} (only a service needs them)" if unserved else "installed"
    findings.append(Finding("service", "note" if unserved else "ok", note))
    findings += [_processor(), _memory(), _disk(store)]
    if "torch" not in absent:
        findings.append(_gpu())
    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    findings.append(Finding("hub", "note" if offline else "ok", "HF_HUB_OFFLINE=1" if offline else endpoint))
    return findings


def _versions() -> str:
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "datasets"))


def _processor() -> Finding:
    from safer_engine.machine import has_fast_bfloat16

    fast = "AMX: SAE training in bfloat16" if has_fast_bfloat16("cpu") else "no AMX: SAE training in float32"
    return Finding("processor", "ok", f"{os.cpu_count()} cores, {fast}")


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Finding("memory", "ok" if total >= 4e9 else "note", size(total))


def _disk(store: Path) -> Finding:
    whole = store.expanduser().absolute()
    place = next(path for path in (whole, *whole.parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=place):  # permissions alone don't say it: a user may be allowed what a disk isn't
            free = shutil.disk_usage(place).free
    except OSError as error:
        return Finding("store", "missing", f"{store} cannot be written: {error.strerror}; name another folder with --store")
    return Finding("store", "ok" if free > 5e9 else "note", f"{store}, {size(free)} free")


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("gpu", "note", "none: audits run on the CPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("gpu", "ok", ", ".join(names))
