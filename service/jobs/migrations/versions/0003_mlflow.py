"""MLflow's model registry: deliveries of its webhooks, and the model versions they asked to be audited."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Add both tables."""
    op.create_table(
        "mlflow_deliveries",
        sa.Column("id", sa.String(100), nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_mlflow_deliveries"),
    )
    op.create_index("ix_mlflow_deliveries_at", "mlflow_deliveries", ["at"])
    _versions()


def downgrade() -> None:
    """Drop both tables. Audits and gates stay; tags that were not written yet never will be."""
    op.drop_table("mlflow_versions")
    op.drop_table("mlflow_deliveries")


def _versions() -> None:
    op.create_table(
        "mlflow_versions",
        sa.Column("id", ID, nullable=False, autoincrement=True),
        sa.Column("model", sa.String(256), nullable=False),
        sa.Column("version", sa.String(20), nullable=False),
        sa.Column("state", sa.String(12), nullable=False),
        sa.Column("alias", sa.String(256)),
        sa.Column("made", sa.BigInteger()),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("request", JSON),
        sa.Column("project", sa.String(63)),
        sa.Column("job_id", sa.String(26)),
        sa.Column("gate_id", sa.String(26)),
        sa.Column("due", TIME),
        sa.Column("token", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("tags", JSON, nullable=False),
        sa.Column("tags_number", sa.Integer(), nullable=False),
        sa.Column("tags_due", TIME),
        sa.Column("tags_attempts", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_mlflow_versions"),
        sa.UniqueConstraint("model", "version", name="uq_mlflow_versions_model_version"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_mlflow_versions_due", "mlflow_versions", ["state", "due"])
    op.create_index("ix_mlflow_versions_job", "mlflow_versions", ["job_id"])
    op.create_index("ix_mlflow_versions_tags_due", "mlflow_versions", ["tags_due"])
