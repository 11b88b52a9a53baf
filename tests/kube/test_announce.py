"""Kubernetes Events: what is told of the journal, in which words, and what becomes of it when nobody can listen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("kubernetes_asyncio")

from tests.kube.test_config_map import Empty, configured

from agentfleet import Event
from agentfleet.backends.base import Workload
from agentfleet.backends.kubernetes import Connection
from agentfleet.backends.kubernetes import announcer as announcer_module
from agentfleet.backends.kubernetes.announcer import Announced, Announcer
from agentfleet.backends.kubernetes.backend import KubernetesBackend
from agentfleet.backends.kubernetes.errors import AlreadyExists, NotFound
from agentfleet.backends.kubernetes.notices import KINDS, Regarding, body_of, message_about, notice_of, repeat_of
from agentfleet.errors import BackendUnavailable
from agentfleet.testing import run_virtual

DEPLOYMENT = Regarding("Deployment", "ai", "agents", "d-1")
POD = Regarding("Pod", "ai", "agents-abc", "p-1")


def event(kind: str = "fleet.stopped", *, instance: str | None = None, seq: int = 7, **data: Any) -> Event:
    return Event(1_700_000_000.25, "agents", kind, instance, data, seq=seq)


# ------------------------------------------------------------------------------------------------ words


def test_every_kind_that_is_told_is_one_that_fleets_journal() -> None:
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "events.md").read_text()
    assert not [kind for kind in KINDS if f"| `{kind}` |" not in page]
    page = (docs / "kubernetes.md").read_text()
    assert not [kind.reason for kind in KINDS.values() if kind.reason not in page]


@pytest.mark.parametrize("kind", ["instance.ready", "state.fleet", "manager.started", "task.submitted", "note.lunch"])
def test_what_is_no_action_is_not_told(kind: str) -> None:
    assert notice_of(event(kind)) is None


def test_the_message_is_what_was_done_and_why() -> None:
    reasons = ({"code": "scaling.cpu", "text": "cpu is at 91 % of 70 %.", "numbers": {}}, {"text": "at most 12"})
    told = Event(0.0, "agents", "fleet.scaled", None, {"from": 4, "to": 6, "by": "scaling"}, reasons)
    notice = notice_of(told)
    assert notice is not None
    assert notice.message == "size 4 becomes 6, by scaling: cpu is at 91 % of 70 %; at most 12"
    assert (notice.reason, notice.warning) == ("Scaled", False)


def test_the_body_is_what_the_api_asks_for() -> None:
    notice = notice_of(event("instance.exited", instance="agents-abc", exit_code=137, seq=255))
    assert notice is not None
    assert body_of(notice, POD, "manager-0") == {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"agents-abc.{1_700_000_000_250_000:x}.ff",
            "namespace": "ai",
            "labels": {"agentfleet.io/fleet": "agents"},
        },
        "involvedObject": {"apiVersion": "v1", "kind": "Pod", "namespace": "ai", "name": "agents-abc", "uid": "p-1"},
        "reason": "Exited",
        "action": "Observe",
        "message": "its process has ended with exit code 137",
        "type": "Warning",
        "source": {"component": "agentfleet", "host": "manager-0"},
        "reportingComponent": "agentfleet",
        "reportingInstance": "manager-0",
        "eventTime": "2023-11-14T22:13:20.250000Z",
        "firstTimestamp": "2023-11-14T22:13:20Z",
        "lastTimestamp": "2023-11-14T22:13:20Z",
        "count": 1,
    }
    assert repeat_of(notice, 3) == {"count": 3, "lastTimestamp": "2023-11-14T22:13:20Z"}


def test_what_is_told_about_the_deployment_names_the_instance() -> None:
    notice = notice_of(event("recovery.replace", instance="agents-gone"))
    assert notice is not None
    assert message_about(notice, DEPLOYMENT) == "agents-gone: replaced"


@given(
    st.sampled_from(sorted(KINDS)),
    st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.floats() | st.text()),
    st.lists(st.text(max_size=2000), max_size=3),
)
def test_whatever_an_event_holds_the_api_takes_it(kind: str, data: Mapping[str, Any], texts: list[str]) -> None:
    reasons = tuple({"code": "x", "text": text} for text in texts)
    notice = notice_of(Event(0.0, "agents", kind, "agents-" + "x" * 240, data, reasons, seq=1))
    assert notice is not None
    for regarding in (POD, DEPLOYMENT):
        body = body_of(notice, regarding, "h" * 300)
        assert len(body["message"].encode()) <= 1024
        assert len(body["metadata"]["name"]) <= 253
        assert len(body["reportingInstance"]) <= 128
        json.dumps(body).encode()


# ------------------------------------------------------------------------------------------------ sending


class Server:
    """Takes Events, or does not."""

    def __init__(self) -> None:
        self.events: dict[str, dict[str, Any]] = {}
        self.error: Exception | None = None
        self.answering = anyio.Event()
        self.answering.set()

    async def request(self, method: str, path: str, *, body: bytes | None = None, **_: object) -> bytes:
        await self.answering.wait()
        if self.error is not None:
            raise self.error
        sent = json.loads(body or b"{}")
        if method == "PATCH":
            if path not in self.events:
                raise NotFound("gone", "PATCH", 404)
            self.events[path] |= sent
        else:
            name = f"{path}/{sent['metadata']['name']}"
            if name in self.events:
                raise AlreadyExists("there", "POST", 409)
            self.events[name] = sent
        return b"{}"

    def stream(self, path: str, **_: object) -> AbstractAsyncContextManager[Any]:
        raise NotImplementedError

    def told(self) -> list[tuple[str, int]]:
        return [(each["message"], each["count"]) for each in self.events.values()]


def known(fleet: str, instance: str | None) -> Regarding | None:
    return DEPLOYMENT if instance is None else POD if instance == POD.name else None


def test_a_manager_that_is_cancelled_amid_its_last_words_just_ends() -> None:
    async def main() -> None:
        server = Server()
        server.answering = anyio.Event()
        announcer = Announcer(server, known)
        with anyio.CancelScope() as scope:
            async with announcer:
                announcer.announce(event())
                scope.cancel()
                await anyio.lowlevel.checkpoint()
        assert scope.cancelled_caught
        assert announcer.announced.dropped == 1

    run_virtual(main)


def test_repeats_are_counted_and_written_anew_when_the_event_is_gone() -> None:
    async def main() -> None:
        server = Server()
        async with Announcer(server, known) as announcer:
            for seq in range(3):
                announcer.announce(event("fleet.paused", seq=seq))
            announcer.announce(event("fleet.resumed", seq=3))
            await announcer.idle()
            assert server.told() == [("rollouts are held until they are resumed", 3), ("rollouts go on", 1)]
            server.events.clear()  # they go after an hour
            announcer.announce(event("fleet.paused", seq=4))
            await announcer.idle()
            assert [count for _, count in server.told()] == [1]
        assert announcer.announced == Announced(written=3, counted=2)

    run_virtual(main)


def test_one_object_has_25_and_then_one_in_five_minutes() -> None:
    async def main() -> None:
        server = Server()
        async with Announcer(server, known) as announcer:
            for seq in range(30):
                announcer.announce(event("action.failed", instance="agents", action="apply", message=str(seq), seq=seq))
            announcer.announce(event("instance.lost", instance=POD.name))
            await announcer.idle()
            assert announcer.announced == Announced(written=26, limited=5), "another object has its own budget"
            await anyio.sleep(301)
            announcer.announce(event("fleet.stopped"))
            announcer.announce(event("fleet.started"))
            await announcer.idle()
            assert announcer.announced == Announced(written=27, limited=6)

    run_virtual(main)


def test_a_server_that_does_not_answer_costs_events_and_no_time(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        server = Server()
        server.answering = anyio.Event()

        def many(fleet: str, instance: str | None) -> Regarding | None:
            return Regarding("Pod", "ai", instance or "agents", instance or "d")

        async with Announcer(server, many) as announcer:
            for seq in range(1500):
                announcer.announce(event("instance.lost", instance=f"agents-{seq}", seq=seq))
            assert announcer.announced.dropped == 500
            began = anyio.current_time()
        assert anyio.current_time() - began <= 1.0, "closing waits no longer than this"
        assert announcer.announced.lost == 1500

    run_virtual(main)
    assert len(caplog.records) == 1
    assert "Events are being lost" in caplog.text


def test_a_turn_that_comes_as_it_closes_ends_nothing_but_the_announcer() -> None:
    """The second may be written after a second, which is when the last words are over."""

    async def main() -> None:
        announcer = Announcer(Server(), known, rate=(1.0, 1))
        async with announcer:
            for seq in range(3):
                announcer.announce(event("fleet.deployed", replicas=seq, revision=1, seq=seq))
        assert announcer.announced.written + announcer.announced.lost == 3

    run_virtual(main)


def test_what_fails_is_lost_and_counted_and_the_next_is_written() -> None:
    async def main() -> None:
        server = Server()
        async with Announcer(server, known) as announcer:
            server.error = BackendUnavailable("no route")
            announcer.announce(event("fleet.stopped"))
            await announcer.idle()
            server.error = None
            announcer.announce(event("fleet.started", replicas=3))
            await announcer.idle()
            assert announcer.announced == Announced(written=1, failed=1, error="no route")

    run_virtual(main)


def test_what_comes_before_the_deployment_is_told_when_it_exists() -> None:
    async def main() -> None:
        server = Server()
        async with Announcer(server, lambda *_: None) as announcer:
            for seq in range(20):
                announcer.announce(event("fleet.deployed", replicas=seq, revision=1, seq=seq))
            await announcer.idle()
            assert not server.events
            announcer.appeared("agents", DEPLOYMENT)
            await announcer.idle()
            assert announcer.announced == Announced(written=16, dropped=4)

    run_virtual(main)


def test_what_waits_for_a_deployment_goes_with_the_fleet() -> None:
    """The next Deployment of its name is another fleet's."""

    async def main() -> None:
        server = Server()
        async with Announcer(server, lambda *_: None) as announcer:
            for seq in range(3):
                announcer.announce(event("fleet.deployed", replicas=seq, revision=1, seq=seq))
            announcer.deleted("agents")
            announcer.deleted("unheard of")
            announcer.appeared("agents", DEPLOYMENT)
            await announcer.idle()
            assert not server.events
            assert announcer.announced == Announced(dropped=3)

    run_virtual(main)


