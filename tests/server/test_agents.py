"""Agents fetch their configuration from a server: who may, what comes, what is known of it, whoever leads the fleet."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from tests.server.asking import ADMIN
from tests.server.conftest import Serve
from tests.server.world import A_OPERATOR, A_READER, B_ADMIN, World, world

from agentfleet import deliveries
from agentfleet.agent.subscribe import Subscription
from agentfleet.client import ClusterConfig, FleetClient
from agentfleet.clock import SystemClock
from agentfleet.configspec import ConfigRollout
from agentfleet.configstore import ConfigStore
from agentfleet.deliveries import Deliveries
from agentfleet.delivery import ConfigDelivery
from agentfleet.errors import BackendUnavailable, OperationRefused
from agentfleet.rest.settings import ConfigurationStatus
from agentfleet.server import Limits, crowds
from agentfleet.server.crowds import pace_of, room_of
from agentfleet.specs import AgentTemplate
from agentfleet.stores.acks import MemoryAcks
from agentfleet.stores.fleets import FleetRecord
from agentfleet.stores.tokens import Scope, new_token

pytestmark = pytest.mark.anyio
STREAM, FETCH, ACKS = (
    f"/api/v1/clusters/{{}}/config{rest}" for rest in ("/stream?instance=i1", "?instance=i1", "/acks")
)


async def test_a_token_of_the_cluster_lets_its_agents_in_and_no_other(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        id = await here.cluster("a")
        await here.cluster("b")
        told, record = new_token("agents", scopes=["agent"], fleets=["a"], now=here.manager.clock.now())
        await here.tokens.add(record)
        assert record.scopes == (Scope.AGENT,)
        assert (await here.ask.by(told)("GET", FETCH.format("a"))).status == 404, "nothing is published yet"
        published = await here.ask("PUT", "/api/v1/clusters/a/configuration", {"document": {"n": 1}, "reason": "first"})
        assert published.status == 200
        for name in ("a", id):
            found = await here.ask.by(told)("GET", FETCH.format(name))
            assert (found.status, found.json, found.headers["etag"]) == (
                200,
                {"revision": 1, "document": {"n": 1}},
                '"1"',
            )
        again = await here.ask.by(told)("GET", FETCH.format("a"), headers={"If-None-Match": '"1"'})
        assert again.status == 304
        said = {"instance": "i1", "revision": 1}
        assert (await here.ask.by(told)("POST", ACKS.format("a"), said)).status == 204
        assert (await here.ask.by(A_READER)("GET", FETCH.format("a"))).status == 200, "who may read may read this"
        for token, status in ((None, 401), ("af_nobody", 401), (B_ADMIN, 404)):
            for method, path, body in (("GET", FETCH, None), ("GET", STREAM, None), ("POST", ACKS, said)):
                refused = await here.ask.by(token)(method, path.format("a"), body)
                assert refused.status == status, (token, path)
                assert refused.headers["content-type"] == "application/problem+json"
        for path in ("/api/v1/clusters", "/api/v1/clusters/a", "/api/v1/clusters/a/configuration", "/metrics"):
            assert (await here.ask.by(told)("GET", path)).status == 403, "an agent's token is for that alone"


async def test_who_only_looks_on_says_nothing_for_agents(tmp_path: Path) -> None:
    """A rollout is judged by what agents say, and a stream takes the place of the instance's own."""
    async with world(tmp_path, limits=Limits(rate=1e6, burst=10**6, stream=0.05)) as here:
        await here.cluster("a")
        await here.ask("PUT", "/api/v1/clusters/a/configuration", {"document": {"n": 1}, "reason": "first"})
        both, record = new_token("both", scopes=["agent", "read"], fleets=["a"], now=here.manager.clock.now())
        await here.tokens.add(record)
        agent, running = await token_of(here), FETCH.format("a") + "&running=0"
        said = {"instance": "i1", "revision": 0, "refused": 1}
        for asked in (("POST", ACKS.format("a"), said), ("GET", STREAM.format("a")), ("GET", running)):
            refused = await here.ask.by(A_READER)(*asked)
            assert (refused.status, refused.kind) == (403, "forbidden"), asked
            assert not (await here.manager.delivery("a")).book.known
        for asked, status in (
            (("POST", ACKS.format("a"), said), 204),
            (("GET", STREAM.format("a")), 200),
            (("GET", running), 200),
        ):
            for token in (agent, both, A_OPERATOR, ADMIN):
                assert (await here.ask.by(token)(*asked)).status == status, (asked, token)
        assert (await here.ask.by(A_READER)("GET", FETCH.format("a"))).status == 200


