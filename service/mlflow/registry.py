"""The few requests that are made of an MLflow server, over its REST API."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from safer_engine.errors import SaferError
from service.errors import NotFound, ServiceError, Unavailable
from service.infra.settings import Settings
from service.outbound import Answer, Outbound

_API = "/api/2.0/mlflow"
_PROXY = "/api/2.0/mlflow-artifacts/artifacts"
_LIMIT = 8 << 20
_PASSING = frozenset((408, 425, 429))
_KEYS = frozenset((401, 403))


class RegistryRefused(ServiceError):
    """MLflow answers that it will not do what it was asked to; asking again would change nothing."""

    code = "registry_refused"


@dataclass(frozen=True)
class ModelVersion:
    """A model version as the registry describes it.

    Attributes:
        source: where its files are; `created`: milliseconds since the epoch, which tells a version from one of the same
            number of a model that was deleted and made anew.
        status: `READY` once its files are there.
    """

    model: str
    version: str
    source: str
    created: int
    status: str
    tags: dict[str, str]


@dataclass(frozen=True)
class ProxyFile:
    """A file or folder of MLflow's artifact store. `path`: from the store's root."""

    path: str
    size: int | None
    is_dir: bool


class Registry:
    """One MLflow server.

    Every method may raise Unavailable (it cannot be reached, or will not answer now, or does not take our credentials, which
    an operator can mend), NotFound (there is no such thing) and RegistryRefused.
    """

    def __init__(self, outbound: Outbound, settings: Settings) -> None:
        self.url = (settings.mlflow_url or "").rstrip("/")
        self._outbound = outbound
        self._headers = _credentials(settings)

    def version(self, model: str, version: str) -> ModelVersion:
        """One model version."""
        found = _part(self._get("/model-versions/get", name=model, version=version), "model_version")
        tags = {str(tag["key"]): str(tag.get("value", "")) for tag in found.get("tags", [])}
        created, status = int(found.get("creation_timestamp", 0)), str(found.get("status", "READY"))
        return ModelVersion(model, version, str(found.get("source", "")), created, status, tags)

    def download_uri(self, model: str, version: str) -> str:
        """Where a version's files are said to be."""
        found = self._get("/model-versions/get-download-uri", name=model, version=version)
        return str(found.get("artifact_uri", ""))

    def run_folder(self, run_id: str) -> str:
        """Where a run's artifacts are said to be."""
        found = _part(self._get("/runs/get", run_id=run_id), "run")
        return str(_part(found, "info").get("artifact_uri", ""))

    def version_of_alias(self, model: str, alias: str) -> str | None:
        """The version that holds an alias; None where none does."""
        listed = _part(self._get("/registered-models/get", name=model), "registered_model").get("aliases", [])
        return next((str(each["version"]) for each in listed if each["alias"] == alias), None)

    def set_tag(self, model: str, version: str, key: str, value: str) -> None:
        """Set a tag of a version."""
        body = {"name": model, "version": version, "key": key, "value": value}
        self._json("POST", f"{_API}/model-versions/set-tag", json.dumps(body).encode())

    def files(self, folder: str) -> tuple[ProxyFile, ...]:
        """What a folder of the artifact store holds, as the server's artifact proxy lists it."""
        listed = self._json("GET", f"{_PROXY}?{urlencode({'path': folder})}").get("files", [])
        return tuple(_file(folder, each) for each in listed)

    @contextmanager
    def open(self, path: str) -> Iterator[Iterator[bytes]]:
        """The bytes of a file of the artifact store, as they come."""
        with self._asked("GET", f"{_PROXY}/{quote(path)}") as answer:
            yield answer.chunks()

    def _get(self, path: str, **query: str) -> dict[str, Any]:
        return self._json("GET", f"{_API}{path}?{urlencode(query)}")

    def _json(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        with self._asked(method, path, body) as answer:
            raw = answer.read(_LIMIT)
        try:
            found = json.loads(raw)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise _foreign()
        return found

    @contextmanager
    def _asked(self, method: str, path: str, body: bytes | None = None) -> Iterator[Answer]:
        kind = {"Content-Type": "application/json"} if body is not None else {}
        with self._outbound.ask(method, self.url + path, {**self._headers, **kind}, body) as answer:
            if not 200 <= answer.status < 300:
                raise _problem(answer)
            yield answer


def _part(found: dict[str, Any], name: str) -> dict[str, Any]:
    part = found.get(name)
    if not isinstance(part, dict):
        raise _foreign()
    return part


def _foreign() -> Unavailable:
    return Unavailable("the answer is not MLflow's", "SAFER_MLFLOW_URL names the tracking server, not a page before it")


def _file(folder: str, listed: dict[str, Any]) -> ProxyFile:
    name, is_dir = str(listed["path"]), bool(listed.get("is_dir"))
    if "/" in name or name in ("", ".", ".."):
        raise RegistryRefused("MLflow lists a file under a name that is none")
    size = listed.get("file_size")
    return ProxyFile(f"{folder}/{name}", None if is_dir or size is None else int(size), is_dir)


def _problem(answer: Answer) -> SaferError:
    """An answer that is no success, as an error. What a server writes of itself is for our log and tag, cut short."""
    status = answer.status
    if status in _KEYS:
        return Unavailable(f"MLflow does not accept our credentials ({status})", "see SAFER_MLFLOW_TOKEN, SAFER_MLFLOW_USERNAME")
    if status >= 500 or status in _PASSING or status < 400:
        return Unavailable(f"MLflow answered {status}", "see its log")
    told = _told(answer)
    return (NotFound if status == 404 else RegistryRefused)(f"MLflow answered {status}: {told}")


def _told(answer: Answer) -> str:
    try:
        found = json.loads(answer.read(64 << 10))
        return str(found["message"])[:300] if isinstance(found, dict) and "message" in found else "no reason given"
    except (ValueError, Unavailable):
        return "no reason given"


def _credentials(settings: Settings) -> dict[str, str]:
    if settings.mlflow_token is not None:
        return {"Authorization": f"Bearer {settings.mlflow_token.get_secret_value()}"}
    if settings.mlflow_username is not None and settings.mlflow_password is not None:
        pair = f"{settings.mlflow_username}:{settings.mlflow_password.get_secret_value()}"
        return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}
    return {}
