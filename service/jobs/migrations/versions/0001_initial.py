"""The tables of jobs, keys, uploads and decisions, and an audit log that only grows."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create every table."""
    for create in (
        _audit_log,
        _commits,
        _counters,
        _leaders,
        _projects,
        _api_keys,
        _jobs,
        _uploads,
        _artifact_refs,
        _decisions,
        _events,
        _job_inputs,
        _job_labels,
        _stages,
        _upload_parts,
        _units,
        _key_locks,
    ):
        create()
    if op.get_context().dialect.name == "postgresql":
        _append_only_postgresql()
    else:
        _append_only_sqlite()


def downgrade() -> None:
    """Drop every table, with all that is in them."""
    for table in (
        "key_locks",
        "units",
        "upload_parts",
        "stages",
        "job_labels",
        "job_inputs",
        "events",
        "decisions",
        "artifact_refs",
        "uploads",
        "jobs",
        "api_keys",
        "projects",
        "leaders",
        "counters",
        "commits",
        "audit_log",
    ):
        op.drop_table(table)
    if op.get_context().dialect.name == "postgresql":
        op.execute("DROP FUNCTION audit_log_refuse()")


def _append_only_sqlite() -> None:
    for deed in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER audit_log_no_{deed.lower()} BEFORE {deed} ON audit_log "
            "BEGIN SELECT RAISE(ABORT, 'audit_log is append-only'); END"
        )


def _append_only_postgresql() -> None:
    op.execute(
        "CREATE FUNCTION audit_log_refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'audit_log is append-only'; END $$"
    )
    op.execute(
        "CREATE TRIGGER audit_log_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_log_refuse()"
    )


