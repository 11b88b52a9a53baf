"""How a Deployment is told what it should be while its version moves all the time, and others write it, too."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
import pytest

pytest.importorskip("kubernetes_asyncio")

from tests.kube.test_fencing import Passing

from agentfleet import AgentTemplate, FleetSpec, NotLeader
from agentfleet.backends.base import Workload
from agentfleet.backends.kubernetes import deploying, guard
from agentfleet.backends.kubernetes.apply import CONTENT_TYPE
from agentfleet.backends.kubernetes.connection import Requests
from agentfleet.backends.kubernetes.deploying import deploy
from agentfleet.backends.kubernetes.errors import Invalid
from agentfleet.backends.kubernetes.guard import EPOCH, Guard
from agentfleet.backends.kubernetes.standing import check_size, standing
from agentfleet.errors import BackendError, Conflict, Outdated

SIZE, THEIRS = 8, 11
SOMEWHERE: Mapping[str, Any] = {"nodeAffinity": {"preferred": [{"weight": 1}]}}
WAYS = pytest.mark.parametrize("guarded", [False, True], ids=["alone", "leader"])
DIRECTIONS = pytest.mark.parametrize("after", [False, True], ids=["as it is read", "right after it was read"])


class Server(Requests):
    """One Deployment, and what befalls it: `happens` by the number of the look (from 1), before or after the answer."""

    def __init__(self, affinity: Mapping[str, Any] | None = None, epoch: str = "1") -> None:
        self.version, self.looks, self.refuses = 100, 0, 0
        self.back: list[tuple[str, int]] = []
        self.before: Callable[[int], None] = lambda _: None
        self.after: Callable[[int], None] = lambda _: None
        self.written: Callable[[], None] = lambda: None
        pod: dict[str, Any] = {"containers": ["agent:1"]}
        if affinity is not None:
            pod["affinity"] = affinity
        template = {"metadata": {"labels": {"revision": "1"}}, "spec": pod}
        self.metadata: dict[str, Any] = {
            "name": "agents",
            "uid": "u",
            "annotations": {EPOCH: epoch},
            "managedFields": [{"manager": "agentfleet", "operation": "Apply", "fieldsV1": {}}],
        }
        self.spec: dict[str, Any] = {"replicas": SIZE, "paused": False, "template": template}

    def move(self, *_: object) -> None:
        """A controller writes the status."""
        self.version += 1

    def scale(self) -> None:
        """Somebody sets another size."""
        self.version += 1
        self.spec["replicas"] = THEIRS

    @property
    def answer(self) -> bytes:
        metadata = {**self.metadata, "resourceVersion": str(self.version)}
        return json.dumps({"metadata": metadata, "spec": self.spec}).encode()

    async def request(self, method: str, path: str, *, body: bytes | None = None, **more: Any) -> bytes:
        assert path == "/apis/apps/v1/namespaces/n/deployments/agents"
        if method == "GET":
            self.looks += 1
            self.before(self.looks)
            answer = self.answer
            self.after(self.looks)
            return answer
        content = json.loads(body or b"{}")
        meant = content.pop("metadata")
        if meant.get("uid", "u") != "u" or meant.get("resourceVersion", str(self.version)) != str(self.version):
            raise Conflict("the object has been modified")
        self.metadata["annotations"].update(meant.get("annotations", {}))
        if more["content_type"] == CONTENT_TYPE:
            if self.refuses:
                self.refuses -= 1
                raise Invalid("no such thing")
            self.spec = content["spec"]
        elif content:
            self.spec = merged(self.spec, content["spec"])
        self.version += 1
        answer = self.answer
        self.written()
        return answer

    def stream(self, path: str, **_: Any) -> AbstractAsyncContextManager[Any]:
        raise NotImplementedError

    async def told(self, guarded: bool, *, replicas: int = SIZE) -> bytes:
        """Look at it, and tell it of another revision without affinity, as a backend does."""
        to: Requests = Guard(self, "n", "agents", Passing(1)) if guarded else self
        template = AgentTemplate(command=("agent",), version="2")
        spec = FleetSpec(name="agents", replicas=replicas, template=template)
        workload = Workload(spec, 2, template, replicas, same_size=True)
        now = await standing(to, "n", "agents")
        check_size(workload, now)
        return await deploy(to, manifest(replicas), workload, now, back=lambda *told: self.back.append(told))


def manifest(replicas: int) -> dict[str, Any]:
    template = {"metadata": {"labels": {"revision": "2"}}, "spec": {"containers": ["agent:2"]}}
    said = {"replicas": replicas, "paused": False, "template": template}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "agents", "namespace": "n"},
        "spec": said,
    }


def merged(old: dict[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """RFC 7386."""
    new = dict(old)
    for name, value in patch.items():
        if value is None:
            new.pop(name, None)
        else:
            new[name] = merged(old.get(name, {}), value) if isinstance(value, dict) else value
    return new


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it was waited between tries, instead of waiting."""
    waited: list[float] = []

    class Clock:
        async def sleep(self, seconds: float) -> None:
            waited.append(seconds)
            await anyio.lowlevel.checkpoint()

    class Other(Clock):
        async def sleep(self, seconds: float) -> None:
            await anyio.lowlevel.checkpoint()

    monkeypatch.setattr(deploying, "SystemClock", Clock)
    monkeypatch.setattr(guard, "SystemClock", Other)  # which has pauses of its own
    return waited


