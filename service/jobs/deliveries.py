"""Who is told once a gate is decided: an outbox. A delivery is stored with its gate, and becomes due with the decision.

What is due is taken by compare-and-set, so that several processes may deliver. It may arrive more than once, never not at all
while its receiver can be reached.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, insert, select, update

from service.jobs.clock import UtcNow, utc_after
from service.jobs.database import reading, writing
from service.jobs.gate_model import CALLBACK, DeliveryState, NewDelivery
from service.jobs.tables import gate_deliveries as rows

MAX_ATTEMPTS = 8
_FIRST_PAUSE_SECONDS = 15.0
__all__ = ["CALLBACK", "Delivery", "DeliveryState", "DeliveryStore", "NewDelivery", "OwedDelivery"]


@dataclass(frozen=True)
class Delivery:
    """A stored delivery. `attempts`: how often it was tried."""

    id: int
    gate_id: str
    kind: str
    target: dict[str, Any]
    state: DeliveryState
    attempts: int


@dataclass(frozen=True)
class OwedDelivery:
    """A delivery to make now. `at`: when that was decided, by the database's clock."""

    delivery: Delivery
    at: datetime


class DeliveryStore:
    """Deliveries of gates that are decided. Every method is one or more transactions and may raise Unavailable."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def of_gate(self, gate_id: str) -> tuple[Delivery, ...]:
        """The deliveries of a gate, in the order they were asked for."""
        query = select(rows).where(rows.c.gate_id == gate_id).order_by(rows.c.id)
        with reading(self._engine) as connection:
            return tuple(_delivery(row) for row in connection.execute(query).mappings())

    def take(self, kind: str, limit: int = 20) -> tuple[OwedDelivery, ...]:
        """Deliveries of a kind that are due now.

        Each is due again after a pause that doubles (15 s at first), unless `settle` says how it went; after `MAX_ATTEMPTS` it
        is given up.
        """
        with reading(self._engine) as connection:
            query = select(rows.c.id).where(*_due(kind)).order_by(rows.c.due).limit(limit)
            found = connection.execute(query).scalars().all()
        return tuple(owed for each in found if (owed := self._take(kind, each)) is not None)

    def _take(self, kind: str, delivery_id: int) -> OwedDelivery | None:
        with writing(self._engine) as connection:
            query = select(rows).where(rows.c.id == delivery_id, *_due(kind)).with_for_update()
            row = connection.execute(query).mappings().one_or_none()
            if row is None:
                return None
            attempts = row["attempts"] + 1
            state = DeliveryState.PENDING if attempts < MAX_ATTEMPTS else DeliveryState.FAILED
            again = utc_after(_FIRST_PAUSE_SECONDS * 2.0 ** (attempts - 1))
            changed = update(rows).where(rows.c.id == delivery_id).values(state=state, attempts=attempts, due=again)
            connection.execute(changed)
            at: datetime = connection.execute(select(UtcNow())).scalar_one()
            return OwedDelivery(_delivery({**row, "state": state, "attempts": attempts}), at)

    def settle(self, delivery_id: int, *, delivered: bool) -> None:
        """It arrived, or never will: it is not tried again. A delivery that has arrived stays so."""
        open_still = (rows.c.id == delivery_id) & rows.c.state.in_((DeliveryState.PENDING, DeliveryState.FAILED))
        to = DeliveryState.DELIVERED if delivered else DeliveryState.FAILED
        with writing(self._engine) as connection:
            connection.execute(update(rows).where(open_still).values(state=to))


def add_deliveries(connection: Connection, gate_id: str, wanted: Iterable[NewDelivery]) -> None:
    """Store who is to be told, in the transaction that stores the gate."""
    for each in wanted:
        row = {"gate_id": gate_id, "kind": each.kind, "target": dict(each.target), "state": DeliveryState.WAITING, "attempts": 0}
        connection.execute(insert(rows).values(row))


def release_deliveries(connection: Connection, gate_id: str) -> None:
    """They are due now, in the transaction that decides the gate."""
    waiting = (rows.c.gate_id == gate_id) & (rows.c.state == DeliveryState.WAITING)
    connection.execute(update(rows).where(waiting).values(state=DeliveryState.PENDING, due=UtcNow()))


def _due(kind: str) -> tuple[Any, ...]:
    return (rows.c.kind == kind, rows.c.state == DeliveryState.PENDING, rows.c.due <= UtcNow())


def _delivery(row: Mapping[Any, Any]) -> Delivery:
    given = {name: row[name] for name in ("id", "gate_id", "kind", "target", "attempts")}
    return Delivery(state=DeliveryState(row["state"]), **given)
