"""The hook as it is set up: whose webhooks are taken, and what is done about them."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Engine

from safer_engine.errors import SpecError
from service.errors import SourceNotAllowed
from service.infra.settings import Settings
from service.mlflow.registry import Registry
from service.mlflow.store import VersionStore
from service.mlflow.template import Template, read_template
from service.outbound import Outbound


@dataclass(frozen=True)
class MlflowHook:
    """What the route and the threads behind it work with. `secret` signs deliveries."""

    secret: str
    template: Template
    registry: Registry
    versions: VersionStore


def open_hook(settings: Settings, engine: Engine, outbound: Outbound) -> MlflowHook | None:
    """The hook of the settings; None where there is to be none.

    Raises:
        SpecError: the template is wrong, or the server's address is one that may not be reached.
    """
    if settings.mlflow_url is None or settings.mlflow_secret is None or settings.mlflow_template is None:
        return None
    try:
        outbound.precheck(settings.mlflow_url)
    except SourceNotAllowed as error:
        raise SpecError(f"SAFER_MLFLOW_URL: {error.message}", error.hint) from None
    template = read_template(settings.mlflow_template)
    return MlflowHook(settings.mlflow_secret.get_secret_value(), template, Registry(outbound, settings), VersionStore(engine))
