"""The tables of MLflow's model registry: what its webhooks brought, and what is owed to it."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, Integer, String, Table, UniqueConstraint

from service.jobs.columns import ID, JSON, METADATA, TIME

mlflow_deliveries = Table(
    "mlflow_deliveries",
    METADATA,
    Column("id", String(100), primary_key=True),
    Column("at", TIME, nullable=False),
    Index("ix_mlflow_deliveries_at", "at"),
)
"""Deliveries that were taken, so that one that comes again is known; forgotten when none of its age would be accepted."""

mlflow_versions = Table(
    "mlflow_versions",
    METADATA,
    Column("id", ID, primary_key=True, autoincrement=True),
    Column("model", String(256), nullable=False),
    Column("version", String(20), nullable=False),
    Column("state", String(12), nullable=False),
    Column("alias", String(256)),
    Column("made", BigInteger),
    Column("round", Integer, nullable=False),
    Column("request", JSON),
    Column("project", String(63)),
    Column("job_id", String(26)),
    Column("gate_id", String(26)),
    Column("due", TIME),
    Column("token", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("tags", JSON, nullable=False),
    Column("tags_number", Integer, nullable=False),
    Column("tags_due", TIME),
    Column("tags_attempts", Integer, nullable=False),
    UniqueConstraint("model", "version"),
    Index("ix_mlflow_versions_due", "state", "due"),
    Index("ix_mlflow_versions_tags_due", "tags_due"),
    Index("ix_mlflow_versions_job", "job_id"),
    sqlite_autoincrement=True,
)
"""Model versions that were asked to be audited. See `service.mlflow.store` for what the columns mean."""
