"""The database's clock. Lease times never come from the clock of the machine that asks."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import DateTime, Dialect, Float, literal
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator


class UtcDateTime(TypeDecorator[datetime]):
    """A point in time, UTC; what is read is always aware. SQLite keeps text that sorts as time does."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """An aware time, in UTC. Raises ValueError for a naive one."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a time zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """The stored time, aware."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class UtcNow(FunctionElement[datetime]):
    """Now, by the database's clock, in milliseconds or better; it goes on within a transaction."""

    type = UtcDateTime()
    inherit_cache = True


class _UtcAfter(FunctionElement[datetime]):
    type = UtcDateTime()
    inherit_cache = True


def utc_after(seconds: float) -> FunctionElement[datetime]:
    """So many seconds after now, by the database's clock; a negative number is before it."""
    return _UtcAfter(literal(float(seconds), Float))


@compiles(UtcNow, "sqlite")
def _now_sqlite(element: UtcNow, compiler: SQLCompiler, **_: Any) -> str:
    return "strftime('%Y-%m-%d %H:%M:%f000', 'now')"


@compiles(UtcNow, "postgresql")
def _now_postgresql(element: UtcNow, compiler: SQLCompiler, **_: Any) -> str:
    return "clock_timestamp()"


@compiles(_UtcAfter, "sqlite")
def _after_sqlite(element: _UtcAfter, compiler: SQLCompiler, **given: Any) -> str:
    seconds = compiler.process(element.clauses, **given)
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', printf('%+.3f seconds', {seconds}))"


@compiles(_UtcAfter, "postgresql")
def _after_postgresql(element: _UtcAfter, compiler: SQLCompiler, **given: Any) -> str:
    return f"(clock_timestamp() + make_interval(secs => {compiler.process(element.clauses, **given)}))"
