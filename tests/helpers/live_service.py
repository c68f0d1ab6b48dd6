"""The API of `http_world` behind a real socket, for clients."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from service.embedded import free_port
from tests.helpers.http_world import HttpWorld, http_world
from tests.helpers.servers import wait_until


@dataclass
class LiveService:
    """A running API without workers: what is submitted waits until a test finishes it."""

    world: HttpWorld
    url: str

    def key(self, role: str, project: str = "default") -> str:
        """An API key."""
        return self.world.keys[project, role]


@contextmanager
def live_service(**settings: Any) -> Iterator[LiveService]:
    """Serve on a free port until the block ends."""
    with http_world(**settings) as world:
        port = free_port()
        config = uvicorn.Config(
            world.app, host="127.0.0.1", port=port, log_config=None, access_log=False, timeout_graceful_shutdown=2
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        wait_until(lambda: server.started, "the API listens")
        try:
            yield LiveService(world, f"http://127.0.0.1:{port}")
        finally:
            world.services.stopping.set()
            server.should_exit = True
            thread.join()
