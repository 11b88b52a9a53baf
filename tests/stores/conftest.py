"""Databases for the tests of this directory: SQLite files, and one real PostgreSQL for all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentfleet.testing.postgres import Postgres, PostgresMissing


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One server for the session. Without its programs tests skip here, and fail where CI=true."""
    try:
        made = Postgres()
    except PostgresMissing as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must provide PostgreSQL: {error}")
        pytest.skip(str(error))
    with made:
        yield made


@pytest.fixture(scope="session")
def prepared(postgres: Postgres) -> str:
    """A database whose tables are made, to be copied."""
    from agentfleet.stores.sql import migrate  # noqa: PLC0415 - where the extra is installed

    url = postgres.database()
    migrate(url)
    return url


@pytest.fixture
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Address of a fresh database of the kind that the test is run for."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'fleet.db'}"
    prepared: str = request.getfixturevalue("prepared")
    server: Postgres = request.getfixturevalue("postgres")
    return server.database(like=prepared)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep all that share the server in one process when pytest runs in several."""
    for item in items:
        if "postgres" in item.nodeid or "postgres" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("postgres"))
