"""Where the files of a model version are: what MLflow says, followed to a place that can be read safely.

===========================  ==========================================================================================
``runs:/RUN/PATH``           the run's artifact folder, and on from there
``models:/ID``               what the registry gives as the version's download address, and on from there
``mlflow-artifacts:/PATH``   files behind the artifact proxy of the server that was configured, and of no other
``s3://…``, ``/…``,          named in the audit's spec as they are; whether that is allowed is for the source policy, as of
``file:///…``                any other spec
anything else                refused
===========================  ==========================================================================================
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from service.errors import SourceNotAllowed
from service.mlflow.registry import ModelVersion, Registry

_ROUTE = "/api/2.0/mlflow-artifacts/artifacts/"
_HINT = "log the model's files as artifacts through the server's artifact proxy (`mlflow server --serve-artifacts`), or to s3://"


@dataclass(frozen=True)
class Proxied:
    """A folder of the artifact store behind MLflow. `folder`: from the store's root, without `/` at either end."""

    folder: str


@dataclass(frozen=True)
class Direct:
    """A place that specs may name themselves, where the operator allows it: `s3://…` or an absolute path."""

    name: str


Place = Proxied | Direct


def find_place(registry: Registry, version: ModelVersion) -> Place:
    """Where a version's files are.

    Raises:
        SourceNotAllowed: somewhere that is not read from here.
        NotFound, RegistryRefused, Unavailable: as the registry.
    """
    uri = registry.download_uri(version.model, version.version) or version.source
    if uri.startswith("runs:/"):
        run, _, rest = uri.removeprefix("runs:/").lstrip("/").partition("/")
        uri = _below(registry.run_folder(run), rest)
    return place_of(uri, registry.url)


def place_of(uri: str, server: str) -> Place:
    """What an address stands for. `server`: base URL of the MLflow server. Raises SourceNotAllowed."""
    if not unquote(uri).isprintable():
        raise SourceNotAllowed("the version's files are at a place whose name cannot be written", _HINT)
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and uri.startswith(f"{server}{_ROUTE}"):
        return Proxied(_plain(uri.removeprefix(f"{server}{_ROUTE}"), uri))
    if parts.scheme == "mlflow-artifacts":
        if parts.netloc and parts.netloc != urlsplit(server).netloc:
            raise SourceNotAllowed(f"the version's files are behind another server, {_cut(parts.netloc)}", _HINT)
        return Proxied(_plain(parts.path, uri))
    if parts.scheme == "s3":
        return Direct(uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Direct(unquote(parts.path))
    if not parts.scheme and uri.startswith("/"):
        return Direct(uri)
    raise SourceNotAllowed(f"the version's files are at {_cut(uri)}, which cannot be read from here", _HINT)


def _below(folder: str, rest: str) -> str:
    return f"{folder.rstrip('/')}/{rest}" if rest else folder


def _plain(path: str, uri: str) -> str:
    bare = unquote(path).strip("/")
    if not bare or posixpath.normpath(bare) != bare or bare.startswith("..") or "\\" in bare or not bare.isprintable():
        raise SourceNotAllowed(f"{_cut(uri)} is no plain folder of the artifact store", _HINT)
    return bare


def _cut(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "…")