async def test_what_others_than_agents_say_for_them_is_audited(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster("a")
        await here.ask("PUT", "/api/v1/clusters/a/configuration", {"document": {"n": 1}, "reason": "first"})
        said = {"instance": "i1", "revision": 0, "refused": 1}
        for token in (await token_of(here), A_READER, A_OPERATOR):
            await here.ask.by(token)("POST", ACKS.format("a"), said)
        entries = [each for each in await here.audit.entries() if each.path.endswith("/config/acks")]
        told = {each.actor: (each.status, each.fleet, each.detail) for each in entries}
        assert told.pop("file/a-reader")[:2] == (403, "a")
        assert told == {"file/a-operator": (204, "a", "as i1: runs 0, has refused 1")}


class Agent:
    """An agent's side, with what it has accepted."""

    def __init__(self, url: str, instance: str, *, refuses: int = 0) -> None:
        self.name = instance
        self.revision = 0
        self.document: Mapping[str, Any] = {}
        self._refuses = refuses
        self._changed = asyncio.Event()
        self.subscription = Subscription(
            url, instance, offer=self._judge, running=lambda: self.revision, token=lambda: ADMIN
        )

    async def _judge(self, revision: int, document: Mapping[str, Any]) -> tuple[int, str]:
        if revision == self._refuses:
            return 422, "not with me"
        self.revision, self.document = revision, document
        self._changed.set()
        return 200, ""

    async def has(self, revision: int) -> None:
        with anyio.fail_after(30):
            while self.revision < revision:
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def subscribed(*agents: Agent) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(each.subscription.run()) for each in agents]
    try:
        yield
    finally:
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def known(client: FleetClient, revision: int, agents: Iterable[Agent], refusing: int = 0) -> ConfigurationStatus:
    """What is known of who runs what, once these have said that they run a revision, and so many refuse it."""
    with anyio.fail_after(30):
        while True:
            status = await client.configuration.status("a")
            if len(status.refused) == refusing and all(status.running.get(each.name) == revision for each in agents):
                return status
            await anyio.sleep(0.05)


@pytest.mark.integration
@pytest.mark.slow
async def test_agents_follow_across_a_restart_of_the_server_and_are_known(serve: Serve, tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path / 'followed.db'}"
    served = serve(database)
    port = int(served.address.rpartition(":")[2])
    url = f"{served.address}/api/v1/clusters/a"
    template = AgentTemplate(command=("agent",))
    agents = [Agent(url, f"i{number}") for number in range(20)]
    stubborn = Agent(url, "stubborn", refuses=2)
    async with FleetClient(served.address, token=ADMIN, timeout=20) as client:
        made = await client.create(ClusterConfig(cluster_name="a", replicas=1, template=template))
        await client.finished(made.operation_id, timeout=60)
        await client.configuration.publish("a", {"n": 1}, reason="first")
        async with subscribed(*agents, stubborn):
            for each in (*agents, stubborn):
                await each.has(1)
            await client.configuration.publish("a", {"n": 2}, reason="second", expect=1)
            for each in agents:
                await each.has(2)
            status = await known(client, 2, agents, refusing=1)
            assert (status.revision, status.running["stubborn"]) == (2, 1)
            assert status.refused == {"stubborn": "not with me"}
            assert served.end() == 0
            served = serve(database, port=port)
            await client.configuration.publish("a", {"n": 3}, reason="third")
            for each in (*agents, stubborn):
                await each.has(3)
                assert each.document == {"n": 3}
            assert (await known(client, 3, (*agents, stubborn))).refused == {}


