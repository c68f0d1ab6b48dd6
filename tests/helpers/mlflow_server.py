"""A real MLflow server for tests, with its artifact proxy, and what a user does with it, over its REST API."""

from __future__ import annotations

import base64
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from service.embedded import free_port
from tests.helpers.servers import LOCAL, Server, missing, wait_until

PROGRAM = Path(sys.prefix) / "mlflow" / "bin" / "mlflow"
EVENTS = (("MODEL_VERSION", "CREATED"), ("MODEL_VERSION_ALIAS", "CREATED"))
_API = "/api/2.0/mlflow"
_PATIENCE = 300.0
"""Seconds for a server to start: it imports much, on machines that do other things too."""


@dataclass
class Mlflow(Server):
    """A running server; stop it and start it again at will: what it knows is in its folder."""

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://{LOCAL}:{self.port}"

    def start(self, seconds: float = _PATIENCE) -> None:
        """Start, and wait until it answers."""
        super().start(seconds)
        wait_until(self.healthy, "MLflow answers", seconds)

    def healthy(self) -> bool:
        """Whether it answers."""
        try:
            return httpx.get(f"{self.url}/health", timeout=10).status_code == 200
        except httpx.HTTPError:
            return False

    def post(self, path: str, **body: Any) -> Any:
        """A request that changes something; its answer."""
        answer = httpx.post(f"{self.url}{_API}/{path}", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def get(self, path: str, **query: str) -> Any:
        """A request that reads."""
        answer = httpx.get(f"{self.url}{_API}/{path}", params=query, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def webhook(self, url: str, secret: str, *more: tuple[str, str]) -> str:
        """Have it tell a URL of new versions and of aliases; the webhook's id."""
        events = [{"entity": entity, "action": action} for entity, action in (*EVENTS, *more)]
        return str(self.post("webhooks", name="safer-audit", url=url, secret=secret, events=events)["webhook"]["webhook_id"])

    def log_folder(self, folder: Path, where: str = "model") -> str:
        """A new run with the files of a folder as artifacts; what a version names as its source (`runs:/…`)."""
        run = self.post("runs/create", experiment_id="0")["run"]["info"]
        root = str(run["artifact_uri"]).removeprefix("mlflow-artifacts:/")
        for file in sorted(each for each in folder.rglob("*") if each.is_file()):
            path = f"{root}/{where}/{file.relative_to(folder).as_posix()}"
            address = f"{self.url}/api/2.0/mlflow-artifacts/artifacts/{path}"
            assert httpx.put(address, content=file.read_bytes(), timeout=60).status_code == 200
        return f"runs:/{run['run_id']}/{where}"

    def register(self, model: str, source: str, run_id: str = "") -> str:
        """A new version of a registered model, which is made where there is none."""
        httpx.post(f"{self.url}{_API}/registered-models/create", json={"name": model}, timeout=60)
        run = {"run_id": run_id} if run_id else {}
        return str(self.post("model-versions/create", name=model, source=source, **run)["model_version"]["version"])

    def set_alias(self, model: str, alias: str, version: str) -> None:
        """Let an alias stand for a version."""
        self.post("registered-models/alias", name=model, alias=alias, version=version)

    def tags(self, model: str, version: str) -> dict[str, str]:
        """The tags of a version, without those that MLflow sets of itself."""
        found = self.get("model-versions/get", name=model, version=version)["model_version"].get("tags", [])
        return {tag["key"]: tag["value"] for tag in found}

    def wait_tags(self, model: str, version: str, seconds: float = 240.0, **wanted: str) -> dict[str, str]:
        """The tags of a version once some of ours have these values."""
        named = {f"safer_audit.{name}": value for name, value in wanted.items()}
        seen: dict[str, str] = {}

        def there() -> bool:
            seen.clear()
            seen.update(self.tags(model, version))
            return named.items() <= seen.items()

        try:
            wait_until(there, f"{model} {version} has {named}", seconds)
        except TimeoutError as error:
            raise AssertionError(f"{error}; it has {seen}") from None
        return seen


def mlflow_server(folder: Path) -> Mlflow:
    """A server over SQLite and a folder, started; it may tell addresses of this machine of its events."""
    if not PROGRAM.is_file():
        missing("MLflow (`make .venv/.make/mlflow`)")
    port = free_port()
    command = [
        str(PROGRAM), "server", "--host", LOCAL, "--port", str(port), "--workers", "1", "--serve-artifacts",
        "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    environment = {
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_CACHE_TTL": "0",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": base64.urlsafe_b64encode(bytes(range(32))).decode(),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "PYTHONPATH": "",
    }
    server = Mlflow("mlflow", command, port, folder, environment)
    server.start()
    return server
