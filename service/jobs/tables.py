"""The tables, for SQLite and PostgreSQL alike. Times are UTC, set by the database's clock."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from service.jobs.columns import ID as _ID
from service.jobs.columns import JSON as _JSON
from service.jobs.columns import METADATA as METADATA  # noqa: PLC0414 - offered here too
from service.jobs.columns import TIME as _TIME
from service.jobs.mlflow_tables import mlflow_deliveries as mlflow_deliveries  # noqa: PLC0414 - offered here too
from service.jobs.mlflow_tables import mlflow_versions as mlflow_versions  # noqa: PLC0414 - offered here too

projects = Table(
    "projects",
    METADATA,
    Column("name", String(63), primary_key=True),
    Column("created", _TIME, nullable=False),
    Column("max_running", Integer, nullable=False),
    Column("max_queued", Integer, nullable=False),
    Column("max_bytes", BigInteger, nullable=False),
    Column("gpu_seconds_per_job", Float),
    Column("served", _TIME),
)
"""`served`: when a unit of the project was last handed out; the least recently served comes first among equals."""

api_keys = Table(
    "api_keys",
    METADATA,
    Column("id", String(26), primary_key=True),
    Column("project", String(63), ForeignKey("projects.name"), nullable=False),
    Column("name", String(200), nullable=False),
    Column("roles", _JSON, nullable=False),
    Column("mac", String(64), nullable=False, unique=True),
    Column("created", _TIME, nullable=False),
    Column("expires", _TIME),
    Column("revoked", _TIME),
    Column("last_used", _TIME),
)

jobs = Table(
    "jobs",
    METADATA,
    Column("id", String(26), primary_key=True),
    Column("project", String(63), ForeignKey("projects.name"), nullable=False),
    Column("kind", String(20), nullable=False),
    Column("state", String(12), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("labels", _JSON, nullable=False),
    Column("spec", _JSON, nullable=False),
    Column("callback_url", Text),
    Column("idempotency_key", String(200)),
    Column("body_digest", String(64), nullable=False),
    Column("submitted_by", String(26), nullable=False),
    Column("created", _TIME, nullable=False),
    Column("started", _TIME),
    Column("finished", _TIME),
    Column("cancel_requested", Boolean, nullable=False),
    Column("deleted", _TIME),
    Column("error", _JSON),
    Column("inputs", _JSON, nullable=False),
    Column("plan", _JSON),
    Column("verdict", _JSON),
    Column("verdict_reason", Text, nullable=False),
    Column("gpu_seconds", Float, nullable=False),
    Column("gpu_seconds_budget", Float),
    Column("attempt", Integer, nullable=False),
    Column("callback_state", String(12)),
    Column("callback_at", _TIME),
    Column("callback_attempts", Integer, nullable=False),
    UniqueConstraint("project", "idempotency_key"),
    Index("ix_jobs_project_created", "project", "created", "id"),
    Index("ix_jobs_project_state", "project", "state", "created", "id"),
    Index("ix_jobs_project_kind", "project", "kind", "created", "id"),
    Index("ix_jobs_state_started", "state", "started"),
    Index("ix_jobs_callback", "callback_state", "callback_at"),
)

job_labels = Table(
    "job_labels",
    METADATA,
    Column("job_id", String(26), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("name", String(63), primary_key=True),
    Column("value", String(200), nullable=False),
    Column("project", String(63), nullable=False),
    Column("created", _TIME, nullable=False),
    Index("ix_job_labels_value", "project", "name", "value", "created", "job_id"),
)
"""The labels of `jobs` once more, so that a listing by label walks an index in the order of the page."""

stages = Table(
    "stages",
    METADATA,
    Column("id", _ID, primary_key=True),
    Column("job_id", String(26), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("ordinal", Integer, nullable=False),
    Column("name", String(40), nullable=False),
    Column("queue", String(12), nullable=False),
    Column("state", String(12), nullable=False),
    Column("key", String(64)),
    Column("outcome", String(12)),
    Column("content_digest", String(64)),
    Column("done", Float, nullable=False),
    Column("total", Float, nullable=False),
    Column("unit", String(40), nullable=False),
    Column("pace_done", Float),
    Column("pace_since", _TIME),
    Column("started", _TIME),
    Column("finished", _TIME),
    Column("cost", _JSON),
    Column("reopened", Integer, nullable=False),
    UniqueConstraint("job_id", "ordinal"),
    Index("ix_stages_key", "key"),
    Index("ix_stages_state_name", "state", "name"),
    sqlite_autoincrement=True,
)
"""`pace_done`, `pace_since`: what was done, and when, where the present measurement of the pace begins.

