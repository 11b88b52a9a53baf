"""The proxy in front of a real API server: each fault does what it says, and nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import anyio
import pytest

from agentfleet.errors import BackendUnavailable, DeadlineExceeded, SpecError
from agentfleet.testing.kube import (
    Access,
    ApiRefused,
    Client,
    ControlPlane,
    Fault,
    FaultProxy,
    NoAnswer,
    Reset,
    SlowBody,
    TruncatedBody,
    drop_event,
    duplicate_event,
    expired_event,
    html_502,
    status_answer,
    swap_events,
)
from agentfleet.testing.kube.apiclient import ApiClient

pytestmark = [pytest.mark.anyio, pytest.mark.integration, pytest.mark.slow]
NAMESPACES = "/api/v1/namespaces"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=["tls", "plain", "passing"])
async def any_proxy(plane: ControlPlane, request: pytest.FixtureRequest) -> AsyncIterator[FaultProxy]:
    """Each of the three kinds of proxy."""
    certificate = plane.authority.server("proxy") if request.param == "tls" else None
    async with FaultProxy(plane.access, certificate=certificate, plain=request.param == "plain") as made:
        yield made


@pytest.fixture
async def proxy(plane: ControlPlane) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(plane.access, certificate=plane.authority.server("proxy")) as made:
        yield made


class Watch:
    """A watch of the ConfigMaps of a namespace, and what has come of it."""

    def __init__(self, api: ApiClient, path: str) -> None:
        self.path = path
        self._api = api
        self._told, self._came = anyio.create_memory_object_stream[str](100)

    async def run(self) -> None:
        """Note each event's type and name, and what the watch ended with."""
        with self._told:
            try:
                async for line in self._api.lines(self.path, silence=60):
                    event = json.loads(line)
                    name = event["object"]["metadata"].get("name", event["object"].get("code"))
                    if name == "kube-root-ca.crt":
                        continue  # a controller's, whenever it likes
                    await self._told.send(f"{event['type']} {name}")
            except (aiohttp.ClientError, OSError):
                await self._told.send("BROKEN")

    async def next(self, timeout: float = 10) -> str:
        """What came next."""
        with anyio.fail_after(timeout):
            return await self._came.receive()

    async def until(self, event: str) -> None:
        while await self.next() != event:
            pass

    def close(self) -> None:
        self._came.close()


@asynccontextmanager
async def watching(plane: ControlPlane, access: Access) -> AsyncIterator[tuple[Watch, str]]:
    """A watch, begun at the present, and the path at which ConfigMaps are created."""
    path = f"{NAMESPACES}/{await plane.namespace()}/configmaps"
    async with ApiClient(access) as api, anyio.create_task_group() as tasks:
        version = (await plane.api.get(path))["metadata"]["resourceVersion"]
        watch = Watch(api, f"{path}?watch=1&resourceVersion={version}")
        tasks.start_soon(watch.run)
        yield watch, path
        tasks.cancel_scope.cancel()
        watch.close()


async def make(plane: ControlPlane, path: str, *names: str) -> None:
    for name in names:
        await plane.api.post(path, {"metadata": {"name": name}})


# ------------------------------------------------------------------------------------------------ connections


async def test_without_faults_everything_passes(plane: ControlPlane, any_proxy: FaultProxy) -> None:
    through = Client(any_proxy.access)
    namespace = await plane.namespace()
    path = f"{NAMESPACES}/{namespace}/configmaps"
    big = {"metadata": {"name": "big"}, "data": {"text": "x" * 500_000}}
    await through.post(path, big)
    assert (await through.get(f"{path}/big"))["data"] == big["data"]
    await through.patch(f"{path}/big", {"data": {"text": "small"}})
    assert (await plane.api.get(f"{path}/big"))["data"]["text"] == "small"
    async with watching(plane, any_proxy.access) as (watch, where):
        await make(plane, where, "a", "b")
        await watch.until("ADDED a")
        await watch.until("ADDED b")


async def test_half_open_connections_swallow_everything(plane: ControlPlane, any_proxy: FaultProxy) -> None:
    through = Client(any_proxy.access)
    async with watching(plane, any_proxy.access) as (watch, path):
        await make(plane, path, "a")
        await watch.until("ADDED a")
        any_proxy.half_open()
        await make(plane, path, "b")
        with pytest.raises(TimeoutError):
            await watch.next(timeout=0.5)
        with pytest.raises(DeadlineExceeded):
            await through.get(NAMESPACES, timeout=0.5)
        await any_proxy.heal()
        assert await through.get(NAMESPACES)  # new connections work
        with pytest.raises(TimeoutError):
            await watch.next(timeout=0.5)  # the old one is dead for good


async def test_cut_connections_are_reset_and_new_ones_work(plane: ControlPlane, any_proxy: FaultProxy) -> None:
    async with watching(plane, any_proxy.access) as (watch, path):
        await make(plane, path, "a")
        await watch.until("ADDED a")
        assert any_proxy.cut() >= 1
        assert await watch.next() == "BROKEN"
    assert await Client(any_proxy.access).get(NAMESPACES)


async def test_refused_connections_and_late_ones(any_proxy: FaultProxy) -> None:
    through = Client(any_proxy.access)
    await any_proxy.refuse()
    with pytest.raises(BackendUnavailable, match="refused"):
        await through.get("/version")
    await any_proxy.accept()
    any_proxy.delay(0.3)
    begun = time.monotonic()
    await through.get("/version")
    assert time.monotonic() - begun >= 0.6  # there and back
    await any_proxy.heal()
    assert await through.get("/version")


