"""Calls to a server that misbehaves in every way it can: each ends in one of our errors, in time, or works at last."""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import time
from pathlib import Path
from typing import Any

import anyio
import pytest
from tests.kube.informer_world import STREAM, Asked, always, chunk, connect, scripted, whole, write_config

from agentfleet.backends.kubernetes import (
    JSON_PATCH,
    AlreadyExists,
    Connection,
    DisruptionBlocked,
    Expired,
    FieldConflict,
    Forbidden,
    InCluster,
    Invalid,
    KubeConfig,
    NotFound,
    Overloaded,
    Replaced,
    Unauthenticated,
    Unreachable,
    credentials,
)
from agentfleet.backends.kubernetes.limits import TokenBucket
from agentfleet.errors import (
    BackendRefused,
    BackendUnavailable,
    Conflict,
    DeadlineExceeded,
    InstanceGone,
    SpecError,
)

pytestmark = [pytest.mark.anyio, pytest.mark.integration]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # the client library knows no other


def status(code: int, reason: str = "", message: str = "no", **details: Any) -> dict[str, Any]:
    return {
        "kind": "Status",
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": message,
        "details": details,
    }


OTHER_UID = "Precondition failed: UID in precondition: a, UID in object meta: b"
OTHER_UID_OF_A_POD = "the UID in the precondition (a) does not match the UID in record (b)"
OTHER_VERSION = "Precondition failed: ResourceVersion in precondition: 1, ResourceVersion in object meta: 2"


@pytest.mark.parametrize(
    ("code", "body", "expected", "parent"),
    [
        (404, status(404, "NotFound"), NotFound, InstanceGone),
        (409, status(409, "AlreadyExists"), AlreadyExists, BackendRefused),
        (409, status(409, "Conflict"), Conflict, Conflict),
        (409, status(409, "Conflict", message=OTHER_UID), Replaced, InstanceGone),
        (409, status(409, "Conflict", message=OTHER_UID_OF_A_POD), Replaced, InstanceGone),
        (409, status(409, "Conflict", message=OTHER_VERSION), Conflict, Conflict),
        (409, status(409, "Conflict", causes=[{"reason": "FieldManagerConflict", "field": ".spec.replicas"}]),
         FieldConflict, BackendRefused),
        (410, status(410, "Expired"), Expired, Conflict),
        (422, status(422, "Invalid", causes=[{"reason": "FieldValueInvalid", "field": "spec.replicas"}]),
         Invalid, BackendRefused),
        (400, b"what?", Invalid, BackendRefused),
        (401, status(401, "Unauthorized"), Unauthenticated, BackendRefused),
        (403, status(403, "Forbidden"), Forbidden, BackendRefused),
        (405, status(405, "MethodNotAllowed"), BackendRefused, BackendRefused),
        (429, status(429, "TooManyRequests", causes=[{"reason": "DisruptionBudget"}]),
         DisruptionBlocked, BackendRefused),
        (500, status(500, "InternalError"), BackendUnavailable, BackendUnavailable),
        (502, b"<html><body>Bad Gateway</body></html>", BackendUnavailable, BackendUnavailable),
        (504, status(504, "Timeout"), DeadlineExceeded, DeadlineExceeded),
    ],
)  # fmt: skip
async def test_each_refusal_has_one_meaning(
    tmp_path: Path, code: int, body: Any, expected: type[Exception], parent: type[Exception]
) -> None:
    async with scripted(always(whole(code, body))) as server, connect(write_config(tmp_path, server.url)) as connection:
        with pytest.raises(expected) as caught:
            await connection.request("POST", "/api/v1/namespaces/x/pods", body=b"{}")
    assert type(caught.value) is expected
    assert isinstance(caught.value, parent)
    assert "/api/v1/namespaces/x/pods" in str(caught.value)
    assert len(server.asked) == (2 if code == 401 else 1)  # a POST is never repeated when it may have been done
    if isinstance(caught.value, Invalid | FieldConflict) and not isinstance(body, bytes):
        assert [field.lstrip(".") for field in caught.value.fields] == ["spec.replicas"]


