"""Who is known, what a token reaches, and what is written down of it."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import anyio
import pytest
from tests.server.asking import ADMIN, Asking
from tests.server.world import A_ADMIN, A_OPERATOR, A_READER, B_ADMIN, OPERATOR, READER, world

from agentfleet.errors import BackendUnavailable, DeadlineExceeded, SpecError
from agentfleet.server import FileTokens, Limits, create_app
from agentfleet.server.app import document
from agentfleet.server.credentials import read_lines
from agentfleet.server.limits import Rates
from agentfleet.stores.tokens import MemoryTokens, new_token

pytestmark = pytest.mark.anyio
CLUSTERS = "/api/v1/clusters"
BODIES: dict[str, Any] = {
    "create_cluster": {"cluster_name": "b"},
    "put_cluster": {"cluster_name": "b"},
    "scale_cluster": {"replicas": 3},
    "deploy_cluster": {"version": "9"},
    "rollback_cluster": {},
    "isolate_instance": {"reason": "look"},
    "replace_instance": {},
    "publish_configuration": {"document": {"a": 1}, "reason": "r"},
    "restore_configuration": {"revision": 1, "reason": "r"},
    "check_configuration": {"document": {"a": 1}},
    "acknowledge_config": {"instance": "i1", "revision": 1},
}
QUERIES = {
    "fetch_config": "?instance=i1",
    "stream_config": "?instance=i1",
    "diff_configuration": "?before=1&after=1",
    "list_audit": "?cluster=b",
}
OF_NO_CLUSTER = {"livez", "readyz", "list_clusters", "list_managers", "metrics", "verify_audit", "create_cluster"}


def routes() -> list[tuple[str, str, str]]:
    paths: dict[str, Any] = document()["paths"]
    return [
        (method.upper(), path, operation["operationId"])
        for path, methods in paths.items()
        for method, operation in methods.items()
    ]


async def test_no_route_answers_another_clusters_token(tmp_path: Path) -> None:
    """Every route of the document, asked for a cluster that the token does not reach: as if there were none."""
    async with world(tmp_path, limits=Limits(rate=1e6, burst=10**6, stream=0.05)) as here:
        await here.cluster("a")
        await here.cluster("b")
        with anyio.fail_after(20):
            while not (instances := await here.instances("b")):  # noqa: ASYNC110
                await anyio.sleep(0.02)
        operation = (await here.ask("PUT", f"{CLUSTERS}/b/scale", {"replicas": 3})).json["operation_id"]
        published = await here.ask("PUT", f"{CLUSTERS}/b/configuration", BODIES["publish_configuration"])
        assert published.status == 200
        before = await here.ask("GET", f"{CLUSTERS}/b/operations")
        own, foreign = here.ask, here.ask.by(A_ADMIN)
        checked = 0
        for method, template, name in routes():
            if name in OF_NO_CLUSTER:
                continue
            path = (
                template.replace("{id}", "b")
                .replace("{operation_id}", operation)
                .replace("{instance_id}", instances[0])
                .replace("{revision}", "1")
            )
            headers = {"If-Match": "*"} if name == "put_cluster" else {}
            asked = (method, path + QUERIES.get(name, ""), BODIES.get(name))
            hidden = await foreign(*asked, headers=headers)
            missing = await foreign(
                asked[0], asked[1].replace("/b", "/nobody").replace("=b", "=nobody"), asked[2], headers=headers
            )
            assert (hidden.status, hidden.kind) == (404, "not-found"), (name, hidden.body)
            if "{operation_id}" not in template:
                assert hidden.json["detail"].replace("'b'", "'nobody'") == missing.json["detail"], name
            if method == "GET":  # and the right token is answered, so that the path is right
                assert (await own(*asked)).status == 200, name
            checked += 1
        assert checked == len(routes()) - len(OF_NO_CLUSTER) == 37
        after = await here.ask("GET", f"{CLUSTERS}/b/operations")
        assert [each["id"] for each in after.json["items"]] == [each["id"] for each in before.json["items"]]

        assert [each["cluster_name"] for each in (await foreign("GET", CLUSTERS)).json["items"]] == ["a"]
        assert (await foreign("POST", CLUSTERS, {"cluster_name": "b"})).status == 403
        assert (await foreign("POST", CLUSTERS, {"cluster_name": "new"})).status == 403
        assert (await foreign("GET", "/metrics")).status == 403
        assert (await foreign("GET", "/api/v1/audit")).status == 403
        assert (await foreign("GET", "/api/v1/audit/verification")).status == 403
        assert [each["cluster"] for each in (await foreign("GET", "/api/v1/audit?cluster=a")).json["items"]] == ["a"]
        id = (await here.ask("GET", f"{CLUSTERS}/b")).json["id"]
        assert (await foreign("GET", f"{CLUSTERS}/{id}")).status == 404


async def test_every_route_but_two_needs_a_token(tmp_path: Path) -> None:
    async with world(tmp_path, limits=Limits(failures=10**6)) as here:
        for token in (None, "wrong", "af_0123456789abcdef." + "x" * 43, "a.b.c"):
            nobody = here.ask.by(token)
            for method, path, name in routes():
                reply = await nobody(method, path.replace("{id}", "a"))
                if name in ("livez", "readyz"):
                    assert reply.status == 200
                else:
                    assert (reply.status, reply.kind) == (401, "unauthenticated"), name
                    assert reply.headers["www-authenticate"].startswith('Bearer realm="agentfleet"')
        assert await here.audit.entries() == []
        twice = await here.ask("GET", CLUSTERS, headers={"Authorization": f"Basic {ADMIN}"})
        assert twice.status == 401


@pytest.mark.parametrize(
    ("token", "reads", "operates", "deletes"),
    [
        (READER, 200, 403, 403),
        (A_READER, 200, 403, 403),
        (OPERATOR, 200, 202, 403),
        (A_OPERATOR, 200, 202, 403),
        (A_ADMIN, 200, 202, 202),
        (ADMIN, 200, 202, 202),
        (B_ADMIN, 404, 404, 404),
    ],
)
async def test_scopes(tmp_path: Path, token: str, reads: int, operates: int, deletes: int) -> None:
    async with world(tmp_path) as here:
        await here.cluster()
        ask = here.ask.by(token)
        assert (await ask("GET", f"{CLUSTERS}/a")).status == reads
        assert (await ask("PUT", f"{CLUSTERS}/a/scale", {"replicas": 3})).status == operates
        assert (await ask("POST", f"{CLUSTERS}/a/pause")).status == operates
        assert (await ask("DELETE", f"{CLUSTERS}/a")).status == deletes
        assert (await ask("GET", "/api/v1/audit?cluster=a")).status == {202: 200, 403: 403, 404: 404}[deletes]


# ------------------------------------------------------------------------------------------------ tokens


async def test_a_stored_token_until_it_is_revoked_or_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentfleet.server.credentials._FRESH", 0.0)
    async with world(tmp_path) as here:
        now = here.manager.clock.now()
        plain, record = new_token("ci", scopes=["operate"], fleets=["a"], now=now)
        await here.tokens.add(record)
        assert plain.split(".")[1] not in repr(record)
        short, brief = new_token("brief", scopes=["read"], fleets=["*"], now=now - 100, expires_in=50)
        await here.tokens.add(brief)
        assert (await here.ask.by(short)("GET", CLUSTERS)).status == 401
        ask = here.ask.by(plain)
        assert (await ask("GET", CLUSTERS)).status == 200
        assert (await here.tokens.tokens())[1].used_at is not None
        other = f"{plain[:-1]}{'A' if plain[-1] != 'A' else 'B'}"
        assert (await here.ask.by(other)("GET", CLUSTERS)).status == 401
        await here.tokens.revoke("ci", now)
        assert (await ask("GET", CLUSTERS)).status == 401


async def test_what_the_store_said_is_believed_for_seconds_only(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        plain, record = new_token("ci", scopes=["read"], fleets=["*"], now=here.manager.clock.now())
        await here.tokens.add(record)
        asked: list[str] = []
        find = here.tokens.find

        async def counted(id: str) -> Any:
            asked.append(id)
            return await find(id)

        here.tokens.find = counted  # type: ignore[method-assign]
        for _ in range(5):
            assert (await here.ask.by(plain)("GET", CLUSTERS)).status == 200
        assert len(asked) == 1


async def test_the_token_file_is_read_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentfleet.server.credentials._LOOK", 0.0)
    async with world(tmp_path) as here:
        new = "n" * 40
        assert (await here.ask.by(new)("GET", CLUSTERS)).status == 401
        here.token_file.write_text(f"new read * sha256:{hashlib.sha256(new.encode()).hexdigest()}\n")
        assert (await here.ask.by(new)("GET", CLUSTERS)).status == 200
        assert (await here.ask("GET", CLUSTERS)).status == 401
        here.token_file.write_text("damaged\n")
        assert (await here.ask.by(new)("GET", CLUSTERS)).status == 200


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("a read *", "write 'name"),
        ("a read * short", "token:"),
        ("a write * " + "x" * 40, "scopes:"),
        ("a read UPPER " + "x" * 40, "fleets:"),
        ("a/b read * " + "x" * 40, "name:"),
        (f"a read * {'x' * 40}\nb read * {'x' * 40}", "twice"),
        (f"a read * {'x' * 40}\na read * {'y' * 40}", "twice"),
    ],
)
def test_a_wrong_line_is_named_and_never_shown(tmp_path: Path, line: str, wrong: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"# who may what\n\n{line}\n")
    with pytest.raises(SpecError, match=wrong) as caught:
        read_lines(path)
    assert "line" in str(caught.value)
    assert "xxxx" not in str(caught.value)
    with pytest.raises(SpecError, match="cannot be read"):
        FileTokens(tmp_path / "none")


async def test_a_server_without_any_source_of_tokens_does_not_start(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        with pytest.raises(SpecError, match="nobody could ask"):
            create_app(here.manager)


# ------------------------------------------------------------------------------------------------ limits and the audit


async def test_a_token_that_asks_too_often_waits(tmp_path: Path) -> None:
    async with world(tmp_path, limits=Limits(rate=0.5, burst=3)) as here:
        assert [(await here.ask("GET", CLUSTERS)).status for _ in range(3)] == [200] * 3
        refused = await here.ask("GET", CLUSTERS)
        assert (refused.status, refused.kind) == (429, "too-many-requests")
        assert 1 <= int(refused.headers["retry-after"]) <= 2
        assert (await here.ask("PUT", f"{CLUSTERS}/a/scale", {"replicas": 1})).status == 429
        assert await here.audit.entries() == []  # a flood is not to fill the audit
        assert (await here.ask.by(READER)("GET", CLUSTERS)).status == 200
        assert (await here.ask("GET", "/livez")).status == 200


async def test_an_address_that_guesses_is_told_to_wait(tmp_path: Path) -> None:
    async with world(tmp_path, limits=Limits(failures=3)) as here:
        bad = Asking(here.app, "wrong", client="192.0.2.1")
        assert [(await bad("GET", CLUSTERS)).status for _ in range(4)] == [401, 401, 401, 429]
        assert (
            await Asking(here.app, ADMIN, client="192.0.2.1")("GET", CLUSTERS)
        ).status == 200  # behind one proxy, say
        assert (await here.ask("GET", CLUSTERS)).status == 200


async def test_nobody_is_asked_for_who_guesses(tmp_path: Path) -> None:
    """Once too many attempts of an address have failed, tokens that were not known before cost nothing any more."""
    async with world(tmp_path, limits=Limits(failures=3, rate=1e6, burst=10**6)) as here:
        known, record = new_token("known", scopes=["read"], fleets=["*"], now=here.manager.clock.now())
        await here.tokens.add(record)
        assert (await Asking(here.app, known, client="192.0.2.1")("GET", CLUSTERS)).status == 200
        asked: list[str] = []
        find = here.tokens.find

        async def counted(id: str) -> Any:
            asked.append(id)
            return await find(id)

        here.tokens.find = counted  # type: ignore[method-assign]
        answers = []
        for _ in range(10):
            guess, _ = new_token("guess", scopes=["read"], fleets=["*"], now=0.0)
            answers.append((await Asking(here.app, guess, client="192.0.2.1")("GET", CLUSTERS)).status)
        assert answers == [401] * 3 + [429] * 7
        assert len(asked) == 3
        assert (await Asking(here.app, known, client="192.0.2.1")("GET", CLUSTERS)).status == 200


async def test_nobody_learns_where_the_database_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with world(tmp_path) as here:
        await here.cluster()

        async def out_of_reach(*_: Any, **__: Any) -> Any:
            raise BackendUnavailable("postgresql://fleet@db.internal:5432 refuses")

        async def too_late(*_: Any, **__: Any) -> Any:
            raise DeadlineExceeded("postgresql://fleet@db.internal:5432 is silent")

        plain, _ = new_token("any", scopes=["read"], fleets=["*"], now=0.0)
        for broken, status in ((out_of_reach, 503), (too_late, 504)):
            here.tokens.find = broken  # type: ignore[method-assign]
            for path in (CLUSTERS, f"{CLUSTERS}/a/config?instance=i"):
                refused = await here.ask.by(plain)("GET", path)
                assert refused.status == status
                assert "db.internal" not in refused.body.decode()
        assert "db.internal" in caplog.text, "whoever reads the log does"


def test_rates_by_key() -> None:
    now = [0.0]
    rates = Rates(2.0, 2, lambda: now[0], most=2)
    assert [rates.take("a") for _ in range(3)] == [0.0, 0.0, 0.5]
    now[0] = 0.5
    assert rates.take("a") == 0.0
    for key in ("b", "c"):
        rates.take(key)
    assert rates.take("a") == 0.0  # forgotten, as if it had rested


async def test_every_change_is_audited_done_or_not(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster()
        scaled = await here.ask("PUT", f"{CLUSTERS}/a/scale", {"replicas": 3})
        await here.ask.by(READER)("PUT", f"{CLUSTERS}/a/scale", {"replicas": 4})
        await here.ask.by(B_ADMIN)("DELETE", f"{CLUSTERS}/a")
        await here.ask("PUT", f"{CLUSTERS}/a/scale", {"replicas": -1})
        await here.ask("GET", f"{CLUSTERS}/a")
        told = (await here.ask("GET", "/api/v1/audit")).json["items"]
        assert [(each["actor"], each["method"], each["status"]) for each in told] == [
            ("file/admin", "PUT", 422),
            ("file/b-admin", "DELETE", 404),
            ("file/reader", "PUT", 403),
            ("file/admin", "PUT", 202),
            ("file/admin", "POST", 202),
        ]
        assert (told[3]["operation_id"], told[3]["cluster"]) == (scaled.json["operation_id"], "a")
        assert told[3]["request_id"] == scaled.headers["x-request-id"]
        assert (told[3]["origin"], told[3]["credential"]) == ("127.0.0.1", "file:admin")
        assert told[3]["previous"] == told[4]["hash"]
        assert ADMIN not in str(told)
        assert (await here.ask("GET", "/api/v1/audit/verification")).json == {"ok": True, "checked": 5, "detail": None}


@pytest.mark.parametrize("database", [False, True])
async def test_who_may_do_nothing_cannot_erase_what_was_done(tmp_path: Path, *, database: bool) -> None:
    url = f"sqlite:///{tmp_path / 'audit.db'}" if database else None
    async with world(tmp_path, database=url, keep_audit=20) as here:
        await here.cluster()
        deleted = await here.ask("DELETE", f"{CLUSTERS}/a")
        await here.finished(deleted)
        plain, record = new_token("agents", scopes=["agent"], fleets=["a"], now=here.manager.clock.now())
        await here.tokens.add(record)
        agent = here.ask.by(plain)
        assert {(await agent("POST", CLUSTERS, {"cluster_name": "b"})).status for _ in range(200)} == {403}
        told = (await here.ask("GET", "/api/v1/audit")).json["items"]
        assert [(each["actor"], each["method"], each["status"]) for each in told[-2:]] == [
            ("file/admin", "DELETE", 202),
            ("file/admin", "POST", 202),
        ]
        assert 20 <= len(told) - 2 < 40
        verified = (await here.ask("GET", "/api/v1/audit/verification")).json
        assert verified == {"ok": True, "checked": len(told), "detail": None}


async def test_a_dry_check_is_not_audited_and_its_refusal_is(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.cluster()
        before = await here.audit.entries()
        path, body = f"{CLUSTERS}/a/configuration/check", {"document": {"model": "small"}}
        assert (await here.ask.by(READER)("POST", path, body)).status == 200
        assert await here.audit.entries() == before
        assert (await here.ask.by(B_ADMIN)("POST", path, body)).status == 404
        assert [each.status for each in (await here.audit.entries())[: -len(before)]] == [404]


async def test_nobody_is_told_of_a_change_that_could_not_be_audited(tmp_path: Path) -> None:
    from agentfleet.errors import BackendUnavailable  # noqa: PLC0415

    async with world(tmp_path) as here:
        await here.cluster()

        async def down(_: Any) -> None:
            raise BackendUnavailable("the database is away")

        append, here.audit.append = here.audit.append, down  # type: ignore[assignment, method-assign]
        key = {"Idempotency-Key": "k"}
        refused = await here.ask("PUT", f"{CLUSTERS}/a/scale", {"replicas": 3}, headers=key)
        assert (refused.status, refused.kind) == (503, "unavailable")
        assert "audited" in refused.json["detail"]
        here.audit.append = append  # type: ignore[method-assign]
        again = await here.ask("PUT", f"{CLUSTERS}/a/scale", {"replicas": 3}, headers=key)
        assert again.status == 202
        assert len((await here.ask("GET", f"{CLUSTERS}/a/operations")).json["items"]) == 2


async def test_a_refusal_that_cannot_be_audited_is_a_problem_as_well(tmp_path: Path) -> None:
    """The database is down, and who asks is known from elsewhere: neither the change nor its refusal can be kept."""
    async with world(tmp_path, limits=Limits(deadline=0.2)) as here:

        async def down(*_: Any, **__: Any) -> Any:
            raise BackendUnavailable("the database is away")

        async def never(*_: Any, **__: Any) -> Any:
            await anyio.sleep_forever()

        async def broken(*_: Any, **__: Any) -> Any:
            raise ZeroDivisionError

        here.audit.append = down  # type: ignore[method-assign]
        for get in (down, never, broken):
            here.manager.get = get  # type: ignore[method-assign]
            for method, path, body in (
                ("PUT", f"{CLUSTERS}/a/scale", {"replicas": 3}),
                ("POST", f"{CLUSTERS}/a/pause", None),
                ("DELETE", f"{CLUSTERS}/a", None),
            ):
                refused = await here.ask(method, path, body)
                assert (refused.status, refused.kind) == (503, "unavailable"), (get, path)
                assert "audited" in refused.json["detail"]
                assert refused.headers["retry-after"] == "1"
                assert refused.headers["x-content-type-options"] == "nosniff"


async def test_tokens_are_in_no_log_event_or_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with world(tmp_path) as here:
        secret = "super-secret-token-that-is-nowhere-0123456789"
        plain, record = new_token("ci", scopes=["admin"], fleets=["*"], now=here.manager.clock.now())
        await here.tokens.add(record)
        bodies = b""
        for token in (secret, plain, ADMIN):
            ask = here.ask.by(token)
            for method, path, body in (
                ("GET", CLUSTERS, None),
                ("POST", CLUSTERS, {"cluster_name": "a"}),
                ("POST", CLUSTERS, {"cluster_name": "A"}),
                ("GET", "/api/v1/audit", None),
                ("GET", "/metrics", None),
            ):
                bodies += (await ask(method, path, body)).body
        events = "".join(event.to_json() for event in here.manager.journal.read())
    for word in (secret, plain, plain.split(".")[1], ADMIN):
        assert word not in caplog.text
        assert word.encode() not in bodies
        assert word not in events


# ------------------------------------------------------------------------------------------------ without tokens


@pytest.mark.parametrize(
    ("client", "headers", "status"),
    [
        ("127.0.0.1", {}, 200),
        ("::1", {"host": "[::1]:8080"}, 200),
        ("::ffff:127.0.0.1", {"host": "localhost:8080"}, 200),
        ("192.0.2.7", {}, 403),
        ("10.0.0.1", {}, 403),
        ("", {}, 403),
        ("127.0.0.1", {"host": "evil.example"}, 403),
        ("127.0.0.1", {"host": "evil.example:8080"}, 403),
        ("127.0.0.1", {"host": "127.0.0.1.evil.example"}, 403),
        ("127.0.0.1", {"host": "localhost:8080", "origin": "http://localhost:8080"}, 200),
        ("127.0.0.1", {"host": "localhost:8080", "origin": "https://evil.example"}, 403),
        ("127.0.0.1", {"host": "localhost:8080", "origin": "null"}, 403),
    ],
)
async def test_without_tokens_this_machine_alone_is_answered(
    tmp_path: Path, client: str, headers: dict[str, str], status: int
) -> None:
    async with world(tmp_path) as here:
        app = _without_tokens(here.manager)
        reply = await Asking(app, None, client=client)("GET", CLUSTERS, headers=headers)
        assert reply.status == status, reply.body
        assert (await Asking(app, None, client=client)("GET", "/livez")).status == 200


def _without_tokens(manager: Any) -> Any:
    from agentfleet.telemetry import Telemetry  # noqa: PLC0415

    manager.telemetry = Telemetry()  # one registry has one server's metrics
    return create_app(manager, insecure_loopback=True, tokens=MemoryTokens())