async def test_a_rollout_in_rings_is_asked_for_over_rest(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster("a")
        path = "/api/v1/clusters/a/configuration"
        rings = ConfigRollout(rings=(1, "100%"), bake="1h").to_dict()
        early = await here.ask("PUT", path, {"document": {"n": 1}, "reason": "x", "rollout": rings})
        assert early.status == 409, "there is nothing yet that it could go back to"
        wrong = {"document": {"n": 1}, "reason": "x", "rollout": {"rings": [1, "50%"]}}
        refused = await here.ask("PUT", path, wrong)
        assert refused.status == 422
        assert "rings" in json.dumps(refused.json["errors"])
        assert (await here.ask("PUT", path, {"document": {"n": 1}, "reason": "x"})).status == 200
        begun = await here.ask("PUT", path, {"document": {"n": 2}, "reason": "x", "rollout": rings})
        assert begun.status == 200
        with anyio.fail_after(30):
            while not (status := (await here.ask("GET", f"{path}/status")).json)["trial"]:  # noqa: ASYNC110
                await anyio.sleep(0.02)  # the leader begins the first ring
        assert (status["revision"], status["trial"]) == (1, 2)
        assert (status["rollout"]["revision"], status["rollout"]["base"], status["rollout"]["rings"]) == (
            2,
            1,
            [1, "100%"],
        )


# ------------------------------------------------------------------------------------------------ bounds


async def token_of(here: World, name: str = "agents", *fleets: str) -> str:
    """A token for the agents of fleets."""
    told, record = new_token(name, scopes=["agent"], fleets=fleets or ("a",), now=here.manager.clock.now())
    await here.tokens.add(record)
    return told


async def test_agents_come_through_the_gate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "agentfleet.server.access")
    async with world(tmp_path) as here:
        await here.cluster("a")
        await here.ask("PUT", "/api/v1/clusters/a/configuration", {"document": {"n": 1}, "reason": "first"})
        agent = here.ask.by(await token_of(here))
        found = await agent("GET", FETCH.format("a"))
        assert found.headers["x-content-type-options"] == "nosniff"
        assert found.headers["x-request-id"]
        line = next(each for each in caplog.records if getattr(each, "route", "") == "/api/v1/clusters/{id}/config")
        assert (line.__dict__["status"], line.__dict__["actor"]) == (200, "token/agents")
        assert line.levelno == logging.DEBUG  # what a thousand agents say of each change is no news
        wrong = await agent("POST", ACKS.format("a"), {"instance": "i1", "revision": -1})
        assert (wrong.status, wrong.kind, wrong.fields()) == (422, "invalid", ["revision"])
        assert [each.levelno for each in caplog.records if getattr(each, "status", 0) == 422] == [logging.INFO]
        for path in (FETCH, STREAM):
            nobody = await here.ask.by("x" * 40)("GET", path.format("a"))
            assert (nobody.status, nobody.kind) == (401, "unauthenticated")
        missing = await agent("GET", FETCH.format("nobody"))
        assert (missing.status, missing.kind) == (404, "not-found")
        assert (await agent("PUT", FETCH.format("a"))).kind == "method-not-allowed"
        shown = (await here.ask("GET", "/metrics")).body.decode()
        assert '/api/v1/clusters/{id}/config/acks"' in shown
        assert not [each for each in await here.audit.entries() if "/config/" in each.path], "no change was asked for"


async def test_made_up_agents_and_revisions_are_refused(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster("a")
        await here.ask("PUT", "/api/v1/clusters/a/configuration", {"document": {"n": 1}, "reason": "first"})
        agent = here.ask.by(await token_of(here))
        ahead = await agent("POST", ACKS.format("a"), {"instance": "i1", "revision": 999_999_999})
        assert (ahead.status, ahead.fields()) == (422, ["revision"])
        answers = [
            (await agent("POST", ACKS.format("a"), {"instance": f"made-up-{number}", "revision": 1})).status
            for number in range(200)
        ]
        record = here.manager.known("a")
        assert isinstance(record, FleetRecord)
        room = room_of(record)
        assert answers == [204] * room + [429] * (200 - room)
        own = await here.instances("a")
        assert (await agent("POST", ACKS.format("a"), {"instance": own[0], "revision": 1})).status == 204
        refused = await agent("GET", "/api/v1/clusters/a/config/stream?instance=another")
        assert (refused.status, refused.kind) == (429, "too-many-requests")
        with anyio.fail_after(10):
            while own[0] not in (await _status(here)):  # noqa: ASYNC110
                await anyio.sleep(0.05)
        assert len(await _status(here)) <= room + len(own)


async def _status(here: World) -> Mapping[str, Any]:
    running: Mapping[str, Any] = (await here.ask("GET", "/api/v1/clusters/a/configuration/status")).json["running"]
    return running


async def test_those_whose_instances_are_gone_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowds, "_NEW", -1.0)
    async with world(tmp_path) as here:
        await here.cluster("a")
        await here.ask("PUT", "/api/v1/clusters/a/configuration", {"document": {"n": 1}, "reason": "first"})
        agent = here.ask.by(await token_of(here))
        for number in range(300):
            said = {"instance": f"earlier-{number}", "revision": 1}
            monkeypatch.setattr(crowds, "_LOOK", 0.0)
            assert (await agent("POST", ACKS.format("a"), said)).status == 204
        delivery = await here.manager.delivery("a")
        assert len(delivery.book.known) < 100