@WAYS
@pytest.mark.parametrize("affinity", [None, SOMEWHERE], ids=["plain", "affinity"])
def test_a_version_that_moves_whenever_it_is_looked_at_is_written_on(
    guarded: bool, affinity: Mapping[str, Any] | None
) -> None:
    """Between a look and the write that is decided on it there is no other look, which would find another version."""
    server = Server(affinity)
    server.before = server.move
    anyio.run(server.told, guarded)
    assert server.spec == manifest(SIZE)["spec"]
    assert server.looks == 1


def test_the_first_write_of_a_term_is_written_on_it_too() -> None:
    server = Server(epoch="0")
    server.before = server.move
    anyio.run(server.told, True)
    assert server.spec == manifest(SIZE)["spec"]
    assert server.metadata["annotations"][EPOCH] == "1"


@WAYS
@pytest.mark.parametrize("affinity", [None, SOMEWHERE], ids=["plain", "affinity"])
@pytest.mark.parametrize("times", [1, 5, 12])
def test_a_version_that_moves_before_each_write_for_a_while_is_written_on(
    guarded: bool, affinity: Mapping[str, Any] | None, times: int, waits: list[float]
) -> None:
    server = Server(affinity)
    server.after = lambda look: server.move() if look <= times else None
    anyio.run(server.told, guarded)
    assert server.spec == manifest(SIZE)["spec"]
    assert len(waits) == min(times, 7)
    assert all(0.05 * 2 ** min(number, 3) <= wait <= 0.8 for number, wait in enumerate(waits))


def test_a_version_that_moves_for_ever_is_written_on_by_who_is_alone() -> None:
    """Who leads gives up at last: its word goes through on a version that is its own, or not at all."""
    for guarded in (False, True):
        server = Server()
        server.after = server.move
        if guarded:
            with pytest.raises(Conflict):
                anyio.run(server.told, guarded)
            assert server.looks < 4 * guard._TRIES
        else:
            anyio.run(server.told, guarded)
            assert server.spec == manifest(SIZE)["spec"]


@WAYS
@DIRECTIONS
@pytest.mark.parametrize("affinity", [None, SOMEWHERE], ids=["plain", "affinity"])
@pytest.mark.parametrize("look", range(1, 8))
def test_a_size_that_is_set_meanwhile_is_not_undone(
    guarded: bool, after: bool, affinity: Mapping[str, Any] | None, look: int
) -> None:
    server = Server(affinity)
    before = json.loads(json.dumps(server.spec))

    def happens(number: int) -> None:
        if (number == look) is after and number == look:
            server.scale()
        else:
            server.move()

    server.after = happens
    if not after:
        server.before = lambda number: server.scale() if number == look else None
    with pytest.raises(Outdated):
        anyio.run(server.told, guarded)
    assert server.spec == {**before, "replicas": THEIRS}, "and nothing else has changed"


@pytest.mark.parametrize("look", range(1, 15))
def test_a_leader_that_is_deposed_meanwhile_writes_nothing(look: int) -> None:
    """However often it tries: each version on which it writes was written in its own term."""
    server = Server(SOMEWHERE)
    before = json.loads(json.dumps(server.spec))

    def deposed(number: int) -> None:
        server.move()
        if number == look:
            server.metadata["annotations"][EPOCH] = "2"

    server.after = deposed
    with pytest.raises(NotLeader):
        anyio.run(server.told, True)
    assert server.spec == before


@pytest.mark.parametrize("affinity", [None, SOMEWHERE], ids=["plain", "affinity"])
def test_who_was_deposed_before_writes_nothing(affinity: Mapping[str, Any] | None) -> None:
    """What it reads is the next leader's, and no version to write on."""
    server = Server(affinity, epoch="2")
    before = json.loads(json.dumps(server.spec))
    with pytest.raises(NotLeader):
        anyio.run(server.told, True)
    assert server.spec == before


ENDS: list[tuple[str, bool, type[BackendError]]] = [
    ("scaled", False, Outdated),
    ("scaled", True, Outdated),
    ("refused", False, Invalid),
    ("refused", True, Invalid),
    ("moves", True, Conflict),
]


@pytest.mark.parametrize(("what", "guarded", "expected"), ENDS)
def test_a_fleet_is_not_left_held_by_half_an_order(what: str, guarded: bool, expected: type[BackendError]) -> None:
    """Its affinity is taken away first; when the rest is refused, it has its affinity again, and goes on."""
    server = Server(SOMEWHERE)
    before = json.loads(json.dumps(server.spec))
    held: list[bool] = []

    def written() -> None:
        if not server.spec["paused"]:
            return
        held.append("affinity" in server.spec["template"]["spec"])
        if what == "scaled":
            server.scale()
        elif what == "refused":
            server.refuses = 1
        else:
            server.move()
            server.after = lambda look: server.move() if look <= 15 else None  # until it has given up

    server.written = written
    with pytest.raises(expected):
        anyio.run(server.told, guarded)
    assert held == [False]
    assert server.spec == {**before, "replicas": THEIRS if what == "scaled" else SIZE}
    ((fleet, version),) = server.back
    assert (fleet, version <= server.version) == ("agents", True)


@WAYS
def test_what_somebody_else_has_made_of_it_meanwhile_is_not_put_back(guarded: bool) -> None:
    server = Server(SOMEWHERE)

    def written() -> None:
        if server.spec["paused"]:
            server.scale()
            server.spec["template"]["spec"]["containers"] = ["agent:hotfix"]

    server.written = written
    with pytest.raises(Outdated):
        anyio.run(server.told, guarded)
    assert server.spec["template"]["spec"] == {"containers": ["agent:hotfix"]}
    assert not server.back
    assert server.spec["replicas"] == THEIRS
