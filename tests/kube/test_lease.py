"""What is asked of an API server for a lease, and what its answers mean. `test_lease_processes.py` asks a real one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import anyio
import pytest

pytest.importorskip("kubernetes_asyncio")

from agentfleet.backends.kubernetes.errors import AlreadyExists, Invalid, NotFound
from agentfleet.backends.kubernetes.lease import KubernetesLeases
from agentfleet.core.leadership import LeaseRecord
from agentfleet.errors import BackendUnavailable, Conflict, DeadlineExceeded
from agentfleet.stores.leases import LeaseStore
from agentfleet.testing import run_virtual

PATH = "/apis/coordination.k8s.io/v1/namespaces/agents/leases"
LEASE = {
    "metadata": {"resourceVersion": "17", "uid": "u1"},
    "spec": {
        "holderIdentity": "me",
        "leaseDurationSeconds": 7,
        "leaseTransitions": 3,
        "renewTime": "2026-11-05T11:00:00.000000Z",
    },
}


class Server:
    """Answers one request after the other, and remembers them."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)
        self.asked: list[dict[str, Any]] = []

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str | int | bool] | None = None,
        body: bytes | None = None,
        content_type: str = "application/json",
        timeout: float | None = None,
        idempotent: bool | None = None,
    ) -> bytes:
        decoded = None if body is None else json.loads(body)
        self.asked.append(
            {
                "method": method,
                "path": path,
                "body": decoded,
                "type": content_type,
                "timeout": timeout,
                "again": idempotent,
            }
        )
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, bytes) else json.dumps(answer).encode()


def leases(server: Server, wall: datetime | None = None) -> KubernetesLeases:
    date = wall or datetime(2026, 11, 5, 12, 34, 56, 7, tzinfo=UTC)
    return KubernetesLeases(server, "agents", wall=lambda: date)


def test_it_is_a_lease_store() -> None:
    store: LeaseStore = leases(Server(LEASE))
    assert anyio.run(lambda: store.get("a", timeout=1)) is not None


def test_a_lease_is_read() -> None:
    server = Server(LEASE)
    record = anyio.run(lambda: leases(server).get("researchers", timeout=1.5))
    assert record == LeaseRecord("me", 3, 7.0, "2026-11-05T11:00:00.000000Z", "17", "u1")
    assert (server.asked[0]["method"], server.asked[0]["path"]) == ("GET", f"{PATH}/agentfleet-researchers")
    assert server.asked[0]["timeout"] == 1.5


@pytest.mark.parametrize("spec", [None, {}, {"holderIdentity": ""}, {"holderIdentity": None}])
def test_a_lease_that_nobody_holds_may_lack_anything(spec: object) -> None:
    server = Server({"metadata": {"resourceVersion": "1", "uid": "u"}, "spec": spec})
    assert anyio.run(lambda: leases(server).get("a", timeout=1)) == LeaseRecord(None, 0, version="1", uid="u")


def test_no_lease_is_none() -> None:
    assert anyio.run(lambda: leases(Server(NotFound("no"))).get("a", timeout=1)) is None


@pytest.mark.parametrize(
    "answer", [b"<html>", b"[]", b"{}", b'{"metadata": {}}', b'{"metadata": null, "spec": 3}', b""]
)
def test_an_answer_that_is_no_lease_says_nothing(answer: bytes) -> None:
    with pytest.raises(BackendUnavailable, match="no lease"):
        anyio.run(lambda: leases(Server(answer)).get("a", timeout=1))


def test_a_lease_is_made() -> None:
    server = Server(LEASE)
    anyio.run(lambda: leases(server).create("a", LeaseRecord("me", 1, 6.5, taken=True), timeout=1))
    asked = server.asked[0]
    assert (asked["method"], asked["path"], asked["again"]) == ("POST", PATH, False)
    assert asked["body"]["metadata"]["name"] == "agentfleet-a"
    assert asked["body"]["spec"] == {
        "holderIdentity": "me",
        "leaseDurationSeconds": 7,  # whole seconds, never fewer than meant
        "leaseTransitions": 1,
        "acquireTime": "2026-11-05T12:34:56.000007Z",
        "renewTime": "2026-11-05T12:34:56.000007Z",
    }


