"""A TCP relay whose connections can be made to stall, as behind a firewall that has forgotten them."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

from tests.helpers.servers import LOCAL

_CHUNK = 1 << 16


class Relay:
    """Context manager: passes bytes between clients and a local server.

    Attributes:
        port: where it listens.
        stalled: connections that have stalled.
    """

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._lock = threading.Lock()
        self._to_stall = b""
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server((LOCAL, 0))
        self.port = int(self._listener.getsockname()[1])
        self.stalled = 0

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._listener.close()
        with self._lock:
            for each in self._sockets:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                each.close()

    def stall_next(self, said: bytes) -> None:
        """The next answer that holds these bytes breaks off before them; its connection stays open, and silent both ways."""
        with self._lock:
            self._to_stall = said

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((LOCAL, self._upstream))
                with self._lock:
                    self._sockets += [client, server]
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=(source, target, source is server), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(_CHUNK):
                until = self._stall_at(data) if answers else None
                target.sendall(data[:until])
                if until is not None:
                    return  # neither end learns of it
            target.shutdown(socket.SHUT_WR)

    def _stall_at(self, data: bytes) -> int | None:
        with self._lock:
            if not self._to_stall or self._to_stall not in data:
                return None
            at = data.index(self._to_stall)
            self._to_stall = b""
            self.stalled += 1
            return at
