"""Every container's command is started as the chart gives it, with the variables the chart gives it, and does its work.

Only what names other machines is replaced: the database is SQLite, the store a folder, the broker a private Redis.
"""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis import Redis as Client

from service.embedded import free_port
from service.infra import setting_checks
from service.infra.settings import Settings
from tests.deploy.rendering import SETS, Object, Pod, containers, objects_of, of_kind, pods
from tests.helpers.servers import LOCAL, Redis, wait_until

PEPPER = "a pepper that is long enough"
CALLBACK_SECRET = "whsec_" + "c2FmZXItYXVkaXQtc2FmZXItYXVkaXQtMTIz"


def pod_of(name: str, component: str) -> Pod:
    """The pod of a component in a value set."""
    return next(pod for pod in pods(objects_of(name)) if pod.component == component)


def program(pod: Pod) -> list[str]:
    """A container's command, with the program of this environment."""
    container = containers(pod)[0]
    command = [*container["command"], *container["args"]]
    found = {"safer-audit": str(Path(sys.executable).with_name("safer-audit")), "python": sys.executable}
    return [found[command[0]], *command[1:]]


def variables(pod: Pod, folder: Path, broker: str, **replaced: str) -> dict[str, str]:
    """A container's environment: secrets and addresses replaced, all else as the chart gives it."""
    ours = {
        "SAFER_HOME": str(folder / "home"),
        "SAFER_DATABASE_URL": f"sqlite:///{folder / 'service.db'}",
        "SAFER_BROKER_URL": broker,
        "SAFER_STORE_URL": str(folder / "store"),
        "SAFER_SECRET_PEPPER": PEPPER,
        "SAFER_CALLBACK_SECRET": CALLBACK_SECRET,
        "SAFER_HOST": LOCAL,
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "hub"),
    } | replaced
    bare = {name: value for name, value in os.environ.items() if not name.startswith("SAFER_")}
    given = {each["name"]: each.get("value", f"secret of {each['name']}") for each in containers(pod)[0].get("env", ())}
    assert setting_checks.unknown(given, Settings.model_fields) == []
    return {**bare, **given, **{name: value for name, value in ours.items() if name in given}}


def run(pod: Pod, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A container that ends by itself."""
    return subprocess.run(program(pod), env=environment, capture_output=True, text=True, check=False, timeout=120)


@contextmanager
def started(pod: Pod, environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A container that stays; stopped as Kubernetes stops it, and it must end well."""
    with log.open("wb") as output:
        process = subprocess.Popen(program(pod), env=environment, stdout=output, stderr=output)
    try:
        yield process
        process.terminate()
        assert process.wait(60) == 0, log.read_text(errors="replace")[-3000:]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(10)


def probe(check: Object, port: int) -> int:
    """The status that a kubelet sees: it calls a pod by its address."""
    url = f"http://{LOCAL}:{port}{check['httpGet']['path']}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Host": f"10.1.2.3:{port}"}), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory, redis: Redis) -> Path:
    """A folder with the database that the chart's own migration makes."""
    folder = tmp_path_factory.mktemp("release")
    pod = pod_of("production", "migration")
    done = run(pod, variables(pod, folder, redis.url))
    assert done.returncode == 0, done.stderr
    assert (folder / "service.db").is_file()
    return folder


def test_the_migration_can_be_done_twice(migrated: Path, redis: Redis) -> None:
    pod = pod_of("minimal", "migration")
    done = run(pod, variables(pod, migrated, redis.url))
    assert done.returncode == 0, done.stderr
    assert "up to date" in done.stdout


