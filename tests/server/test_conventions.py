"""What holds for every route: problems, conditions, idempotency, pages, bounds."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from tests.server.asking import Reply
from tests.server.world import A_READER, B_ADMIN, OPERATOR, READER, TEMPLATE, World, world

from agentfleet.core.documents import write_path
from agentfleet.errors import (
    AgentFleetError,
    BackendRefused,
    BackendUnavailable,
    ConfigConflict,
    ConfigError,
    ConfigInvalid,
    ConfigNotFound,
    Conflict,
    DeadlineExceeded,
    InstanceGone,
    JournalError,
    KeyReused,
    MissingExtra,
    NotFound,
    NotLeader,
    OperationRefused,
    RolloutFailed,
    SpecError,
)
from agentfleet.operations import Operation
from agentfleet.server.admission import Admission
from agentfleet.server.limits import Limits
from agentfleet.server.problems import fields_of, refusal_of

pytestmark = pytest.mark.anyio
CLUSTERS = "/api/v1/clusters"
NAMES = (
    "plain",
    "a-b_c",
    "max tokens",
    "größe",
    "名",
    'a"b',
    "a\\b",
    'a": b',
    "a: b",
    "x.y",
    "",
    "line\nbreak",
    "\u2028",
    "(the whole)",
    "…",
    "[0]",
    "x" * 200,
)
"""Of fields, as nobody expects them."""

# ------------------------------------------------------------------------------------------------ problems


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (SpecError("replicas: must be whole"), 422, "invalid"),
        (NotFound("no"), 404, "not-found"),
        (ConfigNotFound("no"), 404, "not-found"),
        (InstanceGone("no"), 404, "not-found"),
        (OperationRefused("no"), 409, "refused"),
        (Conflict("no"), 409, "conflict"),
        (ConfigConflict("no"), 409, "conflict"),
        (ConfigInvalid("bad:\n  a: wrong"), 422, "invalid"),
        (KeyReused("no"), 422, "key-reused"),
        (NotLeader("no"), 503, "unavailable"),
        (BackendUnavailable("no"), 503, "unavailable"),
        (JournalError("no"), 503, "unavailable"),
        (ConfigError("no"), 503, "unavailable"),
        (DeadlineExceeded("no"), 504, "deadline-exceeded"),
        (BackendRefused("no"), 502, "engine-refused"),
        (MissingExtra("no"), 501, "not-installed"),
        (RolloutFailed("no"), 500, "internal"),
    ],
)
def test_every_error_has_its_status(error: AgentFleetError, status: int, kind: str) -> None:
    refusal = refusal_of(error)
    assert (refusal.status, refusal.kind) == (status, kind)
    assert ("Retry-After" in refusal.headers) == (status in (503, 504))


def test_a_conflict_with_what_was_expected_is_a_failed_precondition() -> None:
    assert refusal_of(Conflict("no"), conditional=True).status == 412
    assert refusal_of(OperationRefused("no"), conditional=True).status == 409


def test_fields_are_read_from_messages() -> None:
    found = fields_of("bad:\n  a.b: wrong\n  (the whole): min is more\n  … and 3 more")
    assert [each.field for each in found] == ["a.b", "min"]
    assert [each.field for each in fields_of("name: a fleet keeps its name")] == ["name"]
    assert [each.field for each in fields_of("replicas (5) is outside 1..3")] == ["replicas"]
    assert fields_of("nothing of that kind") == ()
    assert [each.field for each in fields_of('bad:\n  "max tokens".0."a\\": b": wrong: too')] == [
        '"max tokens".0."a\\": b"'
    ]


async def test_a_bug_is_a_problem_that_says_nothing_of_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with world(tmp_path) as here:

        async def broken(*_: Any, **__: Any) -> Any:
            raise ZeroDivisionError("secret")

        here.manager.fleets = broken  # type: ignore[method-assign]
        reply = await here.ask("GET", CLUSTERS)
    assert (reply.status, reply.kind) == (500, "internal")
    assert b"secret" not in reply.body
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/nothing", 404, "not-found"),
        ("GET", f"{CLUSTERS}/nobody", 404, "not-found"),
        ("GET", f"{CLUSTERS}/No_Name!", 404, "not-found"),
        ("GET", f"{CLUSTERS}/a%00b", 404, "not-found"),
        ("GET", "/api/v1/operations/none", 404, "not-found"),
        ("PATCH", CLUSTERS, 405, "method-not-allowed"),
        ("TRACE", CLUSTERS, 405, "method-not-allowed"),
        ("GET", f"{CLUSTERS}?limit=0", 422, "invalid"),
        ("GET", f"{CLUSTERS}?limit=many", 422, "invalid"),
        ("GET", f"{CLUSTERS}?cursor=AAAA", 422, "invalid"),
        ("GET", f"{CLUSTERS}?cursor=..", 422, "invalid"),
        ("GET", f"{CLUSTERS}/a/instances?status=%20", 422, "invalid"),
    ],
)
async def test_what_is_refused_is_a_problem(tmp_path: Path, method: str, path: str, status: int, kind: str) -> None:
    async with world(tmp_path) as here:
        await here.cluster()
        reply = await here.ask(method, path)
        assert (reply.status, reply.kind) == (status, kind), reply.body
        if status == 405:
            assert {"GET", "HEAD", "POST", "OPTIONS"} == set(reply.headers["allow"].split(", "))


async def test_head_and_options(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster()
        got, head = await here.ask("GET", f"{CLUSTERS}/a/revisions"), await here.ask("HEAD", f"{CLUSTERS}/a/revisions")
        assert (head.status, head.body) == (200, b"")
        assert (head.headers["etag"], head.headers["content-length"]) == (got.headers["etag"], str(len(got.body)))
        stream = await here.ask("HEAD", f"{CLUSTERS}/a/events/stream")
        assert (stream.status, stream.body) == (200, b"")
        options = await here.ask("OPTIONS", f"{CLUSTERS}/a/scale")
        assert (options.status, options.headers["allow"]) == (204, "OPTIONS, PUT")
        assert "access-control-allow-origin" not in options.headers


async def test_every_answer_has_its_headers(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        id = "1b4e28ba-2fa1-11d2-883f-0016d3cca427"
        for path in (CLUSTERS, "/nothing", "/livez"):
            reply = await here.ask("GET", path, headers={"X-Request-Id": id, "Origin": "https://elsewhere.example"})
            assert reply.headers["x-request-id"] == id
            assert reply.headers["x-content-type-options"] == "nosniff"
            assert reply.headers["cache-control"] == "no-store"
            assert "default-src 'none'" in reply.headers["content-security-policy"]
            assert "access-control-allow-origin" not in reply.headers
        other = await here.ask("GET", CLUSTERS, headers={"X-Request-Id": "<script>"})
        assert len(other.headers["x-request-id"]) == 36


# ------------------------------------------------------------------------------------------------ bodies and bounds


@pytest.mark.parametrize(
    ("raw", "headers", "status", "kind"),
    [
        (b"{", {}, 400, "malformed"),
        (b'{"replicas":1,"replicas":2}', {}, 400, "malformed"),
        (b'{"replicas":NaN}', {}, 400, "malformed"),
        (b"\xff\xfe", {}, 400, "malformed"),
        (b'{"replicas":1}', {"content-type": "text/plain"}, 415, "unsupported-media-type"),
        (b'{"replicas":1}', {"content-type": ""}, 415, "unsupported-media-type"),
        (b'{"replicas":1}', {"content-encoding": "gzip"}, 415, "unsupported-media-type"),
        (b"[" * 65 + b"]" * 65, {}, 400, "malformed"),
        (b"[" * 20_000, {}, 400, "malformed"),
        (b'{"a":"' + b"x" * 5000 + b'"}', {}, 413, "too-large"),
        (b'{"replicas":1}', {"accept": "text/html"}, 406, "not-acceptable"),
        (b'{"replicas":1}', {"x": "y" * 40_000}, 431, "headers-too-large"),
        (b"", {}, 422, "invalid"),
        (b"null", {}, 422, "invalid"),
        (b'"x"', {}, 422, "invalid"),
    ],
)
async def test_bodies_are_held_to_bounds(
    tmp_path: Path, raw: bytes, headers: dict[str, str], status: int, kind: str
) -> None:
    async with world(tmp_path, limits=Limits(body=4096 if b"xxx" in raw else 100_000)) as here:
        await here.cluster()
        reply = await here.ask("PUT", f"{CLUSTERS}/a/scale", raw=raw, headers=headers)
        assert (reply.status, reply.kind) == (status, kind), reply.body


async def test_a_size_of_a_billion_is_refused_by_name_and_changes_nothing(tmp_path: Path) -> None:
    """In a new cluster, in a whole new spec, and when it is scaled."""
    async with world(tmp_path) as here:
        await here.cluster()
        before = await here.ask("GET", f"{CLUSTERS}/a")
        asked_before = (await here.ask("GET", f"{CLUSTERS}/a/operations")).json["items"]
        for method, path, body in (
            ("PUT", f"{CLUSTERS}/a/scale", {"replicas": 10**9}),
            ("PUT", f"{CLUSTERS}/a", {"cluster_name": "a", "replicas": 10**9}),
            ("POST", CLUSTERS, {"cluster_name": "b", "replicas": 10**9}),
            ("POST", CLUSTERS, {"cluster_name": "b", "max_replicas": 10**9}),
        ):
            reply = await here.ask(method, path, body, headers={"If-Match": "*"} if path.endswith("/a") else {})
            assert (reply.status, reply.kind) == (422, "invalid"), reply.body
            (wrong,) = reply.json["errors"]
            assert wrong["field"] == list(body)[-1]
            assert "1000000" in wrong["message"]
        assert (await here.ask("GET", f"{CLUSTERS}/a/operations")).json["items"] == asked_before
        assert (await here.ask("GET", f"{CLUSTERS}/a")).headers["etag"] == before.headers["etag"]
        assert (await here.ask("GET", f"{CLUSTERS}/b")).status == 404


async def test_a_body_of_unknown_length_is_held_to_the_bound_as_well(tmp_path: Path) -> None:
    async with world(tmp_path, limits=Limits(body=1000)) as here:
        headers = {"transfer-encoding": "chunked", "content-type": "application/json"}
        reply = await here.ask("POST", CLUSTERS, headers=headers, chunks=[b"x" * 400] * 4)
        assert (reply.status, reply.kind) == (413, "too-large")


async def test_brackets_in_strings_do_not_nest(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster()
        asked = {"document": {"text": "[" * 500 + '"{' * 200}, "reason": "brackets"}
        assert (await here.ask("PUT", f"{CLUSTERS}/a/configuration", asked)).status == 200


async def test_a_slow_body_is_given_up(tmp_path: Path) -> None:
    async with world(tmp_path, limits=Limits(upload=0.05)) as here:
        headers = {"content-length": "100", "content-type": "application/json"}

        class Slow(list[bytes]):
            def __bool__(self) -> bool:
                return False

        reply = await here.ask("POST", CLUSTERS, headers=headers, chunks=Slow())
        assert (reply.status, reply.kind) == (408, "timeout")


async def test_what_takes_too_long_is_given_up(tmp_path: Path) -> None:
    async with world(tmp_path, limits=Limits(deadline=0.05)) as here:

        async def never(*_: Any, **__: Any) -> Any:
            await anyio.sleep_forever()

        here.manager.fleets = never  # type: ignore[method-assign]
        reply = await here.ask("GET", CLUSTERS)
        assert (reply.status, reply.kind, reply.headers["retry-after"]) == (504, "deadline-exceeded", "1")


async def test_too_many_at_once_are_refused_and_probes_never_are(tmp_path: Path) -> None:
    async with world(tmp_path, limits=Limits(at_once=1)) as here:
        entered, go_on = anyio.Event(), anyio.Event()

        async def slow(*_: Any, **__: Any) -> Any:
            entered.set()
            await go_on.wait()
            return []

        here.manager.fleets = slow  # type: ignore[method-assign]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(here.ask, "GET", CLUSTERS)
            await entered.wait()
            refused = await here.ask("GET", CLUSTERS)
            assert (refused.status, refused.kind) == (503, "unavailable")
            assert (await here.ask("GET", "/livez")).status == 200
            go_on.set()


# ------------------------------------------------------------------------------------------------ conditions


async def test_a_list_that_is_known_is_not_sent_again(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster()
        first = await here.ask("GET", f"{CLUSTERS}/a/revisions")
        same = await here.ask("GET", f"{CLUSTERS}/a/revisions", headers={"If-None-Match": first.headers["etag"]})
        assert (same.status, same.body, same.headers["etag"]) == (304, b"", first.headers["etag"])
        await here.finished(await here.ask("POST", f"{CLUSTERS}/a/deploy", {"version": "2"}))
        await here.until("a", lambda seen: seen["version"] == "2")
        changed = await here.ask("GET", f"{CLUSTERS}/a/revisions", headers={"If-None-Match": first.headers["etag"]})
        assert changed.status == 200


async def test_a_spec_changes_only_upon_the_one_that_was_read(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster()
        wanted = {"cluster_name": "a", "min_replicas": 2, "max_replicas": 9}
        read = await here.ask("GET", f"{CLUSTERS}/a")
        assert read.headers["etag"].startswith('"1.')
        blind = await here.ask("PUT", f"{CLUSTERS}/a", wanted)
        assert (blind.status, blind.kind) == (428, "precondition-required")
        taken = await here.ask("PUT", f"{CLUSTERS}/a", wanted, headers={"If-Match": read.headers["etag"]})
        assert (await here.finished(taken)).status == "succeeded"
        late = await here.ask("PUT", f"{CLUSTERS}/a", wanted, headers={"If-Match": read.headers["etag"]})
        assert (late.status, late.kind) == (412, "precondition-failed")
        odd = await here.ask("PUT", f"{CLUSTERS}/a", wanted, headers={"If-Match": 'W/"2"'})
        assert odd.status == 412
        anyway = await here.ask("PUT", f"{CLUSTERS}/a", wanted | {"max_replicas": 8}, headers={"If-Match": "*"})
        assert (await here.finished(anyway)).status == "succeeded"
        seen = await here.until("a", lambda seen: seen["generation"] == 3)
        assert seen["spec"]["scaling"]["max_replicas"] == 8


async def test_what_was_asked_since_a_cluster_was_read_is_not_undone_unseen(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster()
        for method, path, body in (
            ("POST", f"{CLUSTERS}/a/deploy", {"version": "2"}),
            ("PUT", f"{CLUSTERS}/a/scale", {"replicas": 3}),
            ("POST", f"{CLUSTERS}/a/rollback", {"revision": 1}),
        ):
            read = (await here.ask("GET", f"{CLUSTERS}/a")).headers["etag"]
            accepted = await here.ask(method, path, body, headers={"If-Match": read})
            late = await here.ask("PUT", f"{CLUSTERS}/a", {"cluster_name": "a"}, headers={"If-Match": read})
            assert (late.status, late.kind) == (412, "precondition-failed"), path
            await here.finished(accepted)
            late = await here.ask("PUT", f"{CLUSTERS}/a", {"cluster_name": "a"}, headers={"If-Match": read})
            assert late.status == 412, path
        read = (await here.ask("GET", f"{CLUSTERS}/a")).headers["etag"]
        await here.finished(await here.ask("POST", f"{CLUSTERS}/a/pause"))
        either = f'"7.7.abcdef01", {read}'
        taken = await here.ask("PUT", f"{CLUSTERS}/a", {"cluster_name": "a"}, headers={"If-Match": either})
        assert (await here.finished(taken)).status == "succeeded", "that asks for no other template or size"


async def test_who_reads_before_a_deployment_is_begun_has_not_seen_it(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster()
        record = await here.manager.get("a")

        async def pending(_: str) -> Any:
            return replace(record, asked=7, pending=True)

        here.manager.get = pending  # type: ignore[assignment, method-assign]
        read = (await here.ask("GET", f"{CLUSTERS}/a")).headers["etag"]
        late = await here.ask("PUT", f"{CLUSTERS}/a", {"cluster_name": "a"}, headers={"If-Match": read})
        assert (late.status, late.kind) == (412, "precondition-failed")


async def test_every_change_of_a_cluster_is_made_upon_what_it_is_said_to_be_based_on(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster()
        instance = (await here.instances())[0]
        before = (await here.ask("GET", f"{CLUSTERS}/a/operations")).json
        for method, path, body in (
            ("DELETE", "", None),
            ("PUT", "", {"cluster_name": "a"}),
            ("PUT", "/scale", {"replicas": 3}),
            ("POST", "/deploy", {"version": "2"}),
            ("POST", "/rollback", {"revision": 1}),
            *(("POST", f"/{each}", None) for each in ("pause", "resume", "stop", "start")),
            *(("POST", f"/instances/{instance}/{each}", None) for each in ("restart", "replace", "release")),
            ("POST", f"/instances/{instance}/isolate", {"reason": "look"}),
        ):
            wrong: list[dict[str, str]] = [{"If-Match": each} for each in ('"0"', '"1.9.abcdef01"', 'W/"1"', "1", "x")]
            for headers in (*wrong, {"If-None-Match": "*", "If-Match": "*"}):
                refused = await here.ask(method, f"{CLUSTERS}/a{path}", body, headers=headers)
                assert (refused.status, refused.kind) == (412, "precondition-failed"), (path, headers, refused.body)
        assert (await here.ask("GET", f"{CLUSTERS}/a/operations")).json == before
        read = (await here.ask("GET", f"{CLUSTERS}/a")).headers["etag"]
        assert (await here.ask("DELETE", f"{CLUSTERS}/a", headers={"If-Match": read})).status == 202


async def test_a_configuration_is_published_upon_what_is_there_or_is_not(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster()
        path, asked = f"{CLUSTERS}/a/configuration", {"document": {"n": 1}, "reason": "first"}
        none = await here.ask("PUT", path, asked, headers={"If-Match": "*"})
        assert (none.status, none.kind) == (412, "precondition-failed")
        assert (await here.ask("PUT", path, asked, headers={"If-None-Match": "*"})).json["revision"] == 1
        there = await here.ask("PUT", path, asked, headers={"If-None-Match": "*"})
        assert (there.status, there.kind) == (412, "precondition-failed")
        assert (await here.ask("PUT", path, asked, headers={"If-Match": "*"})).json["revision"] == 2
        late = await here.ask("PUT", path, asked | {"expect": 1})
        assert (late.status, late.kind) == (409, "conflict"), "no header says so"


async def test_a_cluster_keeps_its_name_and_place(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster()
        for change, field in (({"cluster_name": "z"}, "name"), ({"cluster_name": "a", "namespace": "z"}, "namespace")):
            reply = await here.ask("PUT", f"{CLUSTERS}/a", change, headers={"If-Match": "*"})
            assert (reply.status, reply.kind, reply.fields()) == (422, "invalid", [field])


async def test_the_same_key_is_the_same_operation(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster()
        key = {"Idempotency-Key": "k-1"}
        first = await here.ask("PUT", f"{CLUSTERS}/a/scale", {"replicas": 3}, headers=key)
        again = await here.ask("PUT", f"{CLUSTERS}/a/scale", {"replicas": 3}, headers=key)
        assert first.json == again.json
        other = await here.ask("PUT", f"{CLUSTERS}/a/scale", {"replicas": 4}, headers=key)
        assert (other.status, other.kind) == (422, "key-reused")
        bad = await here.ask("PUT", f"{CLUSTERS}/a/scale", {"replicas": 4}, headers={"Idempotency-Key": "two words"})
        assert (bad.status, bad.fields()) == (422, ["Idempotency-Key"])
        made = [
            await here.ask("POST", CLUSTERS, {"cluster_name": "twin"}, headers=key | {"Idempotency-Key": "c"})
            for _ in range(2)
        ]
        assert made[0].json == made[1].json
        twin = await here.ask("POST", CLUSTERS, {"cluster_name": "twin"})
        assert (twin.status, twin.kind) == (409, "refused")


async def test_what_was_done_under_a_key_is_told_again_whatever_has_become_of_the_cluster(tmp_path: Path) -> None:
    async with world(tmp_path, admission=Admission(engine="memory", template=TEMPLATE)) as here:
        await here.cluster(replicas=3)
        gone = (await here.instances())[0]
        asked: list[tuple[str, str, Any, dict[str, str]]] = [
            ("PUT", f"{CLUSTERS}/a", {"cluster_name": "a", "max_replicas": 9}, {"If-Match": "*"}),
            ("PUT", f"{CLUSTERS}/a/scale", {"replicas": 9}, {}),
            ("POST", f"{CLUSTERS}/a/deploy", {"version": "2"}, {}),
            ("POST", f"{CLUSTERS}/a/pause", None, {}),
            ("POST", f"{CLUSTERS}/a/resume", None, {}),
            ("POST", f"{CLUSTERS}/a/instances/{gone}/replace", None, {}),
        ]

        async def send(number: int) -> Reply:
            method, path, body, headers = asked[number]
            return await here.ask(method, path, body, headers=headers | {"Idempotency-Key": f"key-{number}"})

        first = [await send(number) for number in range(len(asked))]
        for each in first:
            await here.finished(each)
        narrow = {"cluster_name": "a", "max_replicas": 4, "replicas": 3}  # 9 is too many now, and the version another
        await here.finished(await here.ask("PUT", f"{CLUSTERS}/a", narrow, headers={"If-Match": "*"}))
        await here.until("a", lambda seen: seen["generation"] == 3)
        with anyio.fail_after(20):
            while gone in await here.instances():  # noqa: ASYNC110
                await anyio.sleep(0.02)
        asked.append(("DELETE", f"{CLUSTERS}/a", None, {}))
        for _ in range(2):
            for number, each in enumerate(first):
                again = await send(number)
                assert (again.status, again.json) == (202, each.json), asked[number]
            first[len(asked) - 1 :] = [await send(len(asked) - 1)]
            await here.finished(first[-1])
        assert (await here.ask("GET", f"{CLUSTERS}/a")).status == 404, "it is gone, and all is told none the less"
        hidden = await here.ask.by(B_ADMIN)("DELETE", f"{CLUSTERS}/a", headers={"Idempotency-Key": "key-6"})
        assert hidden.status == 404, "keys are each actor's own"


async def test_a_key_stands_for_one_request_only(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster("a")
        await here.cluster("b")
        key = {"Idempotency-Key": "k", "If-Match": "*"}
        assert (await here.ask("POST", f"{CLUSTERS}/a/deploy", {"version": "2"}, headers=key)).status == 202
        for method, path, body in (
            ("POST", f"{CLUSTERS}/a/deploy", {"version": "3"}),
            ("POST", f"{CLUSTERS}/b/deploy", {"version": "2"}),
            ("POST", f"{CLUSTERS}/nobody/deploy", {"version": "2"}),
            ("POST", f"{CLUSTERS}/a/pause", None),
            ("POST", f"{CLUSTERS}/a/instances/none/restart", None),
            ("DELETE", f"{CLUSTERS}/a", None),
            ("PUT", f"{CLUSTERS}/a", {"cluster_name": "a"}),
            ("POST", CLUSTERS, {"cluster_name": "c"}),
            ("PUT", f"{CLUSTERS}/a/configuration", {"document": {}, "reason": "r"}),
            ("POST", f"{CLUSTERS}/a/configuration/rollback", {"revision": 1, "reason": "r"}),
        ):
            reused = await here.ask(method, path, body, headers=key)
            assert (reused.status, reused.kind) == (422, "key-reused"), (path, reused.body)
            assert reused.fields() == ["Idempotency-Key"]


async def test_a_new_cluster_is_made_once_whatever_template_the_server_has_by_then(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        asked, key = {"cluster_name": "a", "replicas": 1}, {"Idempotency-Key": "k"}
        first = await here.ask("POST", CLUSTERS, asked, headers=key)
        other = TEMPLATE.model_copy(update={"command": ("another",)})
        api = replace(here.app.state.api, admission=Admission(engine="memory", template=other, namespaces=("new",)))
        here.app.state.api = api
        again = await here.ask("POST", CLUSTERS, asked, headers=key)
        assert (again.status, again.json) == (202, first.json)
        reused = await here.ask("POST", CLUSTERS, asked | {"replicas": 2}, headers=key)
        assert (reused.status, reused.kind) == (422, "key-reused")


# ------------------------------------------------------------------------------------------------ pages


async def pages(here: Any, path: str) -> list[Any]:
    found: list[Any] = []
    cursor = None
    while True:
        more = "" if cursor is None else f"&cursor={cursor}"
        page = (await here.ask("GET", f"{path}{more}")).json
        found += page["items"]
        cursor = page["next"]
        if cursor is None or not page["items"]:
            return found


async def test_pages_are_whole_while_things_come_and_go(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        for name in ("b", "d", "f", "h"):
            await here.ask("POST", CLUSTERS, {"cluster_name": name})
        first = (await here.ask("GET", f"{CLUSTERS}?limit=2")).json
        assert [each["cluster_name"] for each in first["items"]] == ["b", "d"]
        for name in ("a", "c", "e", "z"):  # before, within and after what was read
            await here.ask("POST", CLUSTERS, {"cluster_name": name})
        rest, cursor = [], first["next"]
        while cursor is not None:
            page = (await here.ask("GET", f"{CLUSTERS}?limit=2&cursor={cursor}")).json
            rest += page["items"]
            cursor = page["next"]
        assert [each["cluster_name"] for each in rest] == ["e", "f", "h", "z"]


async def test_instances_by_page_and_by_what_they_are(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster(replicas=7)
        await here.until("a", lambda seen: seen["ready"] == 7)
        with anyio.fail_after(20):
            while len(await here.instances()) < 7:  # noqa: ASYNC110
                await anyio.sleep(0.02)
        path = f"{CLUSTERS}/a/instances"
        everybody = await pages(here, f"{path}?limit=3")
        ids = [each["instance_id"] for each in everybody]
        assert len(ids) == 7
        assert ids == sorted(ids)
        node = everybody[0]["node_name"]
        there = await pages(here, f"{path}?limit=2&node={node}")
        assert [each["instance_id"] for each in there] == [
            each["instance_id"] for each in everybody if each["node_name"] == node
        ]
        assert await pages(here, f"{path}?limit=2&version=none") == []
        assert len(await pages(here, f"{path}?limit=2&version=1&status=idle")) == 7
        one = await here.ask("GET", f"{path}/{ids[0]}")
        assert one.json["instance_id"] == ids[0]
        assert (await here.ask("GET", f"{path}/nobody")).status == 404


async def test_cursors_of_one_list_are_none_of_another(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster("a")
        await here.cluster("b")
        cursor = (await here.ask("GET", f"{CLUSTERS}?limit=1")).json["next"]
        reply = await here.ask("GET", f"{CLUSTERS}/a/instances?cursor={cursor}")
        assert (reply.status, reply.fields()) == (422, ["cursor"])


async def test_operations_and_waiting_for_one(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster()
        for size in (3, 4, 5):
            await here.finished(await here.ask("PUT", f"{CLUSTERS}/a/scale", {"replicas": size}))
        told = await pages(here, f"{CLUSTERS}/a/operations?limit=2")
        assert [(each["kind"], each["status"]) for each in told] == [("scale", "succeeded")] * 3 + [
            ("create", "succeeded")
        ]
        asked = await here.ask("PUT", f"{CLUSTERS}/a/scale", {"replicas": 6})
        ended = await here.ask("GET", f"/api/v1/operations/{asked.json['operation_id']}?wait=30s")
        assert ended.json["status"] == "succeeded"
        assert json.dumps(ended.json["outcome"])
        odd = await here.ask("GET", f"/api/v1/operations/{asked.json['operation_id']}?wait=soon")
        assert (odd.status, odd.fields()) == (422, ["wait"])


async def test_a_wait_ends_when_the_server_leaves(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster()

        async def never(id: str, *, timeout: float) -> Any:
            await anyio.sleep_forever()

        here.manager.finished = never  # type: ignore[assignment, method-assign]
        open_one = await here.ask("PUT", f"{CLUSTERS}/a/scale", {"replicas": 9})
        async with anyio.create_task_group() as tasks:

            async def wait() -> None:
                reply = await here.ask("GET", f"/api/v1/operations/{open_one.json['operation_id']}?wait=30s")
                assert reply.status == 200

            tasks.start_soon(wait)
            await anyio.sleep(0.05)
            here.leaving.begin()
        assert (await here.ask("GET", "/readyz")).status == 503
        assert (await here.ask("GET", "/livez")).status == 200


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (BackendUnavailable("the database is away"), 503, "unavailable"),
        (DeadlineExceeded("the database does not answer"), 504, "deadline-exceeded"),
        (NotFound("it was removed meanwhile"), 404, "not-found"),
    ],
)
async def test_a_wait_that_cannot_go_on_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: AgentFleetError, status: int, kind: str
) -> None:
    async with world(tmp_path) as here:
        await here.cluster()
        here.backend.behave(version="2", never_ready=True)
        asked = await here.ask("POST", f"{CLUSTERS}/a/deploy", {"version": "2"})
        look, looks = here.manager.operation, 0

        async def once(id: str, **_: Any) -> Operation:
            nonlocal looks
            looks += 1
            if looks > 1:
                raise error
            return await look(id)

        for name in ("operation", "finished"):  # it is looked at before it is waited for
            monkeypatch.setattr(here.manager, name, once)
        reply = await here.ask("GET", f"/api/v1/operations/{asked.json['operation_id']}?wait=60s")
        assert (reply.status, reply.kind) == (status, kind)
        assert here.app.state.api.waits.open == 0


async def test_who_waits_takes_no_place_of_those_who_are_answered(tmp_path: Path) -> None:
    async with world(tmp_path, limits=Limits(at_once=3, waits=6, waits_each=4, stream=1000)) as here:
        await here.cluster()
        path = await _open_operation(here)
        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(here.ask, "GET", path)
                tasks.start_soon(here.ask, "GET", f"{CLUSTERS}/a/events/stream")
            api = here.app.state.api
            with anyio.fail_after(10):
                while (api.waits.open, api.places.open) != (4, 4):  # noqa: ASYNC110
                    await anyio.sleep(0.01)
            assert (await here.ask("GET", CLUSTERS)).status == 200
            refused = await here.ask("GET", path)
            assert (refused.status, refused.kind) == (429, "too-many-requests")
            for _ in range(2):
                tasks.start_soon(here.ask.by(READER), "GET", path)
            while api.waits.open < 6:  # noqa: ASYNC110
                await anyio.sleep(0.01)
            full = await here.ask.by(A_READER)("GET", path)
            assert (full.status, full.kind) == (503, "unavailable")
            shown = (await here.ask("GET", "/metrics")).body.decode()
            assert "agentfleet_api_waits 6.0" in shown
            assert "agentfleet_api_requests_in_flight 1.0" in shown
            here.leaving.begin()
        assert (api.waits.open, api.places.open) == (0, 0)


async def test_a_wait_ends_with_whoever_waits(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster()
        path, gone = await _open_operation(here), anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: here.ask("GET", path, gone=gone))
            with anyio.fail_after(10):
                while not here.app.state.api.waits.open:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
                gone.set()
                while here.app.state.api.waits.open:  # noqa: ASYNC110
                    await anyio.sleep(0.01)


async def _open_operation(here: World) -> str:
    """Where to wait for an operation that does not end."""

    async def never(id: str, *, timeout: float) -> Any:
        await anyio.sleep_forever()

    here.manager.finished = never  # type: ignore[assignment, method-assign]
    here.backend.behave(version="2", never_ready=True)
    asked = await here.ask("POST", f"{CLUSTERS}/a/deploy", {"version": "2"})
    return f"/api/v1/operations/{asked.json['operation_id']}?wait=60s"


async def test_a_configuration_that_is_sent_again_is_published_once(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster()
        path, key = f"{CLUSTERS}/a/configuration", {"Idempotency-Key": "k1"}
        asked = {"document": {"n": 1}, "reason": "first"}
        first = await here.ask("PUT", path, asked, headers=key)
        again = await here.ask("PUT", path, asked, headers=key)
        assert (first.status, again.status) == (200, 200)
        assert first.json == again.json
        based = {"Idempotency-Key": "k2", "If-Match": '"1"'}
        changed = {"document": {"n": 2}, "reason": "second"}
        answers = [await here.ask("PUT", path, changed, headers=based) for _ in range(2)]
        assert [(each.status, each.json["revision"]) for each in answers] == [(200, 2)] * 2, "no conflict"
        back = {"revision": 1, "reason": "back"}
        answers = [
            await here.ask("POST", f"{path}/rollback", back, headers={"Idempotency-Key": "k3"}) for _ in range(2)
        ]
        assert [(each.status, each.json["revision"]) for each in answers] == [(200, 3)] * 2
        other = await here.ask("PUT", path, changed, headers=key)
        assert (other.status, other.kind) == (422, "key-reused")
        assert (await here.ask.by(OPERATOR)("PUT", path, changed, headers=key)).json["revision"] == 4, "another's key"
        odd = await here.ask("PUT", path, changed, headers={"Idempotency-Key": "a b"})
        assert (odd.status, odd.fields()) == (422, ["Idempotency-Key"])


async def test_a_field_that_is_not_known_is_named(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster()
        for path, method, body, name in (
            (f"{CLUSTERS}/a/scale", "PUT", {"replicas": 1, "bogus": 2}, "bogus"),
            (CLUSTERS, "POST", {"cluster_name": "b", "bogus": 2}, "bogus"),
            (CLUSTERS, "POST", {"cluster_name": "b", "rollout": {"bogus": 2}}, "rollout.bogus"),
            (f"{CLUSTERS}/a/deploy", "POST", {"changes": {"bogus": 2}}, "bogus"),
        ):
            refused = await here.ask(method, path, body)
            assert refused.status == 422
            assert [each.rpartition("changes.")[2] for each in refused.fields()] == [name], (path, refused.body)


async def test_each_wrong_field_of_a_document_is_named_whatever_it_is_called(tmp_path: Path) -> None:
    """Generated: numbers that do not fit, or secrets in plain text, under names of every kind at every depth."""
    draw = random.Random(12)
    async with world(tmp_path) as here:
        await here.cluster()
        for number in range(300):
            document: dict[str, Any] = {}
            wrong = set()
            for part in range(draw.randint(1, 4)):
                names = [f"part {part}", *draw.choices(NAMES, k=draw.randint(0, 4))]
                value: Any = 2**64
                if number % 2:
                    names, value = [*names, "api key"], "in plain text"
                for name in reversed(names):
                    value = {name: value}
                document |= value
                wrong.add(write_path(names))
            asked = {"document": document, "reason": "wrong"}
            refused = await here.ask("PUT", f"{CLUSTERS}/a/configuration", asked)
            assert (refused.status, refused.kind) == (422, "invalid"), refused.body
            assert set(refused.fields()) == wrong, (document, refused.json["detail"])
            assert all(each["message"] for each in refused.json["errors"])


async def test_an_etag_holds_while_nothing_but_the_age_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(tmp_path) as here:
        await here.cluster()
        record = await here.manager.get("a")

        async def still(_: str) -> Any:
            return record

        monkeypatch.setattr(here.manager, "get", still)
        for path, age in ((f"{CLUSTERS}/a/health", "age_seconds"), ("/api/v1/managers", "store_age_seconds")):
            first = await here.ask("GET", path)
            assert age in first.body.decode()
            await anyio.sleep(0.05)
            again = await here.ask("GET", path, headers={"If-None-Match": first.headers["etag"]})
            assert again.status == 304, path


async def test_pages_of_events_end(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster()
        seen: list[int] = []
        more: str | None = ""
        with anyio.fail_after(10):
            while more is not None:
                page = (await here.ask("GET", f"{CLUSTERS}/a/events?limit=4{more}")).json
                seen += [each["seq"] for each in page["items"]]
                more = None if page["next"] is None else f"&cursor={page['next']}"
        assert seen == sorted(set(seen))
        later = (await here.ask("GET", f"{CLUSTERS}/a/events?after={seen[-1]}")).json
        assert (later["items"], later["next"]) == ([], None)
