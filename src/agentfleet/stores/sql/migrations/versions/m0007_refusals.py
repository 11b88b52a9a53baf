"""What was refused is a chain of the audit of its own, so that it does not push out what was done."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One step forward: what there is stays one chain, which goes on with what is done."""
    op.add_column("api_audit_head", sa.Column("refused", sa.String(64), nullable=False, server_default=sa.text("''")))
    op.add_column("api_audit", sa.Column("refused", sa.Boolean, nullable=False, server_default=sa.false()))
    op.create_index("api_audit_by_chain", "api_audit", ["refused", "seq"])


def downgrade() -> None:
    """One step back: all entries stay, but earlier versions find that two chains do not fit as one."""
    op.drop_index("api_audit_by_chain", "api_audit")
    op.drop_column("api_audit", "refused")
    op.drop_column("api_audit_head", "refused")
