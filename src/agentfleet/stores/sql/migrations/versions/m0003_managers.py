"""Fleets that managers share, operations, fences; more about instances."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_OF_INSTANCES = (
    lambda: sa.Column("version", sa.Text),
    lambda: sa.Column("revision", sa.BigInteger),
    lambda: sa.Column("health", sa.String(50)),
    lambda: sa.Column("restarts", sa.Integer, nullable=False, server_default="0"),
    lambda: sa.Column("config_revision", sa.BigInteger),
    lambda: sa.Column("detail", sa.Text),
)


def upgrade() -> None:
    """One step forward."""
    for column in _OF_INSTANCES:
        op.add_column("agent_instances", column())
    head = op.create_table(
        "fleets_head",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("last", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(head, [{"id": 1, "last": 0}])
    op.create_table(
        "fleets",
        sa.Column("id", sa.Uuid, sa.ForeignKey("cluster_config.id"), primary_key=True),
        sa.Column("name", sa.String(253), nullable=False, unique=True),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("created_by", sa.Text, nullable=False),
        sa.Column("deleting", sa.Boolean, nullable=False),
        sa.Column("status", sa.Text),
        sa.Column("status_at", sa.Double),
        sa.Column("change", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_fleets_change", "fleets", ["change"])
    op.create_table(
        "operations",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("seq", sa.BigInteger, nullable=False, unique=True),
        sa.Column("fleet", sa.Uuid, nullable=False),
        sa.Column("name", sa.String(253), nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("arguments", sa.Text, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("origin", sa.Text, nullable=False),
        sa.Column("key", sa.Text),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("status", sa.String(20), nullable=False),
        sa.Column("started_at", sa.Double),
        sa.Column("finished_at", sa.Double),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("change", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_operations_change", "operations", ["change"])
    op.create_index("operations_by_fleet", "operations", ["fleet", "seq"])
    op.create_index("operations_by_key", "operations", ["actor", "key"], unique=True)
    op.create_table(
        "changes",
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("number", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_changes_number", "changes", ["number"])
    op.create_table(
        "managers",
        sa.Column("identity", sa.String(253), primary_key=True),
        sa.Column("beats", sa.BigInteger, nullable=False),
        sa.Column("about", sa.Text, nullable=False),
    )
    op.create_table(
        "fences",
        sa.Column("fleet", sa.Text, primary_key=True),
        sa.Column("epoch", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    """One step back."""
    op.drop_table("fences")
    op.drop_table("managers")
    op.drop_index("ix_changes_number", "changes")
    op.drop_table("changes")
    for index in ("operations_by_key", "operations_by_fleet", "ix_operations_change"):
        op.drop_index(index, "operations")
    op.drop_table("operations")
    op.drop_index("ix_fleets_change", "fleets")
    op.drop_table("fleets")
    op.drop_table("fleets_head")
    for column in reversed(_OF_INSTANCES):
        op.drop_column("agent_instances", column().name)