async def test_agents_ask_as_often_as_their_fleet_is_large(tmp_path: Path) -> None:
    async with world(tmp_path, limits=Limits(rate=0.01, burst=2)) as here:
        admin = here.ask
        assert (await admin("POST", "/api/v1/clusters", {"cluster_name": "a", "max_replicas": 418})).status == 202
        with anyio.fail_after(10):
            while (record := here.manager.known("a")) is None:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        assert isinstance(record, FleetRecord)
        assert pace_of(record) == 9.0
        agent = here.ask.by(await token_of(here))

        async def ack(instance: str) -> int:
            return (await agent("POST", ACKS.format("a"), {"instance": instance, "revision": 0})).status

        assert [await ack("i0") for _ in range(3)] == [204, 204, 429], "one agent as often as anybody"
        assert [await ack(f"i{number}") for number in range(1, 18)] == [204] * 16 + [429], "all of them nine times that"


@pytest.mark.parametrize("how", ["revoked", "deleted", "old"])
async def test_a_stream_of_configuration_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr("agentfleet.server.credentials._FRESH", 0.0)
    limits = Limits(beat=0.05, rate=1e6, burst=10**6, stream=0.5 if how == "old" else 3600)
    async with world(tmp_path, limits=limits) as here:
        await here.cluster("a")
        agent = here.ask.by(await token_of(here))
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:

                async def stream() -> None:
                    assert (await agent("GET", STREAM.format("a"))).status == 200

                tasks.start_soon(stream)
                while not here.app.state.api.agents.open:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
                if how == "revoked":
                    await here.tokens.revoke("agents", here.manager.clock.now())
                elif how == "deleted":
                    await here.ask("DELETE", "/api/v1/clusters/a")


async def test_a_stream_of_configuration_outlives_an_outage_of_the_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentfleet.server.credentials._FRESH", 0.0)
    async with world(tmp_path, limits=Limits(beat=0.02, rate=1e6, burst=10**6)) as here:
        await here.cluster("a")
        agent = here.ask.by(await token_of(here))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(agent, "GET", STREAM.format("a"))
            with anyio.fail_after(20):
                while not here.app.state.api.agents.open:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
                asked = 0

                async def out_of_reach(_: str) -> Any:
                    nonlocal asked
                    asked += 1
                    raise BackendUnavailable("no database")

                here.tokens.find = out_of_reach  # type: ignore[method-assign, assignment]
                while asked < 3:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
            assert here.app.state.api.agents.open == 1
            tasks.cancel_scope.cancel()


async def test_what_delivers_for_a_fleet_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliveries, "_LOOK", 0.05)
    async with world(tmp_path) as here:
        await here.cluster("a")
        agent = here.ask.by(await token_of(here))
        assert (await agent("GET", FETCH.format("a"))).status == 404
        begun = await here.manager.delivery("a")

        def delivers() -> bool:
            return begun.ready or len(here.manager._deliveries) > 0

        assert delivers()
        await here.ask("DELETE", "/api/v1/clusters/a")
        with anyio.fail_after(20):
            while delivers():  # noqa: ASYNC110
                await anyio.sleep(0.02)
            with pytest.raises(OperationRefused):
                async with begun.subscribed("i1"):
                    pass


async def test_a_manager_that_has_left_sends_agents_on_to_another(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster("a")
        agent = here.ask.by(await token_of(here))
    for method, path, body in (
        ("GET", STREAM, None),
        ("GET", FETCH, None),
        ("POST", ACKS, {"instance": "i1", "revision": 0}),
    ):
        refused = await agent(method, path.format("a"), body)
        assert (refused.status, refused.kind) == (503, "unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        assert "another manager" in refused.json["detail"]


async def test_a_delivery_whose_start_was_cancelled_is_begun_by_the_next_who_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Deliveries(ConfigStore(), MemoryAcks(), clock=SystemClock(), known=lambda _: True)
    run, stuck = ConfigDelivery.run, anyio.Event()

    async def slow(self: ConfigDelivery, *, task_status: Any) -> None:
        stuck.set()
        await anyio.sleep_forever()

    async with anyio.create_task_group() as tasks:
        await tasks.start(made.run)
        monkeypatch.setattr(ConfigDelivery, "run", slow)
        async with anyio.create_task_group() as asking:
            asking.start_soon(made.of, "a")
            await stuck.wait()
            asking.cancel_scope.cancel()
        monkeypatch.setattr(ConfigDelivery, "run", run)
        with anyio.fail_after(10):
            found = await made.of("a")
            await found.fetch("i1", timeout=5)
        assert found.ready
        tasks.cancel_scope.cancel()
