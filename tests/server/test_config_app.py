"""Configuration over HTTP, by a real server: who is sent what, what is said back, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import anyio
import pytest

pytest.importorskip("uvicorn")

from tests.server.serving import KEY, WHY, Site, ask, everybody, serving, site, streaming, until

from agentfleet import ConfigError, ConfigRollout, ConfigStore, delivery
from agentfleet.delivery import ConfigDelivery, ConfigStream, Parcel
from agentfleet.server.config import ConfigApp, Refusal
from agentfleet.stores.acks import ConfigAck, MemoryAcks
from agentfleet.stores.config import ConfigRevision, RolloutRecord
from agentfleet.stores.config_memory import MemoryConfig

pytestmark = [pytest.mark.anyio, pytest.mark.integration]
BASE = f"/api/v1/clusters/{KEY}/config"


@pytest.fixture
def anyio_backend() -> str:
    """The server runs on asyncio."""
    return "asyncio"


async def roll_out(made: Site, *members: str, phase: str = "progressing") -> None:
    """Have the newest revision be on trial with these."""
    newest = await made.store.get(KEY)
    record = await made.store.rollout(KEY)
    version = 0 if record is None else record.version
    trials: dict[str, Any] = {member: [] for member in members}
    await made.store.advance(
        RolloutRecord(KEY, version + 1, newest.revision, newest.base, phase, trials), expect=version
    )


# ------------------------------------------------------------------------------------------------ the stream


async def test_a_subscriber_is_sent_what_is_there_and_then_each_change() -> None:
    async with site() as made:
        await made.put(n=1)
        async with streaming(made.address, "instance=a") as stream:
            assert "200 OK" in stream.head
            assert "text/event-stream" in stream.head
            assert await stream.event() == (1, {"n": 1})
            for number in range(2, 6):
                await made.put(n=number)
                assert await stream.event() == (number, {"n": number})


async def test_who_subscribes_before_there_is_anything_waits() -> None:
    async with site() as made, streaming(made.address, "instance=a") as stream:
        assert (await stream.frame()).startswith("retry: 1000\n")
        await made.put(n=1)
        assert await stream.event() == (1, {"n": 1})


async def test_who_comes_back_is_sent_only_what_is_newer() -> None:
    """By what he runs, and by what he has judged since."""
    async with site() as made:
        for number in range(1, 4):
            await made.put(n=number)
        async with (
            streaming(made.address, "instance=a&running=3") as current,
            streaming(made.address, "instance=b&running=1") as behind,
            streaming(made.address, "instance=c&running=1&refused=3") as refused,
            streaming(made.address, "instance=d&running=9") as ahead,
        ):
            assert await behind.event() == (3, {"n": 3})
            assert (await made.said("c", 1, 3)).via == "stream"
            await made.put(n=4)
            for stream in (current, behind, refused):
                assert await stream.event() == (4, {"n": 4})
            for number in range(5, 11):
                await made.put(n=number)
            assert (await ahead.event())[0] == 10, "nobody is sent back"


async def test_of_changes_that_come_too_fast_the_newest_is_sent() -> None:
    """Who cannot keep up is not sent each of them; he ends where all do."""
    async with site() as made, streaming(made.address, "instance=a") as stream:
        for number in range(1, 201):
            await made.put(n=number)
        while (await stream.event())[0] < 200:
            pass
        numbers = [revision for revision, _ in stream.events]
        assert numbers == sorted(set(numbers))


async def test_what_is_on_trial_goes_to_its_members_alone() -> None:
    async with site() as made:
        await made.put(n=1)
        await made.store.put(KEY, {"n": 2}, rollout=ConfigRollout(rings=(1, "100%")), **WHY)
        async with streaming(made.address, "instance=a") as first, streaming(made.address, "instance=b") as second:
            assert await first.event() == await second.event() == (1, {"n": 1})
            await roll_out(made, "a")
            assert await first.event() == (2, {"n": 2})
            async with streaming(made.address, "instance=new") as third:
                assert await third.event() == (1, {"n": 1})
                await roll_out(made, "a", "b")
                assert await second.event() == (2, {"n": 2})
                await roll_out(made, phase="complete")
                assert await third.event() == (2, {"n": 2})
            back = await made.store.rollback(KEY, 1, **WHY)
            assert await first.event() == await second.event() == (back.revision, {"n": 1})


async def test_each_revision_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made_of: list[int] = []

    def of(revision: ConfigRevision) -> Parcel:
        made_of.append(revision.revision)
        return encode(revision)

    encode = Parcel.of
    monkeypatch.setattr(Parcel, "of", of)
    async with site() as made, anyio.create_task_group() as tasks:

        async def read(name: str) -> None:
            async with streaming(made.address, f"instance={name}") as stream:
                while (await stream.event())[0] < 5:
                    pass

        for number in range(30):
            tasks.start_soon(read, f"a-{number}")
        await until(lambda: len(made.delivery) == 30)
        for number in range(5):
            await made.put(n=number)
    assert made_of == sorted(set(made_of))


async def test_a_stream_shows_that_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "BEAT", 0.1)
    async with site() as made, streaming(made.address, "instance=a") as stream:
        assert (await stream.frame()).startswith("retry:")
        for _ in range(3):
            assert await stream.frame() == ":\n\n"


async def test_the_later_stream_of_an_instance_takes_the_place_of_the_earlier() -> None:
    async with site() as made:
        await made.put(n=1)
        async with streaming(made.address, "instance=a") as first:
            await first.event()
            async with streaming(made.address, "instance=a&running=1") as second:
                assert await first.ended()
                assert len(made.delivery) == 1
                await made.put(n=2)
                assert await second.event() == (2, {"n": 2})


async def test_who_leaves_is_forgotten() -> None:
    async with site() as made:
        async with streaming(made.address, "instance=a") as stream:
            await stream.frame()
            assert len(made.delivery) == 1
        await until(lambda: len(made.delivery) == 0)


async def test_there_are_only_so_many_streams() -> None:
    async with site(limit=2) as made, streaming(made.address, "instance=a"), streaming(made.address, "instance=b"):
        refused = await ask(made.address, "GET", f"{BASE}/stream?instance=c")
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        async with streaming(made.address, "instance=a") as again:
            assert "200 OK" in again.head


async def test_a_client_that_takes_nothing_is_cut_off_and_delays_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "BEAT", 0.05)
    monkeypatch.setattr(delivery, "_STUCK", 0.5)
    async with (
        site() as made,
        streaming(made.address, "instance=stuck") as stuck,
        streaming(made.address, "instance=a") as stream,
    ):
        await stuck.frame()
        for number in range(1, 30):  # more than all the buffers on the way
            await made.put(n=number, text="x" * 900_000)
            assert (await stream.event())[0] == number
        await until(lambda: len(made.delivery) == 1)
        stuck.writer.transport.abort()


class Unreachable(MemoryConfig):
    """Records that cannot be reached at times."""

    down = False

    async def newest(self, key: str) -> ConfigRevision | None:
        if self.down:
            raise ConfigError("the database is down")
        return await super().newest(key)


async def test_while_the_store_is_out_of_reach_what_is_known_is_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "_RETRY", 0.05)
    records = Unreachable()
    store = ConfigStore(records)
    await store.put(KEY, {"n": 1}, **WHY)
    async with site(store) as made:
        async with streaming(made.address, "instance=a") as first:
            assert await first.event() == (1, {"n": 1})
            await records.append(ConfigRevision(KEY, 2, '{"n":2}', 0.0, "ann", "because"), expect=1)
            assert await first.event() == (2, {"n": 2})
            records.down = True
            await records.append(ConfigRevision(KEY, 3, '{"n":3}', 0.0, "ann", "because"), expect=2)
            await until(lambda: made.delivery.failing is not None)
            async with streaming(made.address, "instance=b") as second:
                assert await second.event() == (2, {"n": 2})
                records.down = False
                assert await first.event() == await second.event() == (3, {"n": 3})
        assert made.delivery.failing is None


async def test_before_anything_is_known_who_asks_is_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentfleet.server.config._TIMEOUT", 0.05)
    records = Unreachable()
    records.down = True
    async with site(ConfigStore(records)) as made:
        reply = await ask(made.address, "GET", f"{BASE}?instance=a")
        assert (reply.status, reply.headers["retry-after"]) == (503, "2")
        assert "the database is down" not in reply.json["detail"], "that is the log's"
        assert not made.delivery.ready
        async with streaming(made.address, "instance=a") as stream:
            records.down = False
            await made.put(n=1)
            assert await stream.event() == (1, {"n": 1})


# ------------------------------------------------------------------------------------------------ questions and answers


async def test_who_asks_now_and_then_is_told_what_has_changed() -> None:
    async with site() as made:
        nothing = await ask(made.address, "GET", f"{BASE}?instance=a")
        assert (nothing.status, nothing.headers["content-type"]) == (404, "application/problem+json")
        await made.put(n=1)
        first = await ask(made.address, "GET", f"{BASE}?instance=a&running=0")
        assert (first.status, first.headers["etag"], first.json) == (200, '"1"', {"revision": 1, "document": {"n": 1}})
        same = await ask(made.address, "GET", f"{BASE}?instance=a&running=1", headers={"If-None-Match": '"1"'})
        assert (same.status, same.body) == (304, b"")
        assert (await made.said("a", 1)).via == "poll"
        await made.put(n=2)
        assert (await ask(made.address, "GET", f"{BASE}?instance=a", headers={"If-None-Match": '"1"'})).status == 200
        refused = await ask(
            made.address, "GET", f"{BASE}?instance=a&running=1&refused=2", headers={"If-None-Match": '"2"'}
        )
        assert refused.status == 304
        await made.said("a", 1, 2)


async def test_a_browsers_client_that_comes_back_refuses_nothing() -> None:
    """An EventSource asks for the same address each time, with what it runs as of then; it says the rest by acks."""
    async with site() as made:
        for number in range(1, 8):
            await made.put(n=number)
        again = "instance=a&running=6"
        async with streaming(made.address, again) as first:
            assert (await first.event())[0] == 7
        assert made.delivery.book.known["a"].answered == 6
        async with streaming(made.address, again, {"Last-Event-ID": "7"}) as second:
            await second.frame()
            assert made.delivery.book.known["a"].answered == 6, "it has read 7, and said nothing of it"
        for said in ({"revision": 7}, {"revision": 6, "refused": 7, "why": "no"}):
            await ask(made.address, "POST", f"{BASE}/acks", {"instance": "a", **said})
            ack = made.delivery.book.known["a"]
            async with streaming(made.address, again, {"Last-Event-ID": "7"}) as later:
                await later.frame()
                kept = made.delivery.book.known["a"]
                assert (kept.revision, kept.refused, kept.why) == (ack.revision, ack.refused, ack.why)
        async with streaming(made.address, again, {"Last-Event-ID": "7"}) as last:
            newest = await made.put(n=8)
            assert (await last.event())[0] == newest, "what it has read is not sent again"
        async with streaming(made.address, "instance=a&running=0") as restarted:
            assert (await restarted.event())[0] == newest
            assert made.delivery.book.known["a"].answered == 0, "another process runs nothing yet"


async def test_a_cache_that_asks_whether_something_is_new_refuses_nothing() -> None:
    async with site() as made:
        for number in range(1, 8):
            await made.put(n=number)
        path = f"{BASE}?instance=a&running=6"
        for tags in ('"7"', 'W/"7"', '"6", "7"'):
            assert (await ask(made.address, "GET", path, headers={"If-None-Match": tags})).status == 304
            assert made.delivery.book.known["a"].answered == 6
        await ask(made.address, "POST", f"{BASE}/acks", {"instance": "a", "revision": 7, "via": "poll"})
        await ask(made.address, "GET", path, headers={"If-None-Match": '"7"'})
        known = made.delivery.book.known["a"]
        assert (known.revision, known.refused) == (7, 0)


async def test_what_instances_say_is_kept() -> None:
    async with site() as made:
        for number in range(7):
            await made.put(n=number)
        said = {"instance": "a", "revision": 6, "refused": 7, "why": "no such\x00model \ud800"}
        assert (await ask(made.address, "POST", f"{BASE}/acks", said)).status == 204
        ack = await made.said("a", 6, 7)
        assert (ack.via, ack.why) == ("stream", "no such\N{REPLACEMENT CHARACTER}model ?")
        assert ack.at > 0
        async with streaming(made.address, "instance=a&running=6", {"Last-Event-ID": "7"}):
            await asyncio.sleep(0)
            assert made.delivery.book.known["a"].why == ack.why, "who comes back has not changed his mind"


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "detail"),
    [
        ("GET", f"{BASE}/stream", None, {}, 400, "instance: must be the id"),
        ("GET", f"{BASE}/stream?instance=", None, {}, 400, "instance: must be the id"),
        ("GET", f"{BASE}/stream?instance=a%00b", None, {}, 400, "instance: must be the id"),
        ("GET", f"{BASE}/stream?instance={'x' * 254}", None, {}, 400, "instance: must be the id"),
        ("GET", f"{BASE}/stream?instance=a&running=-1", None, {}, 400, "running: must be the number"),
        ("GET", f"{BASE}/stream?instance=a&running=1e3", None, {}, 400, "running: must be the number"),
        ("GET", f"{BASE}/stream?instance=a&running={2**63}", None, {}, 400, "running: must be the number"),
        ("GET", f"{BASE}/stream?instance=a", None, {"Last-Event-ID": "x"}, 400, "Last-Event-ID: must be"),
        ("GET", f"{BASE}/stream?instance=a&refused=x", None, {}, 400, "refused: must be the number"),
        ("GET", f"{BASE}?instance=a&refused=7", None, {}, 400, "refused: say in 'running'"),
        ("POST", f"{BASE}/stream?instance=a", None, {}, 405, "use GET"),
        ("PUT", f"{BASE}?instance=a", None, {}, 405, "use GET"),
        ("GET", f"{BASE}/acks", None, {}, 405, "use POST"),
        ("GET", "/api/v1/clusters/others/config?instance=a", None, {}, 404, "no cluster 'others'"),
        ("GET", "/api/v1/clusters/a/b/config?instance=a", None, {}, 404, "no such path"),
        ("GET", "/elsewhere", None, {}, 404, "no such path"),
        ("POST", f"{BASE}/acks", b"{", {}, 422, "must be JSON"),
        ("POST", f"{BASE}/acks", b"[" * 10_000, {}, 422, "must be JSON"),
        ("POST", f"{BASE}/acks", [], {}, 422, "JSON object"),
        ("POST", f"{BASE}/acks", {"revision": 1}, {}, 400, "instance: must be"),
        ("POST", f"{BASE}/acks", {"instance": "a", "revision": -1}, {}, 422, "revision: must be the number"),
        ("POST", f"{BASE}/acks", {"instance": "a", "revision": True}, {}, 422, "revision: must be the number"),
        ("POST", f"{BASE}/acks", {"instance": "a", "refused": 2**63}, {}, 422, "refused: must be the number"),
        ("POST", f"{BASE}/acks", {"instance": "a", "why": 3}, {}, 422, "why: must be text"),
        ("POST", f"{BASE}/acks", {"instance": "a", "via": "pigeon"}, {}, 422, "via: must be"),
        ("POST", f"{BASE}/acks", {"instance": "a", "revison": 1}, {}, 422, "revison: is not known"),
        ("POST", f"{BASE}/acks", b"x" * 20_000, {}, 413, "at most 16384 bytes"),
    ],
)
async def test_what_is_wrong_is_said_by_name(  # noqa: PLR0917 - as pytest has it
    method: str, path: str, body: object, headers: dict[str, str], status: int, detail: str
) -> None:
    async with site() as made:
        reply = await ask(made.address, method, path, body, headers)
        assert (reply.status, reply.headers["content-type"]) == (status, "application/problem+json")
        assert detail in reply.json["detail"]
        assert reply.json["status"] == status
        assert not made.delivery.book.known


async def test_each_request_is_judged_by_whom_it_speaks_for() -> None:
    asked: list[tuple[str, str]] = []

    async def authorize(scope: Any, cluster: str, instance: str) -> None:
        asked.append((cluster, instance))
        given = dict(scope["headers"]).get(b"authorization")
        if given is None:
            raise Refusal(401, "a bearer token is needed", {"www-authenticate": "Bearer"})
        if given != f"Bearer {instance}".encode():
            raise Refusal(403, "this token is another instance's")

    async with site(authorize=authorize) as made:
        await made.put(n=1)
        mine, other = {"Authorization": "Bearer a"}, {"Authorization": "Bearer b"}
        for headers, status in (({}, 401), (other, 403)):
            for method, path, body in (
                ("GET", f"{BASE}?instance=a&running=7", None),
                ("GET", f"{BASE}/stream?instance=a&running=7", None),
                ("POST", f"{BASE}/acks", {"instance": "a", "revision": 7}),
            ):
                reply = await ask(made.address, method, path, body, headers)
                assert reply.status == status
                assert ("www-authenticate" in reply.headers) is (status == 401)
        assert not made.delivery.book.known
        assert (await ask(made.address, "GET", f"{BASE}?instance=a", None, mine)).status == 200
        assert set(asked) == {(KEY, "a")}
        unknown = await ask(made.address, "GET", "/api/v1/clusters/others/config?instance=a")
        assert unknown.status == 401, "who may not ask is not told which clusters there are"


async def test_it_is_mounted_beside_other_routes() -> None:
    """Below a path of its own, and telling its requests from those of people."""
    store = ConfigStore()
    await store.put(KEY, {"n": 1}, **WHY)
    made = ConfigDelivery(store, KEY, MemoryAcks())
    app = ConfigApp({KEY: made}.get, everybody)

    async def host(scope: Any, receive: Any, send: Any) -> None:
        scope = dict(scope) | {"root_path": "/fleet"}
        if app.claims(scope):
            await app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 418, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with anyio.create_task_group() as tasks:
        await tasks.start(made.run)
        async with serving(host) as address:
            assert (await ask(address, "GET", f"/fleet{BASE}?instance=a")).json["revision"] == 1
            assert (await ask(address, "GET", f"/fleet{BASE}")).status == 400
            assert (await ask(address, "GET", "/fleet/api/v1/clusters")).status == 418
        tasks.cancel_scope.cancel()


async def test_when_the_delivery_ends_its_streams_end_and_new_ones_are_refused() -> None:
    store = ConfigStore()
    made = ConfigDelivery(store, KEY, MemoryAcks())
    async with serving(ConfigApp({KEY: made}.get, everybody)) as address:
        async with anyio.create_task_group() as tasks:
            await tasks.start(made.run)
            async with streaming(address, "instance=a") as stream:
                await stream.frame()
                tasks.cancel_scope.cancel()
                assert await stream.ended()
        assert (await ask(address, "GET", f"{BASE}/stream?instance=a")).status == 503


async def test_two_managers_deliver_the_same() -> None:
    """What one is told is stored, and delivered by both; what instances say to either is known."""
    records, acks = MemoryConfig(), MemoryAcks()
    async with (
        site(ConfigStore(records), acks) as one,
        site(ConfigStore(records), acks) as other,
        streaming(one.address, "instance=a") as first,
        streaming(other.address, "instance=b") as second,
    ):
        await one.put(n=1)
        assert await first.event() == await second.event() == (1, {"n": 1})
        await ask(one.address, "POST", f"{BASE}/acks", {"instance": "a", "revision": 1})
        await ask(other.address, "POST", f"{BASE}/acks", {"instance": "b", "revision": 1})
        for each in (one, other):
            await until(lambda each=each: runs(each) == {"a": 1, "b": 1})  # type: ignore[misc]


def runs(made: Site) -> dict[str, int]:
    return {id: ack.revision for id, ack in made.delivery.book.known.items()}


async def test_a_stream_is_spread_by_how_many_there_are() -> None:
    made = ConfigDelivery(ConfigStore(), KEY, MemoryAcks())
    spans: Sequence[float] = []
    for count in (0, 100, 1000, 2000, 10_000):
        made._streams = {str(number): ConfigStream(made, "", 0, b"") for number in range(count)}
        spans = [*spans, made.spread]
    assert spans == [1.0, 1.0, 4.0, 8.0, 30.0]


async def test_what_goes_out_is_one_line() -> None:
    text = json.dumps({"a": "two\nlines\r\u2028"}, ensure_ascii=False)
    parcel = Parcel.of(ConfigRevision(KEY, 7, text, 0.0, "", ""))
    assert parcel.frame.count(b"\n") == 4
    assert b"\r" not in parcel.frame
    assert json.loads(parcel.body) == {"revision": 7, "document": {"a": "two\nlines\r\u2028"}}
    assert ConfigAck("a", 3, 5).answered == 5
