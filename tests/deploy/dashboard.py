"""Draws what the dashboard's queries return while a real service works: `python -m tests.deploy.dashboard`.

    python -m tests.deploy.dashboard [--minutes 10] [--image docs/images/dashboard.svg]

An API, two workers, Redis, an S3 server and Prometheus run here for so long, on small audits of a tiny model: new ones, some
that find everything there, some that are refused or cancelled, some with a gate. In between a worker is killed, and Redis is away
for a while. There is no GPU: the queue `gpu` is served on the CPU. The picture has the panels in the dashboard's own grid; named
`*.png` it is made by Chromium.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safer_engine.errors import SaferError
from service.client import AuditClient, GateRequest, Submission
from service.embedded import free_port
from service.jobs.model import FINAL_JOB_STATES
from tests.helpers.browser import chromium
from tests.helpers.dashboard_drawing import WIDTH, drawing, lines
from tests.helpers.deployment import Deployment
from tests.helpers.prometheus import API, WORKERS, Prometheus, dashboard, prometheus_server
from tests.helpers.servers import LOCAL, S3, Redis, moto_server, redis_server, s3_bucket
from tests.helpers.workplace import PROJECT, material, stop_group

_SCRAPE_SECONDS = 5.0
_POINTS = 100
_AT_ONCE = 4
_EVALUATED = {"edits": {"budget": 0.1}}


@dataclass
class Scene:
    """A service under load.

    Attributes:
        ports: of the workers' metrics.
    """

    place: Deployment
    broker: Redis
    prometheus: Prometheus
    files: dict[str, Path]
    ports: list[int]

    def start_worker(self, number: int) -> None:
        """Start a worker, again on its port."""
        self.place.worker(SAFER_METRICS_PORT=str(self.ports[number]))

    def kill_worker(self) -> None:
        """Kill the first worker in the middle of its work, and start another in its place."""
        stop_group(self.place.workers[0], signal.SIGKILL)
        self.start_worker(0)

    def lose_the_broker(self) -> None:
        """Be without Redis for a while; who asks whether the API is ready learns it."""
        self.broker.stop()
        for _ in range(40):
            self.place.ready()
            time.sleep(0.5)
        self.broker.start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--image", type=Path, default=Path("docs/images/dashboard.svg"))
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that its processes end with it
    with tempfile.TemporaryDirectory() as made, scene(Path(made)) as found:
        start = time.time()
        run(found, 60.0 * arguments.minutes)
        picture = drawn(found.prometheus, start, time.time())
    arguments.image.parent.mkdir(parents=True, exist_ok=True)
    if arguments.image.suffix == ".svg":
        arguments.image.write_text(picture, encoding="utf-8")
    else:
        photograph(picture, arguments.image)
    sys.stdout.write(f"{arguments.image}: {arguments.image.stat().st_size} bytes\n")


@contextmanager
def scene(folder: Path) -> Iterator[Scene]:
    """Everything that runs, until the block ends."""
    with ExitStack() as stack:
        broker, s3 = redis_server(folder), moto_server(folder)
        for server in (broker, s3):
            stack.callback(server.stop)
            server.start()
        bucket: S3 = s3_bucket(f"http://{LOCAL}:{s3.port}", "access-key", "secret-key")
        place = Deployment(folder / "place", broker_url=broker.url, resend_seconds=5.0, **bucket.settings("shown"))
        stack.callback(place.close)
        ports = [free_port(), free_port()]
        api = int(place.url.rpartition(":")[2])
        prometheus = prometheus_server(folder / "prometheus", {API: [api], WORKERS: ports}, _SCRAPE_SECONDS)
        stack.callback(prometheus.stop)
        found = Scene(place, broker, prometheus, material(folder / "of the client"), ports)
        place.start_api()
        prometheus.start()
        for number in range(len(ports)):
            found.start_worker(number)
        yield found


def run(found: Scene, seconds: float) -> None:
    """Keep some jobs under way for so long, with two accidents on the way."""
    rng = random.Random(0)
    place, began = found.place, time.monotonic()
    first = place.submit(found.files, **_EVALUATED)
    refused = place.submit({"model": found.files["model"], "dataset": found.files["model"] / "config.json"})
    accidents: list[tuple[float, Callable[[], None]]] = [(0.65, found.lose_the_broker), (0.4, found.kill_worker)]
    with place.client() as client:
        specs = [client.job(first).spec, client.job(refused).spec]
        while (passed := (time.monotonic() - began) / seconds) < 1.0:
            if accidents and passed > accidents[-1][0]:
                accidents.pop()[1]()
            if sum(job.state not in FINAL_JOB_STATES for job in place.jobs.find(PROJECT).items) < _AT_ONCE:
                submit_one(client, rng, specs)
            time.sleep(1.0)


def submit_one(client: AuditClient, rng: random.Random, specs: list[dict[str, Any]]) -> None:
    """A new audit, mostly; or one that is there, one that is refused, or one that is cancelled at once."""
    kind = rng.choices(["new", "known", "refused", "cancelled"], [7, 2, 1, 1])[0]
    spec = specs[1] if kind == "refused" else specs[0]
    if kind in ("new", "cancelled"):
        spec = {**spec, "seed": rng.randrange(1_000_000)}
    with suppress(SaferError):
        job = client.submit(Submission(spec))
        if kind == "cancelled":
            client.cancel(job.id)
        elif rng.random() < 0.4:
            client.post_gate(GateRequest(audit=job.id))


def drawn(prometheus: Prometheus, start: float, end: float) -> str:
    """The dashboard over a time, as SVG."""
    document, step = dashboard(), max((end - start) / _POINTS, _SCRAPE_SECONDS)
    panels = [panel for panel in document["panels"] if panel["type"] != "row"]
    answers = {
        panel["title"]: lines(panel, [prometheus.over(target["expr"], start, end, step) for target in panel["targets"]])
        for panel in panels
    }
    return drawing(document, answers, start, end)


def photograph(picture: str, path: Path) -> None:
    """An SVG as a PNG, by a browser."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": WIDTH, "height": 800})
        page.set_content(f"<style>body {{ margin: 0 }} svg {{ display: block }}</style>{picture}")
        page.screenshot(path=str(path), full_page=True)


if __name__ == "__main__":
    main()