def test_a_backend_that_deletes_a_fleet_tells_the_next_of_its_name_nothing_of_it() -> None:
    async def main() -> None:
        fleet = configured(2)
        async with KubernetesBackend(cast("Connection", Empty())) as backend:
            for _ in range(2):
                backend.announce(event("fleet.stopped"))
                await backend.delete(fleet.name)
            await backend.apply(Workload(fleet, 1, fleet.template, 2))
            await anyio.sleep(1)
            assert backend.announced == Announced(dropped=2)

    run_virtual(main)


def test_only_so_many_fleets_are_waited_for() -> None:
    """Some never get a Deployment: whoever has waited longest makes room."""

    async def main() -> None:
        server = Server()
        async with Announcer(server, lambda *_: None) as announcer:
            for number in range(announcer_module._EARLY_FLEETS + 2):
                for seq in range(2):
                    announcer.announce(replace(event("fleet.stopped", seq=seq), fleet=f"agents-{number}"))
            assert len(announcer._early) == announcer_module._EARLY_FLEETS
            assert announcer.announced == Announced(dropped=4)
            for number in (0, 1, 2):
                announcer.appeared(f"agents-{number}", replace(DEPLOYMENT, uid=f"d-{number}", name=f"agents-{number}"))
            await announcer.idle()
            assert {each["involvedObject"]["name"] for each in server.events.values()} == {"agents-2"}

    run_virtual(main)


def test_a_write_that_was_done_already_is_success() -> None:
    async def main() -> None:
        server = Server()
        async with Announcer(server, known) as first:
            first.announce(event("fleet.stopped"))
        async with Announcer(server, known) as second:
            second.announce(event("fleet.stopped"))
            await second.idle()
            assert second.announced == Announced(written=1)
        assert len(server.events) == 1

    run_virtual(main)
