"""The texts of a job's most suspicious pairs, as its report holds them."""

from __future__ import annotations

import json
from typing import Any

from service.errors import NotFound
from service.http.job_files import job_file, read_file
from service.http.services import PairTexts, Services
from service.jobs.model import JobRecord

_LARGEST = 64 << 20


def pair_texts(services: Services, job: JobRecord) -> dict[str, PairTexts]:
    """Pair id → its texts; empty where the audit was asked to keep them out of its report, or has none."""
    try:
        file = job_file(services, job, "report.json")
    except NotFound:
        return {}
    if file.size > _LARGEST:
        return {}
    return services.pair_texts.get(file.digest, lambda: _read(read_file(services, job, file)))


def _read(data: bytes) -> dict[str, PairTexts]:
    pairs = (json.loads(data).get("edits") or {}).get("pairs") or []
    return {pair["pair_id"]: _texts(pair) for pair in pairs if pair.get("prompt") is not None}


def _texts(pair: dict[str, Any]) -> PairTexts:
    prompt, chosen, rejected = (pair[name] for name in ("prompt", "chosen", "rejected"))
    omitted = sum(int(part.get("omitted", 0)) for part in (prompt, chosen, rejected))
    return PairTexts(str(prompt["text"]), str(chosen["text"]), str(rejected["text"]), omitted)
