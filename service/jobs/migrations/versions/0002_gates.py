"""Gates: verdicts that were asked for, and who is told of them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Add both tables."""
    _gates()
    _gate_deliveries()


def downgrade() -> None:
    """Drop both tables. The verdicts that jobs show stay in their rows."""
    op.drop_table("gate_deliveries")
    op.drop_table("gates")


def _gates() -> None:
    op.create_table(
        "gates",
        sa.Column("id", sa.String(length=26), nullable=False),
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("job_id", sa.String(length=26), nullable=False),
        sa.Column("state", sa.String(length=12), nullable=False),
        sa.Column("policy", JSON, nullable=False),
        sa.Column("policy_name", sa.String(length=64), nullable=False),
        sa.Column("policy_digest", sa.String(length=64), nullable=False),
        sa.Column("baseline", sa.String(length=300), nullable=True),
        sa.Column("baseline_job_id", sa.String(length=26), nullable=True),
        sa.Column("verdict", sa.String(length=12), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("error", JSON, nullable=True),
        sa.Column("decision", sa.Text(), nullable=True),
        sa.Column("idempotency_key", sa.String(length=200), nullable=True),
        sa.Column("body_digest", sa.String(length=64), nullable=False),
        sa.Column("submitted_by", sa.String(length=26), nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.Column("decided", TIME, nullable=True),
        sa.Column("due", TIME, nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["project"], ["projects.name"], name="fk_gates_project_projects"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_gates_job_id_jobs", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["baseline_job_id"], ["jobs.id"], name="fk_gates_baseline_job_id_jobs", ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id", name="pk_gates"),
        sa.UniqueConstraint("project", "idempotency_key", name="uq_gates_project_idempotency_key"),
    )
    op.create_index("ix_gates_job", "gates", ["job_id", "created", "id"])
    op.create_index("ix_gates_project_created", "gates", ["project", "created", "id"])
    op.create_index("ix_gates_project_state", "gates", ["project", "state", "created", "id"])
    op.create_index("ix_gates_state_due", "gates", ["state", "due"])


def _gate_deliveries() -> None:
    op.create_table(
        "gate_deliveries",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("gate_id", sa.String(length=26), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("target", JSON, nullable=False),
        sa.Column("state", sa.String(length=12), nullable=False),
        sa.Column("due", TIME, nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["gate_id"], ["gates.id"], name="fk_gate_deliveries_gate_id_gates", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_gate_deliveries"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_gate_deliveries_due", "gate_deliveries", ["kind", "state", "due"])
    op.create_index("ix_gate_deliveries_gate", "gate_deliveries", ["gate_id"])
