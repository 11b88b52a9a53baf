"""Marks on those who are to go first (pod-deletion-cost): what is sent, what is waited for, and what is passed over."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, cast

import anyio
import pytest

pytest.importorskip("kubernetes_asyncio")

from agentfleet.backends.kubernetes.connection import MERGE_PATCH, Requests
from agentfleet.backends.kubernetes.errors import Forbidden, Invalid, NotFound, Replaced
from agentfleet.backends.kubernetes.informer import Informer
from agentfleet.backends.kubernetes.marking import mark_expendable
from agentfleet.backends.kubernetes.objects import Annotations, Meta, Pod
from agentfleet.errors import BackendUnavailable, Conflict, DeadlineExceeded, NotLeader
from agentfleet.testing import virtual

Asked = dict[str, Any]


class Server:
    """Answers each patch with the next resource version, or with an error for some pods."""

    def __init__(self, **errors: Exception) -> None:
        self.asked: list[Asked] = []
        self.errors = errors
        self.at_once = self.most = 0

    async def request(self, method: str, path: str, **more: Any) -> bytes:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await anyio.sleep(1.0)
        self.at_once -= 1
        self.asked.append({"method": method, "path": path, **more, "body": json.loads(more["body"])})
        error = self.errors.get(path.rpartition("/")[2])
        if error is not None:
            raise error
        return json.dumps({"metadata": {"resourceVersion": str(100 + len(self.asked))}}).encode()


class Seen:
    """A cache that shows a version when the test lets it."""

    def __init__(self) -> None:
        self.waited: list[int] = []
        self.shows = anyio.Event()

    async def wait_for(self, version: int) -> None:
        self.waited.append(version)
        await self.shows.wait()


def pods(*names: str) -> list[Pod]:
    return [Pod(metadata=Meta(name=name, namespace="here", uid=f"uid-{name}")) for name in names]


async def mark(server: Server, chosen: Sequence[Pod], seen: Seen | None = None, *, others: Sequence[Pod] = ()) -> Seen:
    """Mark; without a cache of its own the cache shows everything at once."""
    if seen is None:
        seen = Seen()
        seen.shows.set()
    await mark_expendable(cast("Requests", server), cast("Informer[Pod]", seen), chosen, others=others)
    return seen


@virtual
async def test_every_chosen_pod_gets_its_cost_and_no_namesake() -> None:
    server = Server()
    await mark(server, pods("a", "b", "c"))
    cost = {"controller.kubernetes.io/pod-deletion-cost": "-1000"}
    assert {each["path"]: each["body"] for each in server.asked} == {
        f"/api/v1/namespaces/here/pods/{name}": {"metadata": {"uid": f"uid-{name}", "annotations": cost}}
        for name in "abc"
    }
    assert {each["method"] for each in server.asked} == {"PATCH"}
    assert {each["content_type"] for each in server.asked} == {MERGE_PATCH}


def costing(cost: str, *names: str) -> list[Pod]:
    annotations = Annotations(deletion_cost=cost)
    return [
        Pod(metadata=Meta(name=name, namespace="here", uid=f"uid-{name}", annotations=annotations)) for name in names
    ]


@virtual
async def test_who_was_chosen_in_vain_is_not_the_first_to_go_the_next_time() -> None:
    """It may be busy by then, and of two that cost the same the ReplicaSet takes either."""
    server = Server()
    chosen = [*pods("a"), *costing("-1000", "b")]
    await mark(server, chosen, others=[*chosen, *costing("-1000", "c"), *costing("7", "d"), *pods("e")])
    costs = {each["path"][-1]: each["body"]["metadata"]["annotations"].popitem()[1] for each in server.asked}
    assert costs == {"a": "-1000", "c": None}, "b has its mark, d has one of its own, e has none"


@virtual
async def test_it_returns_when_the_newest_mark_is_seen() -> None:
    server, seen, returned = Server(), Seen(), anyio.Event()

    async def marking() -> None:
        await mark(server, pods("a", "b", "c"), seen)
        returned.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(marking)
        await anyio.sleep(60)
        assert seen.waited == [103]
        assert not returned.is_set()
        seen.shows.set()
        await anyio.sleep(1)
        assert returned.is_set()


GONE: dict[str, Callable[[], Exception]] = {
    "gone": lambda: NotFound("no such pod"),
    "another of its name": lambda: Replaced("the uid differs"),
    "another of its name, as some servers say it": lambda: invalid("metadata.uid"),
}


def invalid(field: str) -> Invalid:
    return Invalid("not valid", fields=(field,))


@pytest.mark.parametrize("why", GONE)
@virtual
async def test_pods_that_are_gone_are_passed_over(why: str) -> None:
    server = Server(b=GONE[why]())
    assert (await mark(server, pods("a", "b", "c"))).waited == [103]
    assert len(server.asked) == 3
    assert (await mark(Server(b=GONE[why]()), pods("b"))).waited == [], "there is nothing to wait for"


@pytest.mark.parametrize(
    "error",
    [
        Forbidden("no"),
        BackendUnavailable("away"),
        DeadlineExceeded("late"),
        Conflict("it goes on changing"),
        NotLeader("over"),
        invalid("metadata.annotations"),
    ],
)
@virtual
async def test_any_other_error_is_raised_as_it_is(error: Exception) -> None:
    seen = Seen()
    with pytest.raises(type(error)) as raised:
        await mark(Server(b=error), pods("a", "b", "c"), seen)
    assert raised.value is error
    assert not seen.waited


@virtual
async def test_many_are_marked_a_few_at_a_time_and_none_after_an_error() -> None:
    names = [f"p{number}" for number in range(50)]
    server = Server()
    await mark(server, pods(*names))
    assert (len(server.asked), server.most) == (50, 16)
    server = Server(p0=BackendUnavailable("away"))
    with pytest.raises(BackendUnavailable):
        await mark(server, pods(*names))
    assert len(server.asked) < 50
