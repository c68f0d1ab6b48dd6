"""What the tables are made of: their metadata, and columns that are the same on SQLite and PostgreSQL."""

from __future__ import annotations

from sqlalchemy import JSON as PLAIN_JSON
from sqlalchemy import BigInteger, Integer, MetaData
from sqlalchemy.dialects import postgresql

from service.jobs.clock import UtcDateTime

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}
METADATA = MetaData(naming_convention=NAMING)
JSON = PLAIN_JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
ID = BigInteger().with_variant(Integer, "sqlite")
TIME = UtcDateTime()