def _audit_log() -> None:
    op.create_table(
        "audit_log",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("project", sa.String(length=63), nullable=True),
        sa.Column("actor", sa.String(length=200), nullable=False),
        sa.Column("action", sa.String(length=60), nullable=False),
        sa.Column("target", sa.String(length=200), nullable=False),
        sa.Column("data", JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit_log"),
        sqlite_autoincrement=True,
    )


def _commits() -> None:
    op.create_table(
        "commits",
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("stage", sa.String(length=40), nullable=False),
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("attempt", sa.String(length=32), nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("project", "stage", "key", name="pk_commits"),
    )


def _counters() -> None:
    op.create_table(
        "counters",
        sa.Column("name", sa.String(length=40), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_counters"),
    )


def _leaders() -> None:
    op.create_table(
        "leaders",
        sa.Column("name", sa.String(length=40), nullable=False),
        sa.Column("holder", sa.String(length=200), nullable=False),
        sa.Column("token", sa.Integer(), nullable=False),
        sa.Column("expires", TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_leaders"),
    )


def _projects() -> None:
    op.create_table(
        "projects",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.Column("max_running", sa.Integer(), nullable=False),
        sa.Column("max_queued", sa.Integer(), nullable=False),
        sa.Column("max_bytes", sa.BigInteger(), nullable=False),
        sa.Column("gpu_seconds_per_job", sa.Float(), nullable=True),
        sa.Column("served", TIME, nullable=True),
        sa.PrimaryKeyConstraint("name", name="pk_projects"),
    )


def _api_keys() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(length=26), nullable=False),
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("roles", JSON, nullable=False),
        sa.Column("mac", sa.String(length=64), nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.Column("expires", TIME, nullable=True),
        sa.Column("revoked", TIME, nullable=True),
        sa.Column("last_used", TIME, nullable=True),
        sa.ForeignKeyConstraint(["project"], ["projects.name"], name="fk_api_keys_project_projects"),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.UniqueConstraint("mac", name="uq_api_keys_mac"),
    )


def _jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(length=26), nullable=False),
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("state", sa.String(length=12), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("labels", JSON, nullable=False),
        sa.Column("spec", JSON, nullable=False),
        sa.Column("callback_url", sa.Text(), nullable=True),
        sa.Column("idempotency_key", sa.String(length=200), nullable=True),
        sa.Column("body_digest", sa.String(length=64), nullable=False),
        sa.Column("submitted_by", sa.String(length=26), nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.Column("started", TIME, nullable=True),
        sa.Column("finished", TIME, nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("deleted", TIME, nullable=True),
        sa.Column("error", JSON, nullable=True),
        sa.Column("inputs", JSON, nullable=False),
        sa.Column("plan", JSON, nullable=True),
        sa.Column("verdict", JSON, nullable=True),
        sa.Column("verdict_reason", sa.Text(), nullable=False),
        sa.Column("gpu_seconds", sa.Float(), nullable=False),
        sa.Column("gpu_seconds_budget", sa.Float(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("callback_state", sa.String(length=12), nullable=True),
        sa.Column("callback_at", TIME, nullable=True),
        sa.Column("callback_attempts", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["project"], ["projects.name"], name="fk_jobs_project_projects"),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.UniqueConstraint("project", "idempotency_key", name="uq_jobs_project_idempotency_key"),
    )
    op.create_index("ix_jobs_callback", "jobs", ["callback_state", "callback_at"])
    op.create_index("ix_jobs_project_created", "jobs", ["project", "created", "id"])
    op.create_index("ix_jobs_project_kind", "jobs", ["project", "kind", "created", "id"])
    op.create_index("ix_jobs_project_state", "jobs", ["project", "state", "created", "id"])
    op.create_index("ix_jobs_state_started", "jobs", ["state", "started"])


def _uploads() -> None:
    op.create_table(
        "uploads",
        sa.Column("id", sa.String(length=26), nullable=False),
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.String(length=12), nullable=False),
        sa.Column("state", sa.String(length=12), nullable=False),
        sa.Column("title", sa.String(length=200), nullable=False),
        sa.Column("files", JSON, nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=True),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.Column("expires", TIME, nullable=False),
        sa.Column("created_by", sa.String(length=26), nullable=False),
        sa.ForeignKeyConstraint(["project"], ["projects.name"], name="fk_uploads_project_projects"),
        sa.PrimaryKeyConstraint("id", name="pk_uploads"),
    )
    op.create_index("ix_uploads_digest", "uploads", ["project", "digest"])


def _artifact_refs() -> None:
    op.create_table(
        "artifact_refs",
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("stage", sa.String(length=40), nullable=False),
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=26), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_artifact_refs_job_id_jobs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("project", "stage", "key", "job_id", name="pk_artifact_refs"),
    )
    op.create_index("ix_artifact_refs_job", "artifact_refs", ["job_id"])


def _decisions() -> None:
    op.create_table(
        "decisions",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("job_id", sa.String(length=26), nullable=False),
        sa.Column("pair_id", sa.String(length=200), nullable=False),
        sa.Column("action", sa.String(length=8), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("reviewer", sa.String(length=200), nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_decisions_job_id_jobs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_decisions"),
    )
    op.create_index("ix_decisions_pair", "decisions", ["job_id", "pair_id", "id"])


def _events() -> None:
    op.create_table(
        "events",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("job_id", sa.String(length=26), nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("kind", sa.String(length=40), nullable=False),
        sa.Column("stage", sa.String(length=40), nullable=True),
        sa.Column("data", JSON, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_events_job_id_jobs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_events"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_events_job", "events", ["job_id", "id"])


def _job_inputs() -> None:
    op.create_table(
        "job_inputs",
        sa.Column("job_id", sa.String(length=26), nullable=False),
        sa.Column("role", sa.String(length=12), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_inputs_job_id_jobs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "role", name="pk_job_inputs"),
    )
    op.create_index("ix_job_inputs_digest", "job_inputs", ["digest"])


def _job_labels() -> None:
    op.create_table(
        "job_labels",
        sa.Column("job_id", sa.String(length=26), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("value", sa.String(length=200), nullable=False),
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_labels_job_id_jobs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "name", name="pk_job_labels"),
    )
    op.create_index("ix_job_labels_value", "job_labels", ["project", "name", "value", "created", "job_id"])


def _stages() -> None:
    op.create_table(
        "stages",
        sa.Column("id", ID, nullable=False),
        sa.Column("job_id", sa.String(length=26), nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=40), nullable=False),
        sa.Column("queue", sa.String(length=12), nullable=False),
        sa.Column("state", sa.String(length=12), nullable=False),
        sa.Column("key", sa.String(length=64), nullable=True),
        sa.Column("outcome", sa.String(length=12), nullable=True),
        sa.Column("content_digest", sa.String(length=64), nullable=True),
        sa.Column("done", sa.Float(), nullable=False),
        sa.Column("total", sa.Float(), nullable=False),
        sa.Column("unit", sa.String(length=40), nullable=False),
        sa.Column("pace_done", sa.Float(), nullable=True),
        sa.Column("pace_since", TIME, nullable=True),
        sa.Column("started", TIME, nullable=True),
        sa.Column("finished", TIME, nullable=True),
        sa.Column("cost", JSON, nullable=True),
        sa.Column("reopened", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_stages_job_id_jobs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_stages"),
        sa.UniqueConstraint("job_id", "ordinal", name="uq_stages_job_id_ordinal"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_stages_key", "stages", ["key"])
    op.create_index("ix_stages_state_name", "stages", ["state", "name"])


def _upload_parts() -> None:
    op.create_table(
        "upload_parts",
        sa.Column("upload_id", sa.String(length=26), nullable=False),
        sa.Column("file", sa.Integer(), nullable=False),
        sa.Column("part", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("etag", sa.String(length=200), nullable=True),
        sa.ForeignKeyConstraint(["upload_id"], ["uploads.id"], name="fk_upload_parts_upload_id_uploads", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("upload_id", "file", "part", name="pk_upload_parts"),
    )


def _units() -> None:
    op.create_table(
        "units",
        sa.Column("id", ID, nullable=False),
        sa.Column("stage_id", ID, nullable=False),
        sa.Column("job_id", sa.String(length=26), nullable=False),
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("queue", sa.String(length=12), nullable=False),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("name", sa.String(length=80), nullable=False),
        sa.Column("state", sa.String(length=12), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("ready_at", TIME, nullable=False),
        sa.Column("sent_at", TIME, nullable=True),
        sa.Column("sends", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("owner", sa.String(length=200), nullable=True),
        sa.Column("token", sa.Integer(), nullable=False),
        sa.Column("lease_expires", TIME, nullable=True),
        sa.Column("beat_at", TIME, nullable=True),
        sa.Column("key", sa.String(length=64), nullable=True),
        sa.Column("done", sa.Float(), nullable=False),
        sa.Column("total", sa.Float(), nullable=False),
        sa.Column("started", TIME, nullable=True),
        sa.Column("finished", TIME, nullable=True),
        sa.Column("error", JSON, nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_units_job_id_jobs", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["stage_id"], ["stages.id"], name="fk_units_stage_id_stages", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_units"),
        sa.UniqueConstraint("stage_id", "kind", "name", name="uq_units_stage_id_kind_name"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_units_job", "units", ["job_id"])
    op.create_index("ix_units_queue_state", "units", ["queue", "state", "priority", "ready_at"])
    op.create_index("ix_units_state_key", "units", ["state", "key"])
    op.create_index("ix_units_state_lease", "units", ["state", "lease_expires"])


def _key_locks() -> None:
    op.create_table(
        "key_locks",
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("stage", sa.String(length=40), nullable=False),
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("unit_id", ID, nullable=False),
        sa.Column("token", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["unit_id"], ["units.id"], name="fk_key_locks_unit_id_units", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("project", "stage", "key", name="pk_key_locks"),
    )
    op.create_index("ix_key_locks_unit", "key_locks", ["unit_id"])