async def test_an_html_502_is_quoted_and_repeated(tmp_path: Path) -> None:
    page = whole(502, b"<html><h1>Bad Gateway</h1></html>", kind="text/html")
    async with (
        scripted(always(page, page, whole(200, {"ok": 1}))) as server,
        connect(write_config(tmp_path, server.url)) as connection,
    ):
        assert json.loads(await connection.request("GET", "/x")) == {"ok": 1}
        assert (connection.traffic.calls, connection.traffic.repeated, connection.traffic.failed) == (3, 2, 2)


async def test_a_web_page_with_status_200_is_no_answer(tmp_path: Path) -> None:
    async with (
        scripted(always(whole(200, b"<html>login</html>", kind="text/html; charset=utf-8"))) as server,
        connect(write_config(tmp_path, server.url), attempts=1) as connection,
    ):
        with pytest.raises(BackendUnavailable, match="web page"):
            await connection.request("GET", "/x")


async def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    async with (
        scripted(always(whole(302, b"", "Location: https://login.example.com/"))) as server,
        connect(write_config(tmp_path, server.url)) as connection,
    ):
        with pytest.raises(BackendRefused, match="login.example.com"):
            await connection.request("GET", "/x")


async def test_retry_after_is_honoured_also_for_a_post_and_by_all(tmp_path: Path) -> None:
    busy = whole(429, status(429, "TooManyRequests"), "Retry-After: 1")
    async with (
        scripted(always(busy, whole(201, {}))) as server,
        connect(write_config(tmp_path, server.url)) as connection,
    ):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(connection.request, "POST", "/x")
            while not connection.traffic.overloaded:  # noqa: ASYNC110 - a counter has no event
                await anyio.sleep(0.01)
            tasks.start_soon(connection.request, "GET", "/y")  # another caller keeps still, too
        waits = [later.at - server.asked[0].at for later in server.asked[1:]]
        assert min(waits) >= 0.99
        assert connection.traffic.overloaded == 1


async def test_a_long_retry_after_ends_the_call_at_once(tmp_path: Path) -> None:
    date = email.utils.formatdate(time.time() + 3600, usegmt=True)
    async with (
        scripted(always(whole(503, status(503), f"Retry-After: {date}"))) as server,
        connect(write_config(tmp_path, server.url)) as connection,
    ):
        with anyio.fail_after(3), pytest.raises(Overloaded) as caught:
            await connection.request("GET", "/x")
        assert caught.value.retry_after == pytest.approx(3600, abs=5)
        assert len(server.asked) == 1


@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_a_truncated_body_is_noticed(tmp_path: Path, framing: str) -> None:
    cut = whole(200, {"items": []})[:-4] if framing == "length" else STREAM + chunk(b'{"items"')
    async with (
        scripted(always(cut)) as server,
        connect(write_config(tmp_path, server.url), attempts=2) as connection,
    ):
        with pytest.raises(BackendUnavailable, match="ended too soon"):
            await connection.request("GET", "/x")
    assert len(server.asked) == 2


