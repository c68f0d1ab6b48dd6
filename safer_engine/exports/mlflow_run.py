"""A run in MLflow with an audit's settings, figures and files, over the tracking server's REST API.

The run carries the digest of report.json as a tag: a second export of the same audit finds it and, if it was finished, changes
nothing; one that was interrupted is completed. Files go through the server's artifact proxy.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlsplit

import httpx

from safer_engine.errors import InputRefused, ResourceError
from safer_engine.exports.evidence import evidence_of, evidence_text
from safer_engine.exports.finished_audit import FinishedAudit
from safer_engine.exports.model_card import measured
from safer_engine.report.model import ReportDocument
from safer_engine.report.model_causal import SAFETY_SET

FILES = ("report.html", "report.json", "report.md", "edits.jsonl", "features.parquet", "pair_scores.parquet")
EVIDENCE = "evidence.json"
REPORT_TAG = "safer_audit.report"
_API, _PROXY = "/api/2.0/mlflow", "/api/2.0/mlflow-artifacts/artifacts"
_SCHEME = "mlflow-artifacts"
_NOT_A_NAME = re.compile(r"[^\w\-. /:]")
_LONGEST_NAME, _LONGEST_VALUE, _LONGEST_TAG = 250, 500, 5000
_PARAMS_AT_ONCE, _METRICS_AT_ONCE = 100, 1000
_PATIENCE = 60.0
_MOST_BYTES = 1 << 26


@dataclass(frozen=True)
class Logged:
    """A run that holds an audit; `made`: by this call."""

    run_id: str
    url: str
    made: bool


@dataclass(frozen=True)
class Tracking:
    """A tracking server; its credentials are those of MLflow's own client (MLFLOW_TRACKING_TOKEN, …_USERNAME, …_PASSWORD)."""

    url: str

    @classmethod
    def at(cls, given: str | None) -> Tracking:
        """The server named, or that of MLFLOW_TRACKING_URI. Raises InputRefused for what is no http(s) address."""
        url = (given or os.environ.get("MLFLOW_TRACKING_URI") or "").rstrip("/")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputRefused(
                f"{url!r} is no address of an MLflow tracking server" if url else "no MLflow tracking server is named",
                "give --tracking-uri http://… or set MLFLOW_TRACKING_URI",
            )
        if parts.username or parts.password:
            raise InputRefused("the address holds a password", "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
        return cls(url)

    def client(self) -> httpx.Client:
        """A connection that sends the credentials."""
        token, user = os.environ.get("MLFLOW_TRACKING_TOKEN"), os.environ.get("MLFLOW_TRACKING_USERNAME")
        auth = (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", "")) if user else None
        headers = {"Authorization": f"Bearer {token}"} if token and not auth else {}
        return httpx.Client(base_url=self.url, timeout=_PATIENCE, headers=headers, auth=auth, follow_redirects=False)


def log_audit(audit: FinishedAudit, server: Tracking, experiment: str, name: str | None) -> Logged:
    """Make a run of an audit, or find the one that there is.

    Args:
        experiment: made where there is none of this name.
        name: of the run; None: of the model and the dataset.

    Raises:
        InputRefused: the server refuses what is logged, or keeps files where only its own client can put them.
        ResourceError: it cannot be reached, or does not take the credentials.
    """
    try:
        return _logged(audit, server, experiment, name)
    except (KeyError, TypeError, IndexError, AttributeError):
        raise ResourceError(f"what answers at {server.url} is no MLflow", "see --tracking-uri") from None


def _logged(audit: FinishedAudit, server: Tracking, experiment: str, name: str | None) -> Logged:
    digest, _ = audit.read[audit.path.name]
    cited = evidence_text(evidence_of(audit)).encode()
    with server.client() as client:
        asked = _Asked(client, server.url)
        place = _experiment(asked, experiment)
        found = asked.post("runs/search", experiment_ids=[place], filter=f"tags.`{REPORT_TAG}` = '{digest}'", max_results=1).get(
            "runs", []
        )
        run = found[0]["info"] if found else _new_run(asked, place, name or _name(audit.report), digest)
        run_id = str(run["run_id"])
        link = f"{server.url}/#/experiments/{quote(place)}/runs/{quote(run_id)}"
        if found and run.get("status") == "FINISHED":
            return Logged(run_id, link, made=False)
        for batch in _batches(audit.report, int(run["start_time"])):
            asked.post("runs/log-batch", run_id=run_id, **batch)
        for file in (audit.path.parent / name for name in FILES):
            if file.is_file():
                asked.put(_proxied(str(run["artifact_uri"])), file)
        asked.send(_proxied(str(run["artifact_uri"])), EVIDENCE, cited)
        asked.post("runs/update", run_id=run_id, status="FINISHED", end_time=run["start_time"])
    return Logged(run_id, link, made=True)


@dataclass(frozen=True)
class _Asked:
    """Requests to the server, and what its refusals mean."""

    client: httpx.Client
    url: str

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        return self._answer("POST", f"{_API}/{path}", json=body)

    def get(self, path: str, **query: str) -> dict[str, Any] | None:
        """None where there is no such thing."""
        return self._answer("GET", f"{_API}/{path}", missing=True, params=query) or None

    def put(self, folder: str, file: Path) -> None:
        with file.open("rb") as handle:
            self.send(folder, file.name, handle)

    def send(self, folder: str, name: str, content: BinaryIO | bytes) -> None:
        self._answer("PUT", f"{_PROXY}/{quote(folder)}/{quote(name)}", content=content)

    def _answer(self, method: str, path: str, *, missing: bool = False, **sent: Any) -> dict[str, Any]:
        try:
            answer = self.client.request(method, path, **sent)
        except httpx.HTTPError as error:
            raise ResourceError(f"MLflow at {self.url} cannot be reached: {type(error).__name__}", "is it running?") from None
        if missing and answer.status_code == 404:
            return {}
        if answer.status_code in (401, 403):
            raise ResourceError("MLflow does not accept our credentials", "see MLFLOW_TRACKING_TOKEN, MLFLOW_TRACKING_USERNAME")
        if answer.status_code >= 500 or 300 <= answer.status_code < 400:
            raise ResourceError(f"MLflow at {self.url} answered {answer.status_code}", "see its log")
        if answer.status_code != 200:
            raise InputRefused(f"MLflow refuses {path.rsplit('/', 1)[-1]}: {_told(answer)}", "see its log")
        if method == "PUT":
            return {}
        try:
            found = answer.json() if len(answer.content) <= _MOST_BYTES else None
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ResourceError("the answer is not MLflow's", "--tracking-uri names the tracking server, not a page before it")
        return found


def _told(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status_code}"


def _experiment(asked: _Asked, name: str) -> str:
    """The id of an experiment whose files the server takes for us."""
    found = asked.get("experiments/get-by-name", experiment_name=name)
    if found is None:
        made = str(asked.post("experiments/create", name=name)["experiment_id"])
        found = asked.get("experiments/get", experiment_id=made) or {}
    experiment = found["experiment"]
    if urlsplit(str(experiment.get("artifact_location", ""))).scheme != _SCHEME:
        raise InputRefused(
            f"experiment {name!r} keeps its files where only MLflow's own client puts them",
            "name an experiment of a server started with --serve-artifacts",
        )
    if experiment.get("lifecycle_stage") == "deleted":
        raise InputRefused(f"experiment {name!r} was deleted", "restore it, or name another with --experiment")
    return str(experiment["experiment_id"])


def _new_run(asked: _Asked, experiment: str, name: str, digest: str) -> dict[str, Any]:
    tags = [{"key": REPORT_TAG, "value": digest}, {"key": "mlflow.source.name", "value": "safer-audit export"}]
    begun = int(time.time() * 1000)
    made = asked.post("runs/create", experiment_id=experiment, run_name=name[:_LONGEST_NAME], start_time=begun, tags=tags)
    return dict(made["run"]["info"])


def _proxied(uri: str) -> str:
    return urlsplit(uri).path.strip("/")


def _name(report: ReportDocument) -> str:
    inputs = report.provenance.inputs
    names = [str(inputs[what].origin).rstrip("/").rsplit("/", 1)[-1] for what in ("model", "dataset") if what in inputs]
    return " on ".join(names) or "audit"


def _batches(report: ReportDocument, at: int) -> Iterator[dict[str, Any]]:
    """Bodies of log-batch: settings, tags, figures."""
    params = [{"key": name, "value": value[:_LONGEST_VALUE]} for name, value in _named(flat(report.spec))]
    for start in range(0, len(params), _PARAMS_AT_ONCE):
        yield {"params": params[start : start + _PARAMS_AT_ONCE]}
    metrics = [{"key": name, "value": value, "timestamp": at, "step": 0} for name, value in _named(figures(report))]
    for start in range(0, len(metrics), _METRICS_AT_ONCE):
        yield {"metrics": metrics[start : start + _METRICS_AT_ONCE]}
    yield {"tags": [{"key": key, "value": value[:_LONGEST_TAG]} for key, value in tags_of(report).items()]}


def _named(found: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Names as MLflow allows them; where two become one, the later ones are numbered."""
    seen: dict[str, int] = {}
    for name, value in found:
        plain = _NOT_A_NAME.sub("_", name)[: _LONGEST_NAME - 8].strip(" /.") or "_"
        seen[plain] = seen.get(plain, 0) + 1
        yield plain if seen[plain] == 1 else f"{plain}_{seen[plain]}", value


def flat(spec: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The settings, a line each: dots between sections, lists as JSON."""
    for name, value in spec.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)


def tags_of(report: ReportDocument) -> dict[str, str]:
    """What was audited, by which version, and what retraining showed."""
    tags = {"safer_audit.version": report.provenance.tool_version}
    for name, record in report.provenance.inputs.items():
        tags |= {f"safer_audit.{name}": record.origin, f"safer_audit.{name}.digest": record.digest}
    if report.verification is not None:
        tags["safer_audit.verification"] = report.verification.outcome
    return tags


def figures(report: ReportDocument) -> Iterator[tuple[str, float]]:
    """The audit's figures by name; those that are not finite are left out."""
    for name, value in _figures(report):
        if value is not None and math.isfinite(value):
            yield name, float(value)


def _figures(report: ReportDocument) -> Iterator[tuple[str, float | None]]:
    name, slices = measured(report)
    for one in slices:
        found = one.accuracy
        yield from _with_ends(f"accuracy {name}/{_place(one.axis, one.subset)}", found.estimate, found.lo, found.hi)
    if report.sae is not None:
        yield from (("sae/fvu", report.sae.fvu), ("sae/l0", report.sae.l0), ("sae/dead_share", report.sae.dead_share))
    yield from _feature_figures(report)
    yield from _edit_figures(report)


def _feature_figures(report: ReportDocument) -> Iterator[tuple[str, float | None]]:
    if report.features is not None:
        named = [feature for feature in report.features if feature.safety_feature]
        yield "features/safety", len(named)
        yield "features/discoveries", sum(bool(feature.discovery) for feature in report.features)
        if report.causal is not None:
            yield "features/causal", sum(feature.causal_verified == "yes" for feature in report.features)
            yield "features/safety causal", sum(feature.causal_verified == "yes" for feature in named)
    if report.causal is not None:
        for all_off in (one for one in report.causal.sets if one.name == SAFETY_SET):
            place = _place(all_off.axis, all_off.subset)
            ends = (all_off.change_lo, all_off.change_hi)
            yield from _with_ends(f"safety set ablated accuracy change/{place}", all_off.change, *ends)
            ends = (all_off.margin_lo, all_off.margin_hi)
            yield from _with_ends(f"safety set ablated margin change/{place}", all_off.margin, *ends)


def _edit_figures(report: ReportDocument) -> Iterator[tuple[str, float | None]]:
    if report.edits is not None:
        for axis in report.edits.axes:
            ends = (axis.doubtful_share_lo, axis.doubtful_share_hi)
            yield from _with_ends(f"doubtful share/{_place(axis.axis, None)}", axis.doubtful_share, *ends)
        yield from ((f"edits/{action}", n) for action, n in (report.edits.actions or {}).items())
    if report.verification is not None:
        for effect in report.verification.effects:
            if (effect.arm, effect.reference) == ("edits", "as given"):
                name = f"verified change/{_place(effect.axis, effect.subset)}"
                yield from _with_ends(name, effect.change, effect.lo, effect.hi)


def _with_ends(name: str, value: float | None, lo: float | None, hi: float | None) -> Iterator[tuple[str, float | None]]:
    yield from ((name, value), (f"{name} lo", lo), (f"{name} hi", hi))


def _place(axis: str | None, subset: str | None) -> str:
    """A slice in a metric's name. MLflow may take names for paths: a slice is one part, and no name is a folder of another."""
    return ".".join(part.replace("/", "_") for part in (axis, subset) if part is not None) or "all"
