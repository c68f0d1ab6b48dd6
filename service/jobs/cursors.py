"""Where a page of a listing ended: a point in time and an id, as an opaque text."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from datetime import UTC, datetime

from safer_engine.errors import SpecError
from service.jobs.ids import is_id


@dataclass(frozen=True)
class Place:
    """The last item of a page, in a listing by time, newest first."""

    created: datetime
    id: str

    def written(self) -> str:
        """As a cursor."""
        return base64.urlsafe_b64encode(f"{self.created.isoformat()}|{self.id}".encode()).decode().rstrip("=")


def read_place(cursor: str) -> Place:
    """The place that a cursor stands for. Raises SpecError for one that no page gave."""
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        at, found = text.split("|")
        created = datetime.fromisoformat(at)
        if created.tzinfo is not None and is_id(found):
            return Place(created.astimezone(UTC), found)
    except (binascii.Error, ValueError, OverflowError):
        pass
    raise SpecError("the cursor is not one that a page of this listing gave", "start again without a cursor")
