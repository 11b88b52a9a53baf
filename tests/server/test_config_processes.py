"""Configuration among real processes: managers that are killed amid a rollout, agents that start without a manager."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("sqlalchemy")

from anyio import to_thread
from tests.agent.helpers import AgentProcess

from agentfleet import AgentTemplate, ConfigRollout, FleetSpec, HealthPolicy, HttpCheck, RecoveryPolicy
from agentfleet.client import FleetClient
from agentfleet.errors import BackendUnavailable, DeadlineExceeded
from agentfleet.rest.settings import ConfigurationStatus
from agentfleet.testing.serving import ServedManager

pytestmark = [pytest.mark.anyio, pytest.mark.integration, pytest.mark.slow]

AGENT = Path(__file__).with_name("configured_agent.py")
SIZE = 4
RINGS = ConfigRollout(rings=(1, "50%", "100%"), bake="1500ms", confirm="1s")


@dataclass
class Site:
    """A manager of one fleet whose agents subscribe to it, and what they have written down."""

    manager: ServedManager
    client: FleetClient
    folder: Path

    @property
    def url(self) -> str:
        return f"{self.manager.url}/api/v1/clusters/a"

    def environment(self) -> dict[str, str]:
        """What the agents are told."""
        kept = str(self.folder / "kept" / "{instance}.json")
        return {"AGENTFLEET_CONFIG_URL": self.url, "AGENTFLEET_CONFIG_FILE": kept, "DIARIES": str(self.folder)}

    async def deploy(self) -> None:
        spec = FleetSpec(
            name="a",
            template=AgentTemplate(command=["python", str(AGENT)], env=self.environment(), drain="1s"),
            replicas=SIZE,
            health=HealthPolicy(checks=[HttpCheck(period="500ms", timeout="2s", failures=2)], startup="5s"),
            recovery=RecoveryPolicy(max_disrupted="50%"),
        )
        made = await self.client.create(spec)
        assert (await self.client.finished(made.operation_id, timeout=60)).status == "succeeded"

    async def publish(self, n: int, *, rollout: ConfigRollout | None = None, **more: Any) -> int:
        told = await self.client.configuration.publish("a", {"n": n, **more}, reason=f"n is {n}", rollout=rollout)
        return told.revision

    async def status(self, holds: Callable[[ConfigurationStatus], bool]) -> ConfigurationStatus:
        """Wait until it is known of the agents, and of the rollout, that something holds."""
        with anyio.fail_after(60):
            while True:
                try:
                    found = await self.client.configuration.status("a")
                except (BackendUnavailable, DeadlineExceeded):
                    pass
                else:
                    if holds(found):
                        return found
                await anyio.sleep(0.05)

    def diaries(self) -> dict[str, list[tuple[int, int]]]:
        """What each agent was told, in order: its process id, and n."""
        files = [each for each in self.folder.iterdir() if each.name.startswith("a-")]
        return {each.name: [tuple(json.loads(line)) for line in each.read_text().splitlines()] for each in files}

    def told(self, n: int) -> set[str]:
        """Which agents have ever been told this."""
        return {name for name, lines in self.diaries().items() if any(line[1] == n for line in lines)}

    async def until(self, holds: Callable[[], bool]) -> None:
        with anyio.fail_after(60):
            while not holds():  # noqa: ASYNC110 - other processes tell nobody
                await anyio.sleep(0.01)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    """A manager on SQLite; at the end its agents are gone."""
    database, diaries = f"sqlite:///{tmp_path / 'fleet.db'}", tmp_path / "diaries"
    diaries.mkdir()
    manager = ServedManager(database=database, backend="process", folder=tmp_path)
    async with manager, FleetClient(manager.url, timeout=20) as client:
        yield Site(manager, client, diaries)
        if manager.pid is None:
            await manager.start()
        gone = await client.delete("a")
        await client.finished(gone.operation_id, timeout=60)


async def killed(site: Site) -> None:
    """The manager is gone at once."""
    site.manager.kill()
    await site.manager.ended()


async def test_a_rollout_goes_on_when_its_manager_was_killed(site: Site) -> None:
    """A good one reaches everybody and each process once; a bad one stays with the one that had it, and goes back."""
    await site.deploy()
    await site.publish(1)
    await site.status(lambda now: now.counts == {"1": SIZE})
    assert await site.publish(2, rollout=RINGS) == 2
    await site.until(lambda: bool(site.told(2)))
    await killed(site)
    assert len(site.told(2)) < SIZE
    before = site.diaries()
    await site.manager.start()
    done = await site.status(lambda now: now.revision == 2)
    assert (done.trial, done.counts) == (0, {"2": SIZE})
    assert all(lines[: len(before[name])] == before[name] for name, lines in site.diaries().items())
    assert all([n for _, n in lines] == [1, 2] for lines in site.diaries().values()), "each once, and none back"

    assert await site.publish(3, rollout=RINGS, poison=0.5) == 3
    await site.until(lambda: bool(site.told(3)))
    await killed(site)
    await site.manager.start()
    back = await site.status(lambda now: now.counts == {"4": SIZE})
    assert len(site.told(3)) == 1, "nobody else was given it"
    assert back.rollout is not None
    assert (back.rollout.revision, back.rollout.phase, back.rollout.failed) == (3, "rolled_back", 1)
    newest = await site.client.configuration.get("a")
    assert (newest.author, newest.restores, newest.document) == ("agentfleet", 2, {"n": 2})


async def test_agents_go_on_and_start_without_a_manager(site: Site) -> None:
    """While it is dead they run what they have; one that starts takes what it accepted last; then all catch up."""
    await site.deploy()
    await site.publish(1)
    await site.status(lambda now: now.counts == {"1": SIZE})
    outside = {"AGENTFLEET_INSTANCE": "a-outside"} | site.environment()
    agent = await to_thread.run_sync(lambda: AgentProcess(AGENT, **outside))
    try:
        await site.until(lambda: agent.status()["config_revision"] == 1)
        await killed(site)
        agent.process.kill()
        agent.close()
        agent = await to_thread.run_sync(lambda: AgentProcess(AGENT, **outside))
        await site.until(lambda: agent.status()["config_revision"] == 1)
        assert [n for _, n in site.diaries()["a-outside"]] == [1, 1], "both processes were told by its own disk, or it"
        await site.manager.start()
        assert await site.publish(2) == 2
        await site.until(lambda: site.told(2) == {*site.diaries()} and agent.status()["config_revision"] == 2)
        known = await site.status(lambda now: now.counts.get("2", 0) >= SIZE)
        assert known.revision == 2
    finally:
        agent.close()
    assert all([n for _, n in lines][-1] == 2 for lines in site.diaries().values())