`content_digest` stays when a stage that was done is to be done again, so that it is known whether the outcome is the same.
`reopened`: how often, in this attempt of the job, its artifact was found gone or damaged."""

units = Table(
    "units",
    METADATA,
    Column("id", _ID, primary_key=True),
    Column("stage_id", _ID, ForeignKey("stages.id", ondelete="CASCADE"), nullable=False),
    Column("job_id", String(26), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("project", String(63), nullable=False),
    Column("queue", String(12), nullable=False),
    Column("kind", String(8), nullable=False),
    Column("name", String(80), nullable=False),
    Column("state", String(12), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("ready_at", _TIME, nullable=False),
    Column("sent_at", _TIME),
    Column("sends", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("failures", Integer, nullable=False),
    Column("owner", String(200)),
    Column("token", Integer, nullable=False),
    Column("lease_expires", _TIME),
    Column("beat_at", _TIME),
    Column("key", String(64)),
    Column("done", Float, nullable=False),
    Column("total", Float, nullable=False),
    Column("started", _TIME),
    Column("finished", _TIME),
    Column("error", _JSON),
    UniqueConstraint("stage_id", "kind", "name"),
    Index("ix_units_queue_state", "queue", "state", "priority", "ready_at"),
    Index("ix_units_state_lease", "state", "lease_expires"),
    Index("ix_units_state_key", "state", "key"),
    Index("ix_units_job", "job_id"),
    sqlite_autoincrement=True,
)
"""Ids are never used twice, so a lease of a unit that is gone can never hold one made later. `beat_at`: the last renewal,
up to which GPU time is counted."""

key_locks = Table(
    "key_locks",
    METADATA,
    Column("project", String(63), primary_key=True),
    Column("stage", String(40), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("unit_id", _ID, ForeignKey("units.id", ondelete="CASCADE"), nullable=False),
    Column("token", Integer, nullable=False),
    Index("ix_key_locks_unit", "unit_id"),
)
"""Which leased unit computes a cache key; others that need it are parked."""

commits = Table(
    "commits",
    METADATA,
    Column("project", String(63), primary_key=True),
    Column("stage", String(40), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("attempt", String(32), nullable=False),
    Column("at", _TIME, nullable=False),
)
"""Decides the first commit where the object store has no conditional PUT."""

events = Table(
    "events",
    METADATA,
    Column("id", _ID, primary_key=True, autoincrement=True),
    Column("job_id", String(26), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("at", _TIME, nullable=False),
    Column("kind", String(40), nullable=False),
    Column("stage", String(40)),
    Column("data", _JSON, nullable=False),
    Index("ix_events_job", "job_id", "id"),
    sqlite_autoincrement=True,
)

uploads = Table(
    "uploads",
    METADATA,
    Column("id", String(26), primary_key=True),
    Column("project", String(63), ForeignKey("projects.name"), nullable=False),
    Column("kind", String(12), nullable=False),
    Column("state", String(12), nullable=False),
    Column("title", String(200), nullable=False),
    Column("files", _JSON, nullable=False),
    Column("digest", String(64)),
    Column("bytes", BigInteger, nullable=False),
    Column("created", _TIME, nullable=False),
    Column("expires", _TIME, nullable=False),
    Column("created_by", String(26), nullable=False),
    Index("ix_uploads_digest", "project", "digest"),
)

upload_parts = Table(
    "upload_parts",
    METADATA,
    Column("upload_id", String(26), ForeignKey("uploads.id", ondelete="CASCADE"), primary_key=True),
    Column("file", Integer, primary_key=True),
    Column("part", Integer, primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("etag", String(200)),
)

job_inputs = Table(
    "job_inputs",
    METADATA,
    Column("job_id", String(26), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("role", String(12), primary_key=True),
    Column("digest", String(64), nullable=False),
    Index("ix_job_inputs_digest", "digest"),
)

artifact_refs = Table(
    "artifact_refs",
    METADATA,
    Column("project", String(63), primary_key=True),
    Column("stage", String(40), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("job_id", String(26), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("bytes", BigInteger, nullable=False),
    Column("created", _TIME, nullable=False),
    Index("ix_artifact_refs_job", "job_id"),
)
"""Which jobs use which committed artifact: what garbage collection asks."""

decisions = Table(
    "decisions",
    METADATA,
    Column("id", _ID, primary_key=True, autoincrement=True),
    Column("job_id", String(26), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("pair_id", String(200), nullable=False),
    Column("action", String(8), nullable=False),
    Column("note", Text, nullable=False),
    Column("reviewer", String(200), nullable=False),
    Column("at", _TIME, nullable=False),
    Index("ix_decisions_pair", "job_id", "pair_id", "id"),
)
"""What reviewers decided on recommended edits; the last row of a pair counts, none is ever changed."""

audit_log = Table(
    "audit_log",
    METADATA,
    Column("id", _ID, primary_key=True, autoincrement=True),
    Column("at", _TIME, nullable=False),
    Column("project", String(63)),
    Column("actor", String(200), nullable=False),
    Column("action", String(60), nullable=False),
    Column("target", String(200), nullable=False),
    Column("data", _JSON, nullable=False),
    sqlite_autoincrement=True,
)
"""Append-only: triggers refuse update and delete."""

leaders = Table(
    "leaders",
    METADATA,
    Column("name", String(40), primary_key=True),
    Column("holder", String(200), nullable=False),
    Column("token", Integer, nullable=False),
    Column("expires", _TIME, nullable=False),
)
"""One process at a time leads: dispatches and reconciles."""

counters = Table(
    "counters",
    METADATA,
    Column("name", String(40), primary_key=True),
    Column("value", BigInteger, nullable=False),
)
"""What happened how often since the database was made."""

tallies = Table(
    "tallies",
    METADATA,
    Column("name", String(40), primary_key=True),
    Column("first", String(40), primary_key=True),
    Column("second", String(40), primary_key=True),
    Column("bucket", Integer, primary_key=True, autoincrement=False),
    Column("number", BigInteger, nullable=False),
    Column("total", Float, nullable=False),
)
"""What stage runs came to since the database was made (`service.infra.stage_figures`)."""

gates = Table(
    "gates",
    METADATA,
    Column("id", String(26), primary_key=True),
    Column("project", String(63), ForeignKey("projects.name"), nullable=False),
    Column("job_id", String(26), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("state", String(12), nullable=False),
    Column("policy", _JSON, nullable=False),
    Column("policy_name", String(64), nullable=False),
    Column("policy_digest", String(64), nullable=False),
    Column("baseline", String(300)),
    Column("baseline_job_id", String(26), ForeignKey("jobs.id", ondelete="SET NULL")),
    Column("verdict", String(12)),
    Column("reason", Text, nullable=False),
    Column("error", _JSON),
    Column("decision", Text),
    Column("idempotency_key", String(200)),
    Column("body_digest", String(64), nullable=False),
    Column("submitted_by", String(26), nullable=False),
    Column("created", _TIME, nullable=False),
    Column("decided", _TIME),
    Column("due", _TIME),
    Column("attempts", Integer, nullable=False),
    UniqueConstraint("project", "idempotency_key"),
    Index("ix_gates_project_created", "project", "created", "id"),
    Index("ix_gates_project_state", "project", "state", "created", "id"),
    Index("ix_gates_job", "job_id", "created", "id"),
    Index("ix_gates_state_due", "state", "due"),
)
"""Verdicts that were asked for. `due`: when it may be judged (again); null until its audit has ended. `decision`: the text that
`safer-audit gate --json` prints, byte for byte."""

gate_deliveries = Table(
    "gate_deliveries",
    METADATA,
    Column("id", _ID, primary_key=True, autoincrement=True),
    Column("gate_id", String(26), ForeignKey("gates.id", ondelete="CASCADE"), nullable=False),
    Column("kind", String(20), nullable=False),
    Column("target", _JSON, nullable=False),
    Column("state", String(12), nullable=False),
    Column("due", _TIME),
    Column("attempts", Integer, nullable=False),
    Index("ix_gate_deliveries_gate", "gate_id"),
    Index("ix_gate_deliveries_due", "kind", "state", "due"),
    sqlite_autoincrement=True,
)
"""Who is to be told once a gate is decided. `target` holds no secret."""
