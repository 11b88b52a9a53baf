"""How long a write of a leader takes at most, and how often it tries, in virtual time."""

from __future__ import annotations

import itertools
import json
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
import pytest

pytest.importorskip("kubernetes_asyncio")

from tests.kube.test_fencing import Passing

from agentfleet.backends.kubernetes import guard
from agentfleet.backends.kubernetes.connection import MERGE_PATCH, Requests
from agentfleet.backends.kubernetes.guard import EPOCH, Guard
from agentfleet.backends.kubernetes.resources import PODS
from agentfleet.errors import Conflict, DeadlineExceeded
from agentfleet.testing import virtual

SERVICE = "/api/v1/namespaces/n/services/agents"
POD = "/api/v1/namespaces/n/pods/agents-1"
DEPLOYMENT = "/apis/apps/v1/namespaces/n/deployments/agents"


class Server(Requests):
    """Has whatever it is asked for, at a version that has always moved by the time of a write."""

    def __init__(self, *, slow: float = 0.0) -> None:
        self.slow = slow
        self.moves = True
        self.hangs = False
        self.written: list[tuple[float, str, float]] = []
        """When something was written, where, and with how much time for it."""

    async def request(self, method: str, path: str, *, timeout: float | None = None, **_: Any) -> bytes:
        if method != "GET":
            assert timeout is not None
            self.written.append((anyio.current_time(), path, timeout))
            if self.hangs:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(timeout)
                raise DeadlineExceeded("no answer")
        await anyio.sleep(self.slow)
        if method != "GET" and self.moves:
            raise Conflict("the object has been modified")
        metadata = {"uid": "u", "resourceVersion": "1", "annotations": {EPOCH: "1"}}
        return json.dumps({"metadata": metadata}).encode()

    def stream(self, path: str, **_: Any) -> AbstractAsyncContextManager[Any]:
        raise NotImplementedError

    @property
    def pauses(self) -> list[float]:
        times = [at for at, *_ in self.written]
        return [after - before for before, after in itertools.pairwise(times)]


def leader(server: Server) -> Guard:
    return Guard(server, "n", "agents", Passing(1), pod=lambda _: None)


async def write(to: Guard, path: str, timeout: float | None = None) -> bytes:
    place = {"uid": "u", "resourceVersion": "1"} if path == POD else {}
    body = json.dumps({"metadata": place}).encode()
    return await to.request("PATCH", path, body=body, content_type=MERGE_PATCH, timeout=timeout)


@virtual
async def test_a_write_upon_what_moves_all_the_time_waits_longer_and_longer_and_gives_up() -> None:
    server = Server()
    with pytest.raises(Conflict):
        await write(leader(server), SERVICE)
    assert len(server.written) == guard._TRIES
    assert all(0.05 * 2 ** min(number, 3) <= pause <= 0.8 for number, pause in enumerate(server.pauses))


@virtual
@pytest.mark.parametrize("path", [SERVICE, DEPLOYMENT])
async def test_all_tries_together_take_no_longer_than_was_given(path: str) -> None:
    server = Server()
    with pytest.raises(DeadlineExceeded, match=r"within 0\.5 s"):
        await write(leader(server), path, timeout=0.5)
    assert anyio.current_time() == pytest.approx(0.5)
    assert 2 <= len(server.written) < guard._TRIES


@virtual
async def test_one_try_takes_no_longer_than_what_is_left() -> None:
    server = Server(slow=1.0)
    server.moves = False
    await write(leader(server), SERVICE, timeout=3.5)  # two looks before
    ((at, _, given),) = server.written
    assert at == 2.0
    assert given == pytest.approx(1.5)
    server.hangs = True
    with pytest.raises(DeadlineExceeded):
        await write(leader(server), SERVICE, timeout=4.0)
    assert anyio.current_time() == pytest.approx(7.0)
    with pytest.raises(DeadlineExceeded):
        await write(leader(server), SERVICE)
    assert server.written[-1][2] == guard._TIMEOUT, "nor longer than it ever may"


@virtual
async def test_waiting_for_another_write_counts() -> None:
    server = Server()
    server.hangs = True
    to = leader(server)

    async def first() -> None:
        with pytest.raises(DeadlineExceeded):
            await write(to, SERVICE)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(first)
        await anyio.sleep(1.0)
        with pytest.raises(DeadlineExceeded, match="within 2 s"):
            await write(to, DEPLOYMENT, timeout=2.0)
        assert anyio.current_time() == 3.0
        assert [path for _, path, _ in server.written] == [SERVICE], "it was not sent"


@virtual
async def test_a_deletion_that_was_decided_on_a_version_is_tried_on_that_one_alone() -> None:
    server = Server()
    place = {"uid": "u", "resourceVersion": "1"}
    with pytest.raises(Conflict):
        await leader(server).request("DELETE", POD, body=json.dumps({"preconditions": place}).encode())
    assert len(server.written) == 1


@virtual
async def test_a_pod_that_changes_all_the_time_is_waited_for_likewise() -> None:
    server = Server()
    seen = PODS.read(json.dumps({"metadata": {"name": "agents-1", "uid": "u", "resourceVersion": "1"}}).encode())
    to = Guard(server, "n", "agents", Passing(1), pod=lambda _: seen)
    with pytest.raises(Conflict):
        await write(to, POD)
    assert all(0.05 * 2 ** min(number, 3) <= pause <= 0.8 for number, pause in enumerate(server.pauses))
    with pytest.raises(DeadlineExceeded, match=r"within 0\.5 s"):
        await write(to, POD, timeout=0.5)
