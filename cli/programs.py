"""Starting the programs of the service: this process becomes one, or waits for one and reads its answer."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from safer_engine.errors import SaferError, SpecError
from service.client import make_error

_SERVICE = ("alembic", "boto3", "celery", "fastapi", "prometheus_client", "pydantic_settings", "redis", "sqlalchemy", "uvicorn")
ENGINE = ("numpy", "pyarrow", "torch", "transformers")


def become(module: str, arguments: list[str], environment: Mapping[str, str] | None = None) -> NoReturn:
    """Replace this process by `python -m module`: signals and the exit code are then its own. Raises SpecError."""
    require(_SERVICE + (ENGINE if module == "workers" else ()))
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, "-m", module, *arguments]
    os.execve(sys.executable, command, {**os.environ, **(environment or {})})  # noqa: S606 - our own module, no shell


def ask(arguments: list[str], home: Path | None, told: str = "") -> Any:
    """What `python -m service.manage` answers; `told` goes to its standard input. Raises the SaferError it names."""
    require(_SERVICE)
    environment = {**os.environ, **({} if home is None else {"SAFER_HOME": str(home)})}
    command = [sys.executable, "-m", "service.manage", *arguments]
    done = subprocess.run(command, env=environment, input=told, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603 - as above
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise make_error("internal", f"python -m service.manage ended with code {done.returncode}") from None
    if isinstance(answer, dict) and "error" in answer:
        raise _error(answer["error"])
    return answer


def require(packages: tuple[str, ...]) -> None:
    """Raises SpecError where packages of the service are missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        extra = "safer-audit[all]" if set(missing) & set(ENGINE) else "safer-audit[service]"
        first = "install torch, then: " if "torch" in missing else ""
        raise SpecError(
            f"this command needs packages that are not installed: {', '.join(missing)}", f"{first}pip install '{extra}'"
        )


def _error(said: Mapping[str, str]) -> SaferError:
    return make_error(said["code"], said["message"], said.get("hint", ""))
