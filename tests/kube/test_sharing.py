"""One backend that several use: opened once, closed once, and never seen half open."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, cast

import anyio
import pytest

pytest.importorskip("kubernetes_asyncio")

from agentfleet import Event
from agentfleet.backends.kubernetes import Connection
from agentfleet.backends.kubernetes.backend import KubernetesBackend
from agentfleet.errors import BackendUnavailable
from agentfleet.testing import run_virtual

GROUPS = ["apps/v1", "policy/v1", "autoscaling/v2"]
DEPLOYMENT = {
    "metadata": {"name": "agents", "namespace": "ns", "uid": "d", "resourceVersion": "1"},
    "spec": {"selector": {"matchLabels": {}}, "template": {"metadata": {}, "spec": {"containers": []}}},
}


class Cluster:
    """A connection to one that answers after 0.1 s, shows one Deployment, and never takes an Event."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.opened = 0

    async def namespace(self) -> str:
        return "ns"

    async def request(self, method: str, path: str, **_: Any) -> bytes:
        if method != "GET":
            await anyio.sleep_forever()
        await anyio.sleep(0.1)
        if self.error is not None:
            raise self.error
        if path == "/version":
            self.opened += 1
            return b'{"major": "1", "minor": "25"}'
        if path == "/apis":
            return json.dumps({"groups": [{"versions": [{"groupVersion": each} for each in GROUPS]}]}).encode()
        items = [DEPLOYMENT] if path.endswith("/deployments") else []
        return json.dumps({"metadata": {"resourceVersion": "1"}, "items": items}).encode()

    @asynccontextmanager
    async def stream(self, *_: Any, **__: Any) -> AsyncIterator[AsyncIterator[bytes]]:
        async def pieces() -> AsyncIterator[bytes]:
            await anyio.sleep_forever()
            yield b""

        yield pieces()


def shared() -> tuple[Cluster, KubernetesBackend]:
    cluster = Cluster()
    return cluster, KubernetesBackend(cast("Connection", cluster))


async def use(backend: KubernetesBackend, *, after: float = 0.0, until: float = 1.0) -> None:
    """Come at one time and go at another, and see something all the while."""
    await anyio.sleep(after)
    async with backend:
        assert backend.informers
        await anyio.sleep(until - anyio.current_time())
        assert backend.informers


async def together(*users: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async with anyio.create_task_group() as tasks:
        for each in users:
            tasks.start_soon(each)


def is_open(backend: KubernetesBackend) -> bool:
    try:
        return bool(backend.informers)
    except BackendUnavailable:
        return False


def test_who_comes_while_it_is_being_opened_waits_until_it_is_open() -> None:
    async def main() -> None:
        cluster, backend = shared()
        await together(partial(use, backend, until=2.0), partial(use, backend, after=0.1))
        assert (cluster.opened, is_open(backend)) == (1, False)

    run_virtual(main)


def test_who_comes_while_it_cannot_be_opened_opens_it() -> None:
    """Else it would count as open for as long as somebody is there who waits for it to be."""

    async def main() -> None:
        cluster, backend = shared()
        cluster.error = BackendUnavailable("down")

        async def first() -> None:
            with pytest.raises(BackendUnavailable, match="down"):
                async with backend:
                    pass
            cluster.error = None

        await together(first, partial(use, backend, after=0.05), partial(use, backend, after=0.5, until=0.9))
        assert (cluster.opened, is_open(backend)) == (1, False)

    run_virtual(main)


def test_who_comes_while_it_is_being_closed_opens_it_again() -> None:
    async def main() -> None:
        cluster, backend = shared()

        async def first() -> None:
            async with backend:
                await anyio.sleep(1.0)
                backend.announce(Event(1.0, "agents", "fleet.stopped", None, {}, seq=1))
            assert anyio.current_time() > 2.0, "its last words took a second"

        await together(first, partial(use, backend, after=1.5, until=9.0))
        assert (cluster.opened, is_open(backend)) == (2, False)

    run_virtual(main)


def test_who_is_cancelled_while_it_is_opened_or_closed_is_not_counted() -> None:
    async def main() -> None:
        cluster, backend = shared()
        with anyio.move_on_after(0.15):
            async with backend:
                raise AssertionError("it is not open yet")
        assert not is_open(backend)
        with anyio.move_on_after(1.0):
            async with backend:
                backend.announce(Event(1.0, "agents", "fleet.stopped", None, {}, seq=1))
                await anyio.sleep_forever()
        assert not is_open(backend)
        await use(backend, until=9.0)
        assert (cluster.opened, is_open(backend)) == (3, False)

    run_virtual(main)


def test_it_may_be_used_again_in_another_event_loop() -> None:
    cluster, backend = shared()

    async def main() -> None:
        await together(partial(use, backend, until=2.0), partial(use, backend, after=0.05))
        assert not is_open(backend)

    for _ in range(3):
        run_virtual(main)
    assert cluster.opened == 3