async def test_a_silent_server_and_a_slow_body_end_in_time(tmp_path: Path) -> None:
    async def silent(_asked: Asked, _writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    async def drip(_asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM)
        while True:
            writer.write(chunk(b" "))
            await asyncio.sleep(0.05)

    for answer, options in ((silent, {"read_timeout": 0.2, "attempts": 2}), (drip, {"timeout": 0.5})):
        async with scripted(answer) as server, connect(write_config(tmp_path, server.url), **options) as connection:
            begun = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await connection.request("GET", "/x")
            assert time.monotonic() - begun < 2


async def test_no_server_is_unreachable_and_a_post_is_repeated_until_there_is_one(tmp_path: Path) -> None:
    async with scripted(always(whole(200, {}))) as server:
        pass
    async with connect(write_config(tmp_path, server.url), attempts=3) as connection:
        with pytest.raises(Unreachable):
            await connection.request("POST", "/x")
        assert connection.traffic.calls == 3


async def test_what_is_not_idempotent_is_not_repeated(tmp_path: Path) -> None:
    async with (
        scripted(always(whole(500, status(500)))) as server,
        connect(write_config(tmp_path, server.url), attempts=2) as connection,
    ):
        for method, kind, times in (("POST", "application/json", 1), ("PATCH", JSON_PATCH, 1), ("DELETE", "x", 2)):
            before = len(server.asked)
            with pytest.raises(BackendUnavailable):
                await connection.request(method, "/x", body=b"{}", content_type=kind)
            assert len(server.asked) - before == times, method


async def test_untrusted_certificates_are_told(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be used"):
        config = write_config(tmp_path, "https://127.0.0.1:1", None, **{"certificate-authority-data": "bm8="})
        async with connect(config) as connection:
            await connection.request("GET", "/x")


async def test_a_token_is_read_again_after_a_401_and_once_only(tmp_path: Path) -> None:
    valid = "one"
    (tmp_path / "token").write_text("one\n")

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        good = asked.headers.get("authorization") == f"Bearer {valid}"
        writer.write(whole(200, {}) if good else whole(401, status(401, "Unauthorized")))

    async with (
        scripted(answer) as server,
        connect(write_config(tmp_path, server.url, {"tokenFile": "token"})) as connection,
    ):
        await connection.request("GET", "/x")
        valid = "two"
        (tmp_path / "token").write_text("two\n")
        await connection.request("POST", "/x")
        assert (len(server.asked), connection.traffic.reauthenticated, connection.traffic.clients) == (3, 1, 1)
        valid = "three"
        with pytest.raises(Unauthenticated):
            await connection.request("GET", "/x")
        assert len(server.asked) == 5


async def test_a_plugin_is_run_when_its_token_runs_out_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "SKEW", 0.0)
    plugin = tmp_path / "plugin"
    plugin.write_text(
        "#!/bin/sh\n"
        'echo run >> "$FOLDER/runs"\n'
        'n=$(wc -l < "$FOLDER/runs")\n'
        'until=$(date -u -d "+$LIFE seconds" +%Y-%m-%dT%H:%M:%SZ)\n'
        'echo "{\\"apiVersion\\":\\"client.authentication.k8s.io/v1\\",\\"kind\\":\\"ExecCredential\\",'
        '\\"status\\":{\\"token\\":\\"t$n\\",\\"expirationTimestamp\\":\\"$until\\"}}"\n'
    )
    plugin.chmod(0o700)
    refused = ""

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(whole(401, status(401)) if asked.headers["authorization"] == refused else whole(200, {}))

    async with scripted(answer) as server:
        env = [{"name": "FOLDER", "value": str(tmp_path)}, {"name": "LIFE", "value": "3"}]
        user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "./plugin", "env": env}}
        async with connect(write_config(tmp_path, server.url, user)) as connection:
            for _ in range(3):
                await connection.request("GET", "/x")
            assert server.asked[-1].headers["authorization"] == "Bearer t1"
            refused = "Bearer t1"
            await connection.request("GET", "/x")
            assert server.asked[-1].headers["authorization"] == "Bearer t2"
            await anyio.sleep(3.1)
            await connection.request("GET", "/x")
            assert server.asked[-1].headers["authorization"] == "Bearer t3"
    assert (tmp_path / "runs").read_text().count("run") == 3


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("sleep 30", DeadlineExceeded),
        ("echo no >&2; exit 3", BackendUnavailable),
        ("echo '<html>'", BackendUnavailable),
    ],
)
async def test_a_plugin_that_fails_is_told(tmp_path: Path, script: str, expected: type[Exception]) -> None:
    user = {"exec": {"apiVersion": "v1", "command": "/bin/sh", "args": ["-c", script]}}
    config = write_config(tmp_path, "http://127.0.0.1:1", user)
    async with Connection(KubeConfig(config, plugin_timeout=0.3), attempts=1) as connection:
        with pytest.raises(expected, match="plugin"):
            await connection.request("GET", "/x")


async def test_in_cluster_tokens_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in (("token", "a"), ("ca.crt", "pem"), ("namespace", "here")):
        (tmp_path / name).write_text(content)
    source = InCluster(tmp_path, {"KUBERNETES_SERVICE_HOST": "::1", "KUBERNETES_SERVICE_PORT": "443"})
    first = await source.access()
    assert (first.server, first.authorization, first.namespace) == ("https://[::1]:443", "Bearer a", "here")
    assert "Bearer" not in repr(first)
    (tmp_path / "token").write_text("b")
    assert await source.access() is first
    monkeypatch.setattr(credentials, "REREAD", 0.0)
    assert (await source.access()).authorization == "Bearer b"
    (tmp_path / "token").unlink()  # just being replaced
    assert (await source.access()).authorization == "Bearer b"
    with pytest.raises(SpecError, match="token"):
        await source.access(rejected=await source.access())