async def test_the_server_dies_behind_it(mortal_plane: ControlPlane) -> None:
    async with FaultProxy(mortal_plane.access, plain=True) as proxy:
        through = Client(proxy.access)
        mortal_plane.kill_apiserver()
        with pytest.raises(BackendUnavailable):
            await through.get("/version")
        await mortal_plane.restart_apiserver()
        assert await through.get("/version")


# ------------------------------------------------------------------------------------------------ requests


@pytest.mark.parametrize(
    ("fault", "status", "told"),
    [
        (html_502(), 502, "<html>"),
        (status_answer(429, "later", retry_after=3), 429, "later"),
        (status_answer(409, "changed"), 409, "changed"),
        (status_answer(410), 410, "injected"),
        (status_answer(500), 500, "injected"),
        (status_answer(503), 503, "injected"),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
async def test_injected_answers(proxy: FaultProxy, fault: Fault, status: int, told: str) -> None:
    through = Client(proxy.access)
    injected = proxy.inject(fault, method="GET", path="^/api/v1/namespaces$", skip=1)
    assert await through.get(NAMESPACES)
    assert await through.get("/version")
    with pytest.raises(ApiRefused, match=told) as refused:
        await through.get(NAMESPACES)
    assert refused.value.status == status
    await injected.struck(1, timeout=1)
    assert injected.hits == 1
    assert await through.get(NAMESPACES)


async def test_retry_after_is_sent(proxy: FaultProxy) -> None:
    proxy.inject(status_answer(429, retry_after=7))
    async with ApiClient(proxy.access) as api:
        _, _, wait = await api._once("GET", NAMESPACES, None, "application/json")
    assert wait == 7


async def test_an_answer_may_get_lost_after_the_deed(plane: ControlPlane, proxy: FaultProxy) -> None:
    through = Client(proxy.access)
    path = f"{NAMESPACES}/{await plane.namespace()}/configmaps"
    lost: list[tuple[Fault, Any]] = [
        (status_answer(503, done=True), ApiRefused),
        (Reset(done=True), BackendUnavailable),
        (NoAnswer(done=True), DeadlineExceeded),
    ]
    for index, (fault, error) in enumerate(lost):
        proxy.inject(fault, method="POST")
        with pytest.raises(error):
            await through.post(path, {"metadata": {"name": f"done-{index}"}}, timeout=2)
        assert await plane.api.wait(f"{path}/done-{index}", bool)
    for fault in (Reset(), NoAnswer()):
        proxy.inject(fault, method="POST")
        with pytest.raises((BackendUnavailable, DeadlineExceeded)):
            await through.post(path, {"metadata": {"name": "not-done"}}, timeout=1)
    with pytest.raises(ApiRefused, match="404"):
        await plane.api.get(f"{path}/not-done")


async def test_slow_and_truncated_bodies(proxy: FaultProxy) -> None:
    through = Client(proxy.access)
    proxy.inject(SlowBody(size=100, pause=0.2))
    begun = time.monotonic()
    assert (await through.get("/version"))["major"]
    assert time.monotonic() - begun >= 0.4
    proxy.inject(TruncatedBody(size=20))
    with pytest.raises(BackendUnavailable, match="IncompleteRead"):
        await through.get("/version")
    assert await through.get("/version")


async def test_requests_are_counted_and_faults_taken_back(proxy: FaultProxy) -> None:
    through = Client(proxy.access)
    await through.get("/version")
    await through.get(f"{NAMESPACES}?limit=1")
    assert proxy.requests("GET", "namespaces") == [("GET", f"{NAMESPACES}?limit=1")]
    proxy.forget_requests()
    endless = proxy.inject(status_answer(500), times=None)
    for _ in range(3):
        with pytest.raises(ApiRefused):
            await through.get("/version")
    assert endless.hits == len(proxy.requests()) == 3
    endless.cancel()
    assert await through.get("/version")
    proxy.inject(status_answer(500), times=None)
    await proxy.heal()
    assert await through.get("/version")
    with pytest.raises(DeadlineExceeded, match="has struck 3 times and not 4"):
        await endless.struck(4, timeout=0.01)


async def test_a_passing_proxy_refuses_to_touch_requests(plane: ControlPlane) -> None:
    with pytest.raises(SpecError, match="give it a certificate"):
        FaultProxy(plane.access).inject(html_502())


# ------------------------------------------------------------------------------------------------ events


async def events(plane: ControlPlane, proxy: FaultProxy, fault: Fault, count: int) -> list[str]:
    """What a watch tells of the creation of a, b, c, and d when a fault befalls b."""
    async with watching(plane, proxy.access) as (watch, path):
        await make(plane, path, "open")
        await watch.until("ADDED open")
        proxy.inject(fault, path=watch.path.partition("?")[0])  # of a watch that is open already
        await make(plane, path, "a", "b", "c", "d")
        return [await watch.next() for _ in range(count)]


async def test_events_are_dropped(plane: ControlPlane, proxy: FaultProxy) -> None:
    assert await events(plane, proxy, drop_event('"name":"b"'), 3) == ["ADDED a", "ADDED c", "ADDED d"]


async def test_events_are_duplicated(plane: ControlPlane, proxy: FaultProxy) -> None:
    seen = await events(plane, proxy, duplicate_event('"name":"b"'), 5)
    assert seen == ["ADDED a", "ADDED b", "ADDED b", "ADDED c", "ADDED d"]


async def test_events_change_places(plane: ControlPlane, proxy: FaultProxy) -> None:
    seen = await events(plane, proxy, swap_events('"name":"b"'), 4)
    assert seen == ["ADDED a", "ADDED c", "ADDED b", "ADDED d"]


async def test_a_watch_expires(plane: ControlPlane, proxy: FaultProxy) -> None:
    seen = await events(plane, proxy, expired_event('"name":"b"'), 2)
    assert seen == ["ADDED a", "ERROR 410"]
