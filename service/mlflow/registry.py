"""The few requests that are made of an MLflow server, over its REST API."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import quote, urlencode

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safer_engine.errors import SaferError
from service.errors import NotFound, ServiceError, SourceNotAllowed, Unavailable
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


class _Wire(BaseModel):
    """Of an answer, what is read. Numbers may come as texts."""

    model_config = ConfigDict(frozen=True)


class _Tag(_Wire):
    key: str
    value: str = ""


class _Version(_Wire):
    source: str = ""
    creation_timestamp: int = 0
    status: str = "READY"
    tags: tuple[_Tag, ...] = ()


class _VersionAnswer(_Wire):
    model_version: _Version


class _UriAnswer(_Wire):
    artifact_uri: str


class _RunInfo(_Wire):
    artifact_uri: str


class _Run(_Wire):
    info: _RunInfo


class _RunAnswer(_Wire):
    run: _Run


class _Alias(_Wire):
    alias: str
    version: str


class _Model(_Wire):
    aliases: tuple[_Alias, ...] = ()


class _ModelAnswer(_Wire):
    registered_model: _Model


class _File(_Wire):
    path: str
    is_dir: bool = False
    file_size: int | None = Field(None, ge=0)


class _FilesAnswer(_Wire):
    files: tuple[_File, ...] = ()


Found = TypeVar("Found", bound=_Wire)


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
        found = self._get(_VersionAnswer, "/model-versions/get", name=model, version=version).model_version
        tags = {tag.key: tag.value for tag in found.tags}
        return ModelVersion(model, version, found.source, found.creation_timestamp, found.status, tags)

    def download_uri(self, model: str, version: str) -> str:
        """Where a version's files are said to be."""
        return self._get(_UriAnswer, "/model-versions/get-download-uri", name=model, version=version).artifact_uri

    def run_folder(self, run_id: str) -> str:
        """Where a run's artifacts are said to be."""
        return self._get(_RunAnswer, "/runs/get", run_id=run_id).run.info.artifact_uri

    def version_of_alias(self, model: str, alias: str) -> str | None:
        """The version that holds an alias; None where none does."""
        listed = self._get(_ModelAnswer, "/registered-models/get", name=model).registered_model.aliases
        return next((each.version for each in listed if each.alias == alias), None)

    def set_tag(self, model: str, version: str, key: str, value: str | None) -> None:
        """Set a tag of a version; None: remove it."""
        body = {"name": model, "version": version, "key": key} | ({} if value is None else {"value": value})
        method, deed = ("DELETE", "delete-tag") if value is None else ("POST", "set-tag")
        with self._asked(method, f"{_API}/model-versions/{deed}", json.dumps(body).encode()):
            pass

    def files(self, folder: str) -> tuple[ProxyFile, ...]:
        """What a folder of the artifact store holds, as the server's artifact proxy lists it."""
        listed = self._answer(_FilesAnswer, f"{_PROXY}?{urlencode({'path': folder})}").files
        return tuple(_file(folder, each) for each in listed)

    @contextmanager
    def open(self, path: str) -> Iterator[Iterator[bytes]]:
        """The bytes of a file of the artifact store, as they come."""
        with self._asked("GET", f"{_PROXY}/{quote(path)}") as answer:
            yield answer.chunks()

    def _get(self, kind: type[Found], path: str, **query: str) -> Found:
        return self._answer(kind, f"{_API}{path}?{urlencode(query)}")

    def _answer(self, kind: type[Found], path: str) -> Found:
        with self._asked("GET", path) as answer:
            raw = answer.read(_LIMIT)
        try:
            return kind.model_validate_json(raw)
        except ValidationError:
            raise Unavailable(
                "the answer is not MLflow's", "SAFER_MLFLOW_URL names the tracking server, not a page before it"
            ) from None

    @contextmanager
    def _asked(self, method: str, path: str, body: bytes | None = None) -> Iterator[Answer]:
        kind = {"Content-Type": "application/json"} if body is not None else {}
        with ExitStack() as stack:
            try:
                asking = self._outbound.ask(method, self.url + path, {**self._headers, **kind}, body)
                answer = stack.enter_context(asking)
            except SourceNotAllowed as error:  # an operator's matter: no fault of what was asked for
                raise Unavailable(f"SAFER_MLFLOW_URL: {error.message}", error.hint) from None
            if not 200 <= answer.status < 300:
                raise _problem(answer)
            yield answer


def _file(folder: str, listed: _File) -> ProxyFile:
    if "/" in listed.path or listed.path in ("", ".", ".."):
        raise RegistryRefused("MLflow lists a file under a name that is none")
    return ProxyFile(f"{folder}/{listed.path}", None if listed.is_dir else listed.file_size, listed.is_dir)


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
