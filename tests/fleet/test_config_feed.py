"""Configuration reaches every instance, exactly as published, whatever happens to instances and managers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import anyio
import pytest
from pydantic import BaseModel
from tests.fleet.world import World, spec

from agentfleet import BackendUnavailable, ConfigError, ConfigInvalid, ConfigStore, DeadlineExceeded, Fleet
from agentfleet.configrings import ConfigRings
from agentfleet.instances import Instance
from agentfleet.signals.http import HttpError, Response
from agentfleet.stores.acks import ConfigAck
from agentfleet.stores.config import ConfigRevision
from agentfleet.stores.config_memory import MemoryConfig
from agentfleet.testing import virtual


class Agents:
    """The simulated agents' side of PUT /config: each process starts with nothing and keeps what it was given."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.running: dict[str, tuple[int, Any]] = {}
        """What each process has, by address: a restarted one has a new address and nothing."""
        self.refuse: set[str] = set()
        self.deaf: set[str] = set()
        self.pushes: dict[str, int] = defaultdict(int)

    async def request(
        self,
        method: str,
        address: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float,
    ) -> Response:
        assert (method, path) == ("PUT", "/config")
        assert body is not None
        await anyio.sleep(0.05)
        self.pushes[address] += 1
        owner = next((each.id for each in self.world.instances if each.address == address), None)
        if owner is None or owner in self.deaf:
            raise HttpError("connection refused")
        message = json.loads(body)
        if owner in self.refuse:
            return Response(422, {}, b"model: unknown")
        had = self.running.get(address, (0, None))[0]
        if had >= message["revision"]:
            return Response(409, {}, json.dumps({"revision": had}).encode())
        self.running[address] = (message["revision"], message["document"])
        return Response(200, {}, b"{}")

    async def aclose(self) -> None:
        """Nothing to close."""

    def now(self) -> dict[str, Any]:
        """What each instance that exists has."""
        return {each.id: self.running.get(str(each.address), (0, None))[1] for each in self.world.instances}


def attach(fleet: Fleet, agents: Agents) -> Fleet:
    """Let the fleet's pushes go to the simulated agents."""
    fleet._runtime.feed._http = agents
    return fleet


@virtual
async def test_what_is_published_reaches_every_instance() -> None:
    """`configure` returns when all have it; the delivery is an event with its latencies."""
    world = World()
    agents = Agents(world)
    async with attach(world.fleet(), agents) as fleet:
        await fleet.deploy()
        assert await fleet.configure({"model": "small"}) == 1
        assert set(map(str, agents.now().values())) == {"{'model': 'small'}"}
        (delivered,) = world.events("config.delivered")
        assert delivered.data["instances"] == 10
        assert 0 < delivered.data["p50_s"] <= delivered.data["p99_s"] < 1
        assert await fleet.configure({"model": "large"}) == 2
        assert all(each == {"model": "large"} for each in agents.now().values())


@virtual
async def test_new_and_restarted_instances_get_it_too() -> None:
    """Whoever begins to serve later is given the newest revision."""
    world = World(spec(4))
    agents = Agents(world)
    async with attach(world.fleet(), agents) as fleet:
        await fleet.deploy()
        await fleet.configure({"n": 1})
        await fleet.scale(8)
        await world.settled(fleet)
        world.faults.crash(world.ids()[0])
        await world.settled(fleet)
        await fleet.restart(world.ids()[1])
        await world.settled(fleet)
        await fleet.upgrade("2")
        await world.settled(fleet)
        assert list(agents.now().values()) == [{"n": 1}] * 8


@virtual
async def test_an_invalid_document_changes_nothing() -> None:
    """What fails its validation is refused with the field's name and pushed to nobody."""

    class Model(BaseModel):
        temperature: float

    world = World(spec(2))
    agents = Agents(world)
    async with attach(world.fleet(), agents) as fleet:
        fleet.config.register(fleet.name, schema=Model)
        await fleet.deploy()
        with pytest.raises(ConfigInvalid, match="temperature"):
            await fleet.configure({"temperature": "hot"})
        assert not agents.pushes
        await fleet.configure({"temperature": 0.5})
        assert list(agents.now().values()) == [{"temperature": 0.5}] * 2


@virtual
async def test_an_agent_that_refuses_keeps_its_last_and_is_named() -> None:
    """One refusal is an event with the agent's reason; the others go on, and the next revision is offered to all."""
    world = World(spec(3))
    agents = Agents(world)
    async with attach(world.fleet(), agents) as fleet:
        await fleet.deploy()
        await fleet.configure({"n": 1})
        picky = world.ids()[1]
        agents.refuse.add(picky)
        await fleet.configure({"n": 2})
        (refused,) = world.events("config.refused")
        assert (refused.instance, refused.data["why"]) == (picky, "model: unknown")
        assert agents.now() == {id: {"n": 1 if id == picky else 2} for id in world.ids()}
        agents.refuse.clear()
        await fleet.configure({"n": 3})
        assert list(agents.now().values()) == [{"n": 3}] * 3


