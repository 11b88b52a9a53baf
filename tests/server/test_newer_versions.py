"""The REST API of a manager beside a newer one, as in a rolling upgrade."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from tests.server.world import world

pytestmark = pytest.mark.anyio


async def test_a_cluster_of_a_newer_version_is_listed_and_the_others_are_as_before(tmp_path: Path) -> None:
    file = tmp_path / "fleets.db"
    async with world(tmp_path, database=f"sqlite:///{file}") as here:
        await here.cluster("a")
        await here.cluster("b")
        with closing(sqlite3.connect(file, timeout=30)) as other, other:
            (kept,) = other.execute("SELECT spec FROM fleets WHERE name = 'a'").fetchone()
            newer = json.dumps({**json.loads(kept), "moods": ["calm"]})
            other.execute("UPDATE fleets SET spec = ?, generation = 2 WHERE name = 'a'", (newer,))
        listed = (await here.ask("GET", "/api/v1/clusters")).json["items"]
        assert [(each["cluster_name"], each["status"], each["ready"]) for each in listed] == [
            ("a", "running", 2),
            ("b", "running", 2),
        ]
        for method, path in (("GET", ""), ("GET", "/operations"), ("POST", "/pause"), ("DELETE", "")):
            refused = await here.ask(method, f"/api/v1/clusters/a{path}")
            assert (refused.status, refused.kind) == (503, "unavailable"), "another manager can"
        assert (await here.ask("GET", "/api/v1/clusters/b")).status == 200
        scaled = await here.ask("PUT", "/api/v1/clusters/b/scale", {"replicas": 3})
        assert (await here.finished(scaled)).status == "succeeded"