@pytest.mark.parametrize(
    ("record", "holder", "dates"),
    [
        (LeaseRecord("me", 3, 7.0, "", "17", "u1"), "me", {"renewTime"}),
        (LeaseRecord("me", 4, 7.0, "", "17", "u1", taken=True), "me", {"renewTime", "acquireTime"}),
        (LeaseRecord(None, 3, 7.0, "", "17", "u1"), None, {"renewTime"}),
    ],
)
def test_a_lease_is_changed_only_as_it_was_seen(record: LeaseRecord, holder: str | None, dates: set[str]) -> None:
    server = Server(LEASE)
    anyio.run(lambda: leases(server).update("a", record, timeout=1))
    asked = server.asked[0]
    assert (asked["method"], asked["type"], asked["again"]) == ("PATCH", "application/merge-patch+json", False)
    assert asked["body"]["metadata"] == {"resourceVersion": "17", "uid": "u1"}
    spec = asked["body"]["spec"]
    assert spec["holderIdentity"] == holder  # null takes it away
    assert spec["leaseTransitions"] == record.epoch
    assert spec.keys() - {"holderIdentity", "leaseTransitions", "leaseDurationSeconds"} == dates


@pytest.mark.parametrize(
    "error",
    [
        Conflict("changed"),
        NotFound("deleted"),
        Invalid("metadata.uid: field is immutable", ("metadata.uid",)),
    ],
)
def test_a_lease_that_is_another_now_is_a_conflict(error: Exception) -> None:
    with pytest.raises(Conflict):
        anyio.run(lambda: leases(Server(error)).update("a", LeaseRecord("me", 1, 7.0, "", "1", "u"), timeout=1))


def test_a_lease_that_is_there_already_is_a_conflict() -> None:
    with pytest.raises(Conflict):
        anyio.run(lambda: leases(Server(AlreadyExists("there"))).create("a", LeaseRecord("me", 1), timeout=1))


def test_a_lease_is_removed_only_as_it_was_seen() -> None:
    server = Server({}, NotFound("gone"), Conflict("changed"))
    record = LeaseRecord(None, 3, 7.0, "", "17", "u1")
    for _ in range(2):  # that it is gone already is as good
        anyio.run(lambda: leases(server).remove("a", record, timeout=1))
    with pytest.raises(Conflict):
        anyio.run(lambda: leases(server).remove("a", record, timeout=1))
    assert [(each["method"], each["path"]) for each in server.asked] == [("DELETE", f"{PATH}/agentfleet-a")] * 3
    assert server.asked[0]["body"] == {"preconditions": {"uid": "u1", "resourceVersion": "17"}}


def test_other_refusals_stay_what_they_are() -> None:
    with pytest.raises(Invalid):
        anyio.run(lambda: leases(Server(Invalid("no", ("spec",)))).update("a", LeaseRecord("me", 1), timeout=1))


def test_dates_are_in_utc_wherever_the_machine_is() -> None:
    server = Server(LEASE)
    there = datetime(2026, 11, 5, 23, 30, 0, 0, tzinfo=timezone(timedelta(hours=9)))
    anyio.run(lambda: leases(server, there).create("a", LeaseRecord("me", 1, 7.0), timeout=1))
    assert server.asked[0]["body"]["spec"]["renewTime"] == "2026-11-05T14:30:00.000000Z"


def test_a_renewal_is_a_change_also_when_the_wall_clock_stands_still() -> None:
    server = Server(LEASE)
    last = "2026-11-05T12:34:56.000007Z"
    anyio.run(lambda: leases(server).update("a", LeaseRecord("me", 3, 7.0, last, "17", "u1"), timeout=1))
    assert server.asked[0]["body"]["spec"]["renewTime"] == "2026-11-05T12:34:56.000008Z"


def test_many_leases_share_a_few_connections_and_waiting_counts() -> None:
    class Slow(Server):
        under_way = most = 0

        async def request(
            self,
            method: str,
            path: str,
            *,
            query: Mapping[str, str | int | bool] | None = None,
            body: bytes | None = None,
            content_type: str = "application/json",
            timeout: float | None = None,
            idempotent: bool | None = None,
        ) -> bytes:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            try:
                await anyio.sleep(1.0)
            finally:
                self.under_way -= 1
            return json.dumps(LEASE).encode()

    async def main() -> None:
        server, late, served = Slow(), [], []
        store = leases(server)

        async def ask(number: int) -> None:
            try:
                served.append(await store.get(f"f{number}", timeout=2.5))
            except DeadlineExceeded:
                late.append(anyio.current_time())

        async with anyio.create_task_group() as group:
            for number in range(20):
                group.start_soon(ask, number)
        assert server.most == 8
        assert len(served) == 16
        assert late == [2.5] * 4

    run_virtual(main)
