"""Configuration in steps, and who runs which revision."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One step forward."""
    op.add_column("config_revisions", sa.Column("rollout", sa.Text, nullable=False, server_default=sa.text("''")))
    op.add_column("config_revisions", sa.Column("base", sa.BigInteger, nullable=False, server_default=sa.text("0")))
    op.create_table(
        "config_rollouts",
        sa.Column("key", sa.String(253), primary_key=True),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("base", sa.BigInteger, nullable=False),
        sa.Column("phase", sa.String(20), nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
    )
    op.create_table(
        "config_ack_heads",
        sa.Column("key", sa.String(253), primary_key=True),
        sa.Column("newest", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "config_acks",
        sa.Column("key", sa.String(253), primary_key=True),
        sa.Column("instance", sa.String(253), primary_key=True),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("refused", sa.BigInteger, nullable=False),
        sa.Column("why", sa.Text, nullable=False),
        sa.Column("via", sa.String(20), nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("batch", sa.BigInteger, nullable=False),
    )
    op.create_index("config_acks_by_batch", "config_acks", ["key", "batch"])


def downgrade() -> None:
    """One step back."""
    op.drop_index("config_acks_by_batch", "config_acks")
    op.drop_table("config_acks")
    op.drop_table("config_ack_heads")
    op.drop_table("config_rollouts")
    op.drop_column("config_revisions", "base")
    op.drop_column("config_revisions", "rollout")