@pytest.mark.parametrize("name", SETS)
def test_the_api_passes_its_probes_and_the_helm_test(name: str, migrated: Path, redis: Redis, tmp_path: Path) -> None:
    pod, port = pod_of(name, "api"), free_port()
    container, ready = containers(pod)[0], pod_of(name, "test")
    environment = variables(pod, migrated, redis.url, SAFER_PORT=str(port))
    with started(pod, environment, tmp_path / "api.log"):
        wait_until(lambda: probe(container["startupProbe"], port) == 200, "the API passes its startup probe", 60)
        assert probe(container["livenessProbe"], port) == 200
        assert probe(container["readinessProbe"], port) == 200
        asked = [*program(ready)[:-1], f"http://{LOCAL}:{port}"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        assert '"ok":true' in done.stdout.replace(" ", "")


def test_the_api_tells_keda_and_prometheus_what_they_ask_it(migrated: Path, redis: Redis, tmp_path: Path) -> None:
    pod, port = pod_of("air-gapped", "api"), free_port()  # whose metrics anyone may read
    (scaled,) = of_kind(objects_of("production"), "ScaledJob")
    (monitor,) = of_kind(objects_of("air-gapped"), "ServiceMonitor")
    trigger = scaled["spec"]["triggers"][0]["metadata"]
    assert trigger["url"].endswith(f":8321{monitor['spec']['endpoints'][0]['path']}")
    with started(pod, variables(pod, migrated, redis.url, SAFER_PORT=str(port)), tmp_path / "api.log"):
        wait_until(lambda: probe(containers(pod)[0]["startupProbe"], port) == 200, "the API passes its startup probe", 60)
        with urllib.request.urlopen(f"http://{LOCAL}:{port}/metrics", timeout=10) as answer:
            told = answer.read().decode()
    assert f"{trigger['valueLocation']} 0.0\n" in told


def test_a_release_without_a_broker_is_alive_not_ready_and_fails_the_helm_test(migrated: Path, tmp_path: Path) -> None:
    pod, port = pod_of("minimal", "api"), free_port()
    container = containers(pod)[0]
    environment = variables(pod, migrated, f"redis://{LOCAL}:{free_port()}/0", SAFER_PORT=str(port))
    with started(pod, environment, tmp_path / "api.log"):
        wait_until(lambda: probe(container["startupProbe"], port) == 200, "the API passes its startup probe", 60)
        assert probe(container["readinessProbe"], port) == 503
        asked = [*program(pod_of("minimal", "test"))[:-1], f"http://{LOCAL}:{port}"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 1
        assert '"broker":{"ok":false' in done.stderr.replace(" ", "")


def test_a_gpu_job_ends_well_where_nothing_waits(migrated: Path, redis: Redis) -> None:
    pod = pod_of("production", "gpu-job")
    assert program(pod)[1:] == ["worker", "--once", "--queues", "gpu"]
    done = run(pod, variables(pod, migrated, redis.url))
    assert done.returncode == 0, done.stderr
    assert "nothing waits in gpu" in done.stdout + done.stderr


@pytest.mark.parametrize(("name", "component"), [("minimal", "cpu-worker"), ("air-gapped", "gpu-worker")])
def test_a_worker_passes_its_probes(name: str, component: str, migrated: Path, redis: Redis, tmp_path: Path) -> None:
    pod, port = pod_of(name, component), free_port()
    container = containers(pod)[0]
    environment = variables(pod, migrated, redis.url, SAFER_METRICS_PORT=str(port))
    with started(pod, environment, tmp_path / "worker.log"):
        wait_until(lambda: probe(container["startupProbe"], port) == 200, "the worker passes its startup probe", 120)
        for kind in ("livenessProbe", "readinessProbe"):
            assert probe(container[kind], port) == 200
        wait_until(lambda: listens(redis), "the worker waits for messages", 60)
        assert f"serves {container['args'][-1].replace(',', ', ')}" in (tmp_path / "worker.log").read_text(errors="replace")


def listens(redis: Redis) -> bool:
    """Whether somebody waits for messages of a queue."""
    with Client.from_url(redis.url) as client:
        return any(each["cmd"] == "brpop" for each in client.client_list())
