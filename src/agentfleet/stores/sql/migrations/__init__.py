"""Alembic's scripts: each brings the tables one step forward, or back."""
