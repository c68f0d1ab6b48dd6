"""Telling those who asked that a gate is decided, each kind of delivery in a thread of its own.

Several processes may run this: a delivery is taken by compare-and-set. It may be made more than once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from service.callbacks import public_address
from service.errors import SourceNotAllowed, Unavailable
from service.infra.settings import Settings
from service.jobs.deliveries import DeliveryStore, OwedDelivery
from service.jobs.gate_model import GateRecord
from service.jobs.gates import GateStore
from service.outbound import Outbound
from service.signing import signer

Send = Callable[[OwedDelivery], bool | None]
"""Delivers: True, it arrived; False, it never will; None, it is to be tried again. May raise Unavailable: tried again."""

_POLL_SECONDS = 2.0
_LOG = logging.getLogger(__name__)


class Deliveries:
    """Makes the deliveries of one kind that are due.

    Args:
        kind: `NewDelivery.kind`.
        send: makes one of them.
    """

    def __init__(self, store: DeliveryStore, kind: str, send: Send) -> None:
        self._store = store
        self._kind = kind
        self._send = send

    def run(self, stop: threading.Event) -> None:
        """Deliver until told to stop."""
        while not stop.is_set():
            try:
                made = self.step(stop)
            except Unavailable as error:
                _LOG.warning("deliveries wait: %s", error.message)
                made = 0
            if not made:
                stop.wait(_POLL_SECONDS)

    def step(self, stop: threading.Event | None = None) -> int:
        """Make what is due now, or until told to stop; how many were due. Raises Unavailable: the database is away."""
        due = self._store.take(self._kind)
        for owed in due:
            if stop is not None and stop.is_set():
                break  # due again after the pause
            gate = {"gate_id": owed.delivery.gate_id}
            try:
                arrived = self._send(owed)
            except Unavailable as error:
                _LOG.info("a gate's %s was not delivered: %s", self._kind, error.message, extra=gate)
                continue
            if arrived is not None:
                self._store.settle(owed.delivery.id, delivered=arrived)
        return len(due)


class GateCallbacks:
    """Sends a decided gate to its callback URL, as `Send`."""

    def __init__(self, gates: GateStore, outbound: Outbound, settings: Settings) -> None:
        self._gates = gates
        self._outbound = outbound
        self._settings = settings

    def __call__(self, owed: OwedDelivery) -> bool | None:
        """One attempt. An answer of 2xx settles it for good, and so does an address that is not allowed."""
        gate = self._gates.record(owed.delivery.gate_id)
        sign = signer(self._settings.callback_secret, f"gate-{gate.id}", owed.at)
        document = gate_document(gate, self._settings.public_url)
        try:
            status = self._outbound.post(owed.delivery.target["url"], document, sign)
        except SourceNotAllowed:
            _LOG.warning("a callback's address is not allowed", extra={"gate_id": gate.id})
            return False
        if 200 <= status < 300:
            return True
        _LOG.info("a callback was answered with %d", status, extra={"gate_id": gate.id})
        return None


def gate_document(gate: GateRecord, public_url: str | None) -> dict[str, Any]:
    """What is sent: ids, the verdict, and of an error only its code. The decision is fetched with a key."""
    return {
        "gate": gate.id,
        "job": gate.job_id,
        "state": gate.state,
        "verdict": gate.verdict,
        "policy": gate.policy_name,
        "policy_digest": gate.policy_digest,
        "baseline": gate.baseline_job_id,
        "error": gate.error.code if gate.error else None,
        "decided": gate.decided.isoformat() if gate.decided else None,
        "url": public_address(public_url, f"/v1/gates/{gate.id}"),
    }