@virtual
async def test_one_that_cannot_be_reached_is_tried_again() -> None:
    """Waiting for it has a deadline; it gets the revision when it can be reached, after not too many attempts."""
    world = World(spec(3))
    agents = Agents(world)
    async with attach(world.fleet(), agents) as fleet:
        await fleet.deploy()
        deaf = world.instances[0]
        agents.deaf.add(deaf.id)
        with pytest.raises(DeadlineExceeded, match="answered"):
            await fleet.configure({"n": 1}, timeout=30)
        await anyio.sleep(600)
        assert agents.pushes[str(deaf.address)] < 200
        agents.deaf.clear()
        await anyio.sleep(10)
        assert list(agents.now().values()) == [{"n": 1}] * 3


@virtual
async def test_who_has_a_stream_is_pushed_only_what_that_does_not_bring() -> None:
    """A stream has three seconds for each revision, from the newest one on; whoever it fails is pushed then."""
    world = World(spec(4))
    agents = Agents(world)
    async with attach(world.fleet(), agents) as fleet, anyio.create_task_group() as tasks:
        await fleet.deploy()
        await fleet.configure({"n": 1})
        first, *others = world.instances

        def streamed(revision: int, *instances: Instance) -> None:
            for each in instances:
                fleet._runtime.feed._acks.hear(ConfigAck(each.id, revision, via="stream"))

        streamed(1, first, *others)
        agents.pushes.clear()
        tasks.start_soon(fleet.configure, {"n": 2})
        await anyio.sleep(1)
        streamed(2, *others)
        await anyio.sleep(1)
        tasks.start_soon(fleet.configure, {"n": 3})
        await anyio.sleep(1)
        streamed(3, *others)
        await anyio.sleep(1.8)
        assert not agents.pushes  # the first one's stream has had 2.8 s for the third revision
        await anyio.sleep(1)
        assert agents.pushes == {first.address: 1}
        assert agents.now()[first.id] == {"n": 3}
        assert fleet._runtime.feed.running == {each.id: 3 for each in world.instances}


@virtual
async def test_a_new_manager_feeds_what_the_last_one_published() -> None:
    """Although its store is empty a new manager gives new instances the newest revision, and numbers go on."""
    world = World(spec(3))
    agents = Agents(world)
    async with attach(world.fleet(), agents) as fleet:
        await fleet.deploy()
        await fleet.configure({"n": 1})
        await fleet.configure({"n": 2})
    async with attach(world.fleet(), agents) as fleet:
        await fleet.scale(5)
        await world.settled(fleet)
        assert list(agents.now().values()) == [{"n": 2}] * 5
        assert await fleet.configure({"n": 3}) == 3
        assert list(agents.now().values()) == [{"n": 3}] * 5


@virtual
async def test_of_many_publications_all_end_at_the_last() -> None:
    """Published faster than it can be delivered, every instance ends at the newest revision."""
    world = World(spec(6))
    agents = Agents(world)
    async with attach(world.fleet(), agents) as fleet:
        await fleet.deploy()
        for number in range(30):
            await fleet.configure({"n": number}, wait=False)
            await anyio.sleep(0.02)
        await anyio.sleep(10)
        assert list(agents.now().values()) == [{"n": 29}] * 6


class Down(MemoryConfig):
    """Records whose database is gone; its driver says where it was, and who asked."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    async def newest(self, key: str) -> ConfigRevision | None:
        if isinstance(self.error, ConfigError):
            raise self.error from BackendUnavailable(str(self.error))
        raise self.error


@virtual
@pytest.mark.parametrize("kind", [ConfigError, DeadlineExceeded])
async def test_what_a_database_says_is_logged_and_told_to_nobody(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Events are read by whoever may read; hosts and users of the store are the operator's."""
    store = ConfigStore(Down(kind('connection to server at "10.1.2.3" failed for user "fleet"')))
    world = World()
    fleet = world.fleet()
    monkeypatch.setattr(fleet._runtime.feed, "_store", store)
    rings: ConfigRings = fleet._runtime.configuring.rings
    monkeypatch.setattr(rings, "_store", store)
    async with fleet:
        await fleet.deploy()
        await anyio.sleep(10)
        told = world.events("config.unavailable")
        (held,) = world.events("config.held")
    assert told[0].data["error"] == kind.__name__
    assert "manager's log" in told[0].data["message"]
    assert held.reasons[0]["code"] == "config.unavailable"
    for word in ("10.1.2.3", "user"):
        assert not [event.kind for event in world.events() if word in event.to_json()]
        assert kind is not ConfigError or word in caplog.text


@virtual
async def test_what_the_store_itself_says_is_told() -> None:
    """That its records went back is no driver's word."""
    world = World()
    async with world.fleet() as fleet:
        await fleet.deploy()
        await fleet.configure({"n": 1})
        await fleet.configure({"n": 2})
        records: Any = fleet._runtime.feed._store._records
        records._kept[world.name] = records._kept[world.name][:1]
        records._ring(world.name)
        await anyio.sleep(20)
        assert "went back from revision 2 to 1" in world.events("config.unavailable")[0].data["message"]
