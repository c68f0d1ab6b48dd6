"""The dispatcher: one process at a time hands ready units to the queues, in fair order, and finds again what was lost.

It keeps each queue only a few messages deep, so that priority and fairness are decided late. It goes on through outages
of the broker and of the database: what it could not send stays in SQL and is sent when they are back.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from service.errors import Unavailable
from service.infra.settings import Settings
from service.jobs.model import QUEUES
from service.jobs.queue import Sender
from service.jobs.requests import Message
from service.jobs.store import JobStore

LEADER = "dispatcher"
LEAD_SECONDS = 10.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 10.0
_LOG = logging.getLogger(__name__)


class Dispatcher:
    """Hands out units while it leads, and waits to lead while another does.

    Args:
        on_round: called after each round of reconciliation while this process leads: for what must be done now and then.
    """

    def __init__(
        self, store: JobStore, sender: Sender, settings: Settings, on_round: Callable[[], None] | None = None
    ) -> None:  # fmt: skip
        self._store = store
        self._sender = sender
        self._settings = settings
        self._on_round = on_round
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._leads_until = 0.0
        self._reconciled = 0.0
        self._failures = 0
        self._unsent: deque[Message] = deque()

    def run(self, stop: threading.Event) -> None:
        """Work until told to stop; then another may lead at once."""
        while not stop.is_set():
            try:
                full = self.step()
                if self._failures:
                    _LOG.info("the dispatcher goes on")
                self._failures = 0
            except Unavailable as error:
                self._failures += 1
                if self._failures == 1:
                    _LOG.warning("the dispatcher waits: %s", error.message)
                stop.wait(min(_FIRST_PAUSE * 2.0 ** (self._failures - 1), _LONGEST_PAUSE))
                continue
            if not full:
                self._sender.wait_for_wake(self._settings.dispatch_seconds)
        try:
            self._store.resign(LEADER, self.holder)
        except Unavailable:
            return  # the lead runs out by itself

    def step(self) -> bool:
        """One look: reconcile where it is time, hand out what is ready. Returns whether there may be more at once.

        Raises:
            Unavailable: the database or the broker cannot be reached; nothing is lost.
        """
        if not self._leads():
            return False
        if time.monotonic() - self._reconciled >= self._settings.reconcile_seconds or self._reconciled == 0.0:
            self.reconcile()
            self._reconciled = time.monotonic()
        self._send_again()
        return sum(self._hand_out(queue, room) for queue, room in self._room().items()) > 0

    def reconcile(self) -> None:
        """Send again what Redis lost, take units from workers that are gone. Raises Unavailable."""
        found = self._store.reconcile()
        self._unsent.extend(found.resent)
        self._send_again()
        self._sender.trim()
        told = {"resent": found.resent, "expired": found.expired, "poisoned": found.poisoned, "released": found.released}
        counts = {name: len(units) for name, units in told.items() if units}
        if counts:
            _LOG.info("reconciled: %s", ", ".join(f"{number} {name}" for name, number in counts.items()))
        if self._on_round is not None:
            self._on_round()

    def _leads(self) -> bool:
        """Whether this process leads; renews the lead when a third of it has passed."""
        now = time.monotonic()
        if now < self._leads_until - LEAD_SECONDS * 2 / 3:
            return True
        leads = self._store.lead(LEADER, self.holder, LEAD_SECONDS)
        self._leads_until = now + LEAD_SECONDS if leads else 0.0
        return leads

    def _room(self) -> dict[str, int]:
        """How many more messages each queue may hold."""
        sent = {facts.queue: facts.sent for facts in self._store.queue_facts()}
        return {queue: max(0, self._settings.queue_depth - sent.get(queue, 0)) for queue in QUEUES}

    def _hand_out(self, queue: str, room: int) -> int:
        """Send up to `room` units; returns how many were sent."""
        sent = 0
        for unit in self._store.ready_units(queue, room):
            if self._store.mark_sent(unit):
                self._unsent.append(Message(unit, queue))
                self._send_again()
                sent += 1
        return sent

    def _send_again(self) -> None:
        """Send what was marked as sent; what the broker does not take is tried first when it is back."""
        while self._unsent:
            message = self._unsent[0]
            self._sender.send(message.unit_id, message.queue)
            self._unsent.popleft()
