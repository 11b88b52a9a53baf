"""Configuration, journal and leases."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One step forward."""
    op.create_table(
        "config_heads",
        sa.Column("key", sa.String(253), primary_key=True),
        sa.Column("newest", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "config_revisions",
        sa.Column("key", sa.String(253), primary_key=True),
        sa.Column("revision", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("author", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("restores", sa.BigInteger),
        sa.Column("origin", sa.Text, nullable=False, server_default=sa.text("''")),
        sa.Column("previous", sa.String(64), nullable=False, server_default=sa.text("''")),
    )
    head = op.create_table(
        "journal_head",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("last", sa.BigInteger, nullable=False),
        sa.Column("trimmed", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(head, [{"id": 1, "last": 0, "trimmed": 0}])
    op.create_table(
        "journal",
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("fleet", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("line", sa.Text, nullable=False),
    )
    op.create_index("journal_by_fleet", "journal", ["fleet", "seq"])
    op.create_table(
        "journal_states",
        sa.Column("fleet", sa.Text, primary_key=True),
        sa.Column("kind", sa.Text, primary_key=True),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("line", sa.Text, nullable=False),
    )
    op.create_table(
        "leases",
        sa.Column("name", sa.String(253), primary_key=True),
        sa.Column("uid", sa.String(36), nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("holder", sa.Text),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("duration", sa.Double, nullable=False),
    )


def downgrade() -> None:
    """One step back."""
    op.drop_table("leases")
    op.drop_table("journal_states")
    op.drop_index("journal_by_fleet", "journal")
    op.drop_table("journal")
    op.drop_table("journal_head")
    op.drop_table("config_revisions")
    op.drop_table("config_heads")
