"""Fleets and their instances (F18)."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One step forward."""
    op.create_table(
        "cluster_config",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("cluster_name", sa.String(255), nullable=False),
        sa.Column("namespace", sa.String(255), nullable=False),
        sa.Column("min_replicas", sa.Integer, server_default="1"),
        sa.Column("max_replicas", sa.Integer, server_default="10"),
        sa.Column("target_cpu_percent", sa.Integer, server_default="70"),
        sa.Column("target_memory_percent", sa.Integer, server_default="80"),
        sa.Column("health_check_config", sa.JSON().with_variant(JSONB, "postgresql")),
        sa.Column("created_at", sa.DateTime(timezone=True)),
    )
    op.create_table(
        "agent_instances",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("cluster_id", sa.Uuid, sa.ForeignKey("cluster_config.id")),
        sa.Column("instance_id", sa.String(255), nullable=False),
        sa.Column("status", sa.String(50), nullable=False),
        sa.Column("node_name", sa.String(255)),
        sa.Column("cpu_usage", sa.Float),
        sa.Column("memory_usage", sa.Float),
        sa.Column("last_heartbeat", sa.DateTime(timezone=True)),
        sa.Column("created_at", sa.DateTime(timezone=True)),
    )
    op.create_index("agent_instances_by_cluster", "agent_instances", ["cluster_id", "instance_id"])


def downgrade() -> None:
    """One step back."""
    op.drop_index("agent_instances_by_cluster", "agent_instances")
    op.drop_table("agent_instances")
    op.drop_table("cluster_config")