async def test_several_kubeconfigs_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = write_config(tmp_path / "a", "https://first")
    second = write_config(tmp_path / "b", "https://second")
    second.write_text(second.read_text().replace("name: it", "name: other").replace(": it\n", ": other\n"))
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join(map(str, (first, tmp_path / "missing", second))))
    assert (await KubeConfig().access()).server == "https://first"
    assert (await KubeConfig(context="other").access()).server == "https://second"
    with pytest.raises(SpecError, match="'nope'; there are: it, other"):
        await KubeConfig(context="nope").access()
    with pytest.raises(SpecError, match="no kubeconfig"):
        await KubeConfig(tmp_path / "nothing").access()


async def test_a_user_who_acts_as_another_does_so_in_every_request(tmp_path: Path) -> None:
    user = {
        "token": "mine",
        "as": "limited",
        "as-uid": "u-1",
        "as-groups": ["readers", "zoë's"],
        "as-user-extra": {"example.org/Scope": ["a", "b"]},
    }
    seen: list[list[str]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        seen.append(sorted(line for line in head.split("\r\n") if line.startswith(("Impersonate", "Authorization"))))
        writer.write(whole(200, {}))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        async with connect(write_config(tmp_path, f"http://{host}:{port}", user)) as connection:
            await connection.request("GET", "/x")
            await connection.request("PATCH", "/x", body=b"{}")
            async with connection.stream("/x", silence=1.0):
                pass
    said = [
        "Authorization: Bearer mine",
        "Impersonate-Extra-example.org%2FScope: a",
        "Impersonate-Extra-example.org%2FScope: b",
        "Impersonate-Group: readers",
        "Impersonate-Group: zoë's",
        "Impersonate-Uid: u-1",
        "Impersonate-User: limited",
    ]
    assert seen == [said] * 3


@pytest.mark.parametrize(
    ("user", "words"),
    [
        ({"as-groups": ["readers"]}, "as-groups"),
        ({"as-uid": "u-1", "as": ""}, "as-uid"),
        ({"as": 7}, "as must be a text"),
        ({"as": "a", "as-groups": "readers"}, "as-groups must be a list"),
        ({"as": "a", "as-user-extra": {"scope": "all"}}, "as-user-extra must"),
        ({"as": "a", "as-user-extra": ["scope"]}, "as-user-extra must"),
        ({"as": "a\r\nX-Y: z"}, "as must be a text"),
    ],
)
async def test_half_said_impersonation_is_refused(tmp_path: Path, user: dict[str, Any], words: str) -> None:
    """It is never left out: the user's own rights may be all there are."""
    with pytest.raises(SpecError, match=words):
        await KubeConfig(write_config(tmp_path, "http://127.0.0.1:1", {"token": "mine", **user})).access()


async def test_the_rate_limit_holds_and_forgets_the_cancelled() -> None:
    bucket = TokenBucket(qps=50, burst=5)
    begun = anyio.current_time()
    for _ in range(15):
        await bucket.take()
    assert 0.19 <= anyio.current_time() - begun < 0.5
    with anyio.move_on_after(0.001):
        await bucket.take()
    begun = anyio.current_time()
    await bucket.take()
    assert anyio.current_time() - begun < 0.04
    for qps, burst in ((0, 1), (1, 0)):
        with pytest.raises(SpecError):
            TokenBucket(qps, burst)


async def test_a_cancelled_call_leaves_nothing(tmp_path: Path) -> None:
    async def silent(_asked: Asked, _writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    async with scripted(silent) as server, connect(write_config(tmp_path, server.url)) as connection:
        with anyio.move_on_after(0.1) as scope:
            await connection.request("GET", "/x")
        assert scope.cancelled_caught
    with pytest.raises(BackendUnavailable, match="closed"):
        await connection.request("GET", "/x", timeout=0.5)
