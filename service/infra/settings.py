"""Every setting of the service and its workers: environment variables `SAFER_…`, checked at the start.

A value that is wrong stops the start and is named. Secrets are `SecretStr`: they are never shown, logged or stored.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from safer_engine.errors import SpecError
from service.infra import setting_checks
from service.jobs.model import QUEUES
from service.signing import signing_key

MiB, GiB = 1 << 20, 1 << 30


_CHECKS: dict[str, Callable[[Any], object]] = {
    "broker_url": setting_checks.broker,
    "database_url": setting_checks.database,
    "store_url": setting_checks.store,
    "s3_endpoint": setting_checks.web_address,
    "public_url": setting_checks.web_address,
    "mlflow_url": setting_checks.web_address,
    "mlflow_secret": setting_checks.webhook_secret,
    "allowed_networks": setting_checks.networks,
    "allowed_sources": setting_checks.sources,
    "secret_pepper": setting_checks.pepper,
    "callback_secret": signing_key,
}


class Settings(BaseSettings):
    """Settings of one process."""

    model_config = SettingsConfigDict(env_prefix="SAFER_", extra="ignore", frozen=True)

    home: Path = Field(Path("~/.local/share/safer-audit"), description="Folder of everything that is kept on this machine.")
    database_url: SecretStr | None = Field(
        None, description="SQLAlchemy URL (`postgresql+psycopg://…`); default: SQLite in `home`."
    )
    broker_url: SecretStr = Field(SecretStr("redis://127.0.0.1:6379/0"), description="Redis or Valkey, for Celery only.")
    store_url: str | None = Field(None, description="`s3://bucket/prefix` or a folder; default: a folder in `home`.")
    s3_endpoint: str | None = Field(None, description="Endpoint of an S3 server other than AWS.")
    s3_region: str = Field("us-east-1", description="Region.")
    s3_access_key: SecretStr | None = Field(None, description="Access key; default: boto3's own search.")
    s3_secret_key: SecretStr | None = Field(None, description="Secret key.")
    s3_sse: Literal["", "AES256", "aws:kms"] = Field("", description="Server-side encryption asked for.")
    s3_kms_key: str | None = Field(None, description="Key of `aws:kms`.")
    s3_part_bytes: int = Field(16 * MiB, ge=5 * MiB, description="Part of a multipart upload.")
    s3_parallel: int = Field(4, ge=1, le=32, description="Parts under way at once.")
    s3_deadline_seconds: float = Field(300.0, gt=0, description="All retries of one object together.")
    presign: bool = Field(True, description="Hand out presigned URLs where the store is S3.")

    enable_redteam: bool = Field(
        False, description="Let keys with role redteam have drills run (docs/drill.md); workers read it as the service does."
    )

    host: str = Field("127.0.0.1", description="Address the API listens on.")
    port: int = Field(8321, ge=0, le=65535, description="Port of the API; 0 takes a free one.")
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        ("127.0.0.1", "localhost"), description="Accepted Host headers, comma-separated; `*` for any."
    )
    public_url: str | None = Field(None, description="What clients call the API; for links in callbacks.")
    callback_secret: SecretStr | None = Field(
        None, description="Signs callbacks: `whsec_` and 24 to 64 random bytes in base64. Without it they are not signed."
    )
    secret_pepper: SecretStr | None = Field(None, description="Pepper of API keys; required by `serve`; `up` makes one.")
    body_limit_bytes: int = Field(2 * MiB, gt=0, description="Largest request body, upload parts aside.")
    requests_per_minute: int = Field(600, gt=0, description="Per API key.")
    gate_file_bytes: int = Field(
        32 * MiB, gt=0, description="Largest report.json, and largest evaluation.jsonl, that a gate of the service reads."
    )
    upload_part_limit_bytes: int = Field(64 * MiB, gt=0, description="Largest part of an upload.")
    upload_limit_bytes: int = Field(200 * GiB, gt=0, description="Largest upload.")
    upload_days: float = Field(7.0, gt=0, description="Days until an unfinished upload is removed.")

    allowed_sources: Annotated[tuple[str, ...], NoDecode] = Field(
        ("upload:", "hub:"),
        description="Prefixes of what clients may name: `upload:`, `hub:` or `hub:org/`, `s3://bucket/prefix`, `/folder/`.",
    )
    allowed_networks: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Private networks (CIDR) that callbacks and labellers may reach."
    )
    trust_remote_code: bool = Field(False, description="Let models bring code. Only for operators who have read it.")
    hub_token: SecretStr | None = Field(None, description="Token of the model hub, for workers.")
    labeller_urls: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Labelling endpoints (`base_url`) that specs may name; the key goes to them and nowhere else."
    )
    labeller_api_key: SecretStr | None = Field(None, description="Key of the labelling endpoints, for workers.")

    mlflow_url: str | None = Field(
        None, description="MLflow's tracking server, whose webhooks are taken (docs/mlflow.md); without it there is no such hook."
    )
    mlflow_secret: SecretStr | None = Field(None, description="Secret of the webhook in MLflow, which signs what it sends.")
    mlflow_token: SecretStr | None = Field(None, description="Bearer token for MLflow; or `mlflow_username` and its password.")
    mlflow_username: str | None = Field(None, description="User of MLflow's basic authentication.")
    mlflow_password: SecretStr | None = Field(None, description="Password of `mlflow_username`.")
    mlflow_template: Path | None = Field(
        None, description="YAML file: which registered models are audited, how, by which policy, against what."
    )

    lease_seconds: float = Field(60.0, gt=0, description="A worker that does not renew within this has lost its unit.")
    heartbeat_seconds: float = Field(10.0, gt=0, description="How often a worker renews.")
    resend_seconds: float = Field(30.0, gt=0, description="A message that nobody took within this is sent again.")
    reconcile_seconds: float = Field(30.0, gt=0, description="How often lost messages and leases are looked for.")
    dispatch_seconds: float = Field(0.25, gt=0, description="How often ready units are looked for when nothing wakes us.")
    queue_depth: int = Field(4, ge=1, description="Messages kept in each queue beyond what runs.")
    max_failures: int = Field(3, ge=1, description="A unit that kills its worker this often fails its job.")
    retry_seconds: float = Field(15.0, ge=0, description="Pause before a unit whose error may pass is tried again; doubles.")
    default_max_running: int = Field(8, ge=1, description="Running jobs of a project.")
    default_max_queued: int = Field(1000, ge=1, description="Queued jobs of a project.")
    default_max_bytes: int = Field(1 << 40, ge=1, description="Bytes of uploads and artifacts of a project.")

    queues: Annotated[tuple[str, ...], NoDecode] = Field(QUEUES, description="Queues this worker serves.")
    device: str = Field("auto", description="Device of this worker: `auto`, `cpu`, `cuda`, `cuda:N`.")
    precision_device: Literal["worker", "cpu", "cuda"] = Field(
        "worker",
        description="Device that `auto` precision is chosen for, once for all stages of a job: that of the worker which prepares "
        "the job, or a kind. With workers for `cpu` on machines without a GPU, set `cuda` there.",
    )
    share_stages: bool = Field(True, description="Hand the parts of a stage to several workers, where it has parts.")
    worker_memory_bytes: int | None = Field(None, gt=0, description="Limit of a stage's process; over it, the stage fails.")
    cache_bytes: int = Field(100 * GiB, gt=0, description="Models and datasets kept on this machine, least recently used out.")
    artifact_cache_bytes: int = Field(
        50 * GiB, gt=0, description="Artifacts of an S3 store kept on this machine, least recently used out."
    )
    metrics_port: int = Field(9464, ge=0, le=65535, description="Port of a worker's /metrics; 0 for none.")
    terminate_seconds: float = Field(30.0, gt=0, description="Time for a checkpoint when a worker is asked to stop.")
    metrics_public: bool = Field(
        False, description="Let anyone read the API's /metrics; otherwise this machine itself, and admins of `default`."
    )

    retention_days: float = Field(7.0, gt=0, description="Days that activations and work areas are kept.")
    gc_hours: float = Field(24.0, ge=0, description="Hours between the service's own garbage collections; 0 for none.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least severe line logged.")

    @field_validator("allowed_hosts", "allowed_sources", "allowed_networks", "labeller_urls", "queues", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("queues")
    @classmethod
    def _known_queues(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or set(value) - set(QUEUES):
            raise ValueError("queues are cpu and gpu")
        return value

    @field_validator(*_CHECKS)
    @classmethod
    def _well_formed(cls, value: object, info: ValidationInfo) -> object:
        if value is not None:
            assert info.field_name is not None
            _CHECKS[info.field_name](value.get_secret_value() if isinstance(value, SecretStr) else value)
        return value

    @model_validator(mode="after")
    def _lease_outlives_heartbeats(self) -> Settings:
        if self.lease_seconds < 3 * self.heartbeat_seconds:
            raise ValueError("SAFER_LEASE_SECONDS must be at least three times SAFER_HEARTBEAT_SECONDS")
        return self

    @model_validator(mode="after")
    def _mlflow_is_whole(self) -> Settings:
        needed: dict[str, object] = {"mlflow_secret": self.mlflow_secret, "mlflow_template": self.mlflow_template}
        if self.mlflow_username is not None:
            needed["mlflow_password"] = self.mlflow_password
        setting_checks.mlflow(self.mlflow_url, needed)
        return self

    @cached_property
    def folder(self) -> Path:
        """`home`, absolute."""
        return self.home.expanduser().absolute()

    @property
    def pepper(self) -> bytes:
        """`secret_pepper`, which whatever checks API keys needs. Raises SpecError where it is not set."""
        given = self.secret_pepper.get_secret_value() if self.secret_pepper else ""
        if not given:
            raise SpecError(
                "SAFER_SECRET_PEPPER is not set",
                "set it to a long random string (`openssl rand -hex 32`), the same for every process, and keep it: API keys "
                "depend on it",
            )
        return given.encode()

    @property
    def database(self) -> str:
        """SQLAlchemy URL of the database."""
        return self.database_url.get_secret_value() if self.database_url else f"sqlite:///{self.folder / 'service.db'}"

    @property
    def store(self) -> str:
        """Where artifacts are kept."""
        return self.store_url or str(self.folder / "artifacts")

    @property
    def on_s3(self) -> bool:
        """Whether artifacts are in S3."""
        return urlsplit(self.store).scheme == "s3"


def load_settings(**given: object) -> Settings:
    """Settings from the environment, with what is given over them. Raises SpecError naming each wrong value."""
    try:
        return Settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        raise SpecError("; ".join(map(_told, error.errors(include_input=False))), "see docs/settings.md") from None


def unknown_settings() -> list[str]:
    """What to say of `SAFER_` variables of the environment that are no settings. They stop nothing: others may use the prefix."""
    return setting_checks.unknown(os.environ, Settings.model_fields)


def _told(error: Mapping[str, Any]) -> str:
    name = "_".join(map(str, error["loc"])).upper()
    said = str(error["msg"]).removeprefix("Value error, ")
    return f"SAFER_{name}: {said}" if name else said
