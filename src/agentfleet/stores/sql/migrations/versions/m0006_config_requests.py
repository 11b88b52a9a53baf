"""Which request has published a revision, so that one that is sent twice is done once."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One step forward."""
    op.add_column("config_revisions", sa.Column("request", sa.String(64), nullable=False, server_default=sa.text("''")))
    op.create_index("config_revisions_by_request", "config_revisions", ["key", "request"])


def downgrade() -> None:
    """One step back."""
    op.drop_index("config_revisions_by_request", "config_revisions")
    op.drop_column("config_revisions", "request")
