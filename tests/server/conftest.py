"""What the tests of the REST API share: servers in processes of their own, and databases for them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("sqlalchemy")

from tests.server.asking import ADMIN
from tests.stores.conftest import database_url, postgres, prepared, pytest_collection_modifyitems

from agentfleet.testing.postgres import Postgres

__all__ = ["database_url", "postgres", "prepared", "pytest_collection_modifyitems"]

_ROOT = Path(__file__).parent.parent.parent
_PATIENCE = 60.0


@pytest.fixture
def anyio_backend() -> str:
    """The server runs on asyncio."""
    return "asyncio"


@dataclass
class Served:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    address: str

    def end(self, by: signal.Signals = signal.SIGTERM) -> int:
        """End it, and return how it ended."""
        if self.process.poll() is None:
            self.process.send_signal(by)
        return self.ended()

    def ended(self) -> int:
        """Wait until it has ended by itself, and return how. A second signal could meet it when it heeds none more."""
        try:
            return self.process.wait(_PATIENCE)
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()


Serve = Callable[..., Served]


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """A token for everything."""
    path = tmp_path / "tokens"
    path.write_text(f"admin admin * {ADMIN}\n")
    return path


@pytest.fixture
def serve(token_file: Path, tmp_path: Path) -> Iterator[Serve]:
    """Starts servers, and ends those that are left."""
    running: list[Served] = []

    def start(database: str | None = None, **options: Any) -> Served:
        where = f"sqlite:///{tmp_path / 'served.db'}" if database is None else database
        command = [sys.executable, "-m", "tests.server.served", where, str(token_file), json.dumps(options)]
        # what it writes goes where pytest catches it
        process = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        served = Served(process, process.stdout.readline().strip())
        running.append(served)
        assert served.address, f"the server did not start: {process.wait(_PATIENCE)}"
        return served

    yield start
    for each in running:
        each.end()


@pytest.fixture
def shared_database(request: pytest.FixtureRequest) -> str:
    """A fresh database in PostgreSQL."""
    server: Postgres = request.getfixturevalue("postgres")
    return server.database(like=request.getfixturevalue("prepared"))
