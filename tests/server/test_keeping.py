"""How much a served store keeps: old events go, and what the next manager must know stays."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from tests.server.asking import ADMIN
from tests.server.conftest import Serve

from agentfleet.cli import main
from agentfleet.client import ClusterConfig, FleetClient
from agentfleet.server.serving import KEEP_EVENTS, Options, events_url
from agentfleet.specs import AgentTemplate
from agentfleet.stores.sql import SqlJournal

pytestmark = [pytest.mark.anyio, pytest.mark.integration]
BOTH = pytest.mark.parametrize("database_url", ["sqlite", "postgres"], indirect=True)


@BOTH
async def test_old_events_go_and_the_next_manager_knows_all_that_it_must(serve: Serve, database_url: str) -> None:
    served = serve(database_url, keep_events=16)
    async with FleetClient(served.address, token=ADMIN) as client:
        template = AgentTemplate(command=["agent"], cpu="250m", memory="512Mi")
        made = await client.create(ClusterConfig(cluster_name="a", template=template, min_replicas=3, max_replicas=9))
        await client.finished(made.operation_id, timeout=60)
        for replicas in (9, 3, 9, 3):
            changed = await client.scale("a", replicas)
            assert (await client.finished(changed.operation_id, timeout=60)).status == "succeeded"
        upgraded = await client.deploy("a", "2")
        assert (await client.finished(upgraded.operation_id, timeout=60)).status == "succeeded"
    assert served.end() == 0
    with SqlJournal(events_url(database_url)) as journal:
        states = journal.last_state("a", "state.fleet")
        assert states is not None
        kept = [each for each in journal.read() if each.seq > journal.trimmed]
        assert journal.trimmed == journal.newest - len(kept) > 0
        assert len(kept) <= 16 + 2
    served = serve(database_url, keep_events=16)
    async with FleetClient(served.address, token=ADMIN) as client:
        assert [each.version for each in await client.revisions("a")] == ["1", "2"]
        assert (await client.cluster("a")).replicas == 3
    assert served.end() == 0


def test_the_command_keeps_as_many_as_the_library_says(tmp_path: Path) -> None:
    options = {each.name: each for each in main.commands["serve"].params if isinstance(each, click.Option)}
    assert options["keep_events"].default == KEEP_EVENTS
    assert Options(database=f"sqlite:///{tmp_path / 'f.db'}", backend="memory").keep_events == KEEP_EVENTS
