"""Servers in processes of their own, over real sockets: started, asked, shared, ended."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import socket
import ssl
import sys
import time
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import pytest
import requests
from click.testing import CliRunner
from tests.server.asking import ADMIN
from tests.server.conftest import Serve, Served
from tests.server.world import audited_in

from agentfleet.cli import main
from agentfleet.client import ClusterConfig, FleetClient
from agentfleet.core.leadership import LeaseRecord
from agentfleet.errors import AccessDenied, BackendUnavailable, Conflict, NotFound, OperationRefused, SpecError
from agentfleet.server import serving
from agentfleet.server.commands import user
from agentfleet.server.listening import keep_fresh, tls_of
from agentfleet.server.serving import leases_in
from agentfleet.specs import AgentTemplate, FleetSpec
from agentfleet.stores.sql import Database, SqlAudit
from agentfleet.testing.kube.certificates import Authority

pytestmark = [pytest.mark.anyio, pytest.mark.integration]
TEMPLATE = AgentTemplate(command=["agent"], cpu="250m", memory="512Mi")
BOTH = pytest.mark.parametrize("database_url", ["sqlite", "postgres"], indirect=True)


@asynccontextmanager
async def asking(*served: Served, token: str = ADMIN, **more: object) -> AsyncIterator[FleetClient]:
    async with FleetClient(*(each.address for each in served), token=token, **more) as client:  # type: ignore[arg-type]
        yield client
    await asyncio.sleep(0)


@BOTH
async def test_the_client_does_all_that_the_api_can(serve: Serve, database_url: str) -> None:
    served = serve(database_url)
    async with asking(served) as client:
        made = await client.create(ClusterConfig(cluster_name="a", template=TEMPLATE, min_replicas=2, max_replicas=9))
        assert made.status == "creating"
        assert (await client.finished(made.operation_id, timeout=60)).status == "succeeded"
        other = await client.create(FleetSpec(name="b", template=TEMPLATE), namespace="labs")
        await client.finished(other.operation_id, timeout=60)
        assert [each.cluster_name async for each in client.clusters()] == ["a", "b"]

        scaled = await client.scale("a", 5)
        assert scaled.target_replicas == 5
        assert (await client.finished(scaled.operation_id, timeout=60)).outcome["replicas"] == 5
        for step in (client.deploy("a", "2"), client.rollback("a"), client.pause("a"), client.resume("a")):
            assert (await client.finished((await step).operation_id, timeout=60)).status == "succeeded"
        await _until(client, "a", ready=5)

        cluster, etag = await client.cluster_with_etag("a")
        assert (cluster.spec.scaling is not None, cluster.namespace, cluster.replicas) == (True, "default", 5)
        assert (await client.health("a")).status == "healthy"
        assert [each.version for each in await client.revisions("a")] == ["1", "2"]
        changed = await client.apply("a", ClusterConfig(cluster_name="a", min_replicas=3, max_replicas=8), etag=etag)
        assert (await client.finished(changed.operation_id, timeout=60)).status == "succeeded"
        with pytest.raises(Conflict):
            await client.apply("a", ClusterConfig(cluster_name="a"), etag=etag)

        instances = [each async for each in client.instances("a", status="idle")]
        assert len(instances) >= 3
        one = instances[0].instance_id
        assert (await client.instance("a", one)).version == "1"
        assert any("started" in line for line in await client.logs("a", one))
        isolated = await client.isolate("a", one, reason="to look at it", keep=60)
        assert (await client.finished(isolated.operation_id, timeout=60)).status == "succeeded"
        released = await client.release("a", one)
        assert (await client.finished(released.operation_id, timeout=60)).status == "succeeded"

        first = await client.configuration.publish("a", {"model": "small"}, reason="first", expect=0)
        second = await client.configuration.publish("a", {"model": "large"}, reason="better", expect=first.revision)
        with pytest.raises(Conflict):
            await client.configuration.publish("a", {"model": "tiny"}, reason="late", expect=first.revision)
        assert (await client.configuration.get("a")).document == {"model": "large"}
        assert [each.path for each in await client.configuration.diff("a", 1, 2)] == ["model"]
        check = await client.configuration.check("a", {"password": "hunter2"})
        assert (check.ok, check.problems[0].field) == (False, "password")
        with pytest.raises(SpecError, match="password"):
            await client.configuration.publish("a", {"password": "hunter2"}, reason="oh")
        restored = await client.configuration.rollback("a", 1, reason="too slow", expect=second.revision)
        assert [each.revision async for each in client.configuration.history("a")] == [1, 2, restored.revision]
        assert (await client.configuration.verify("a")).ok

        kinds = [each.kind async for each in client.events("a", kinds=["rollout."])]
        assert kinds.count("rollout.completed") >= 2
        assert [each.kind async for each in client.decisions("a")]
        assert [each.kind async for each in client.operations("b")] == ["create"]
        assert (await client.managers())[0].leads == 2
        audited = [each async for each in client.audit("a")]
        assert audited[0].actor == "file/admin"

        with pytest.raises(NotFound, match="nobody"):
            await client.cluster("nobody")
        with pytest.raises(OperationRefused, match="already"):
            await client.create(ClusterConfig(cluster_name="a", template=TEMPLATE))
        with pytest.raises(SpecError, match="replicas"):
            await client.scale("a", 5000)
        for step in (client.stop("b"), client.start("b"), client.delete("b")):
            assert (await client.finished((await step).operation_id, timeout=60)).status == "succeeded"
    async with asking(served, token="wrong") as stranger:
        with pytest.raises(AccessDenied):
            await stranger.cluster("a")
    assert served.end() == 0


async def _until(client: FleetClient, id: str, *, ready: int) -> None:
    with anyio.fail_after(60):
        while True:
            seen = await client.cluster(id)
            if seen.ready == ready and seen.status == "running":
                return
            await anyio.sleep(0.1)


@BOTH
async def test_a_stream_goes_on_across_a_restart(serve: Serve, database_url: str) -> None:
    port = _free_port()
    served = serve(database_url, port=port)
    seen: list[int] = []
    enough = anyio.Event()
    async with asking(served, timeout=60, tries=20) as client, anyio.create_task_group() as tasks:
        made = await client.create(ClusterConfig(cluster_name="a", template=TEMPLATE))
        await client.finished(made.operation_id, timeout=60)

        async def look_on() -> None:
            async for event in client.stream("a", after=0):
                seen.append(event.seq)
                if event.kind == "fleet.scaled" and event.data["to"] == 4:
                    enough.set()

        tasks.start_soon(look_on)
        await client.finished((await client.scale("a", 3)).operation_id, timeout=60)
        assert served.end() == 0
        served = serve(database_url, port=port)
        await client.finished((await client.scale("a", 4)).operation_id, timeout=60)
        with anyio.fail_after(60):
            await enough.wait()
        tasks.cancel_scope.cancel()
    async with asking(served) as client:
        everything = [each.seq async for each in client.events("a")]
    assert seen == everything[: len(seen)]
    assert len(seen) == len(set(seen)) > 10


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


async def test_two_managers_behind_one_client(serve: Serve, shared_database: str) -> None:
    """Two processes on one PostgreSQL: one is killed under changes, and each is done once."""
    one, two = serve(shared_database, identity="one"), serve(shared_database, identity="two")
    async with asking(one, two, timeout=60) as client:
        made = await client.create(ClusterConfig(cluster_name="a", template=TEMPLATE, max_replicas=50))
        await client.finished(made.operation_id, timeout=60)
        asked = [await client.scale("a", size) for size in (2, 3)]
        one.end(signal.SIGKILL)
        asked += [await client.scale("a", size) for size in (4, 5, 6)]
        for each in asked:
            assert (await client.finished(each.operation_id, timeout=60)).status == "succeeded"
        await _until(client, "a", ready=6)
        assert (await client.cluster("a")).leader == "two"
        assert [each.kind async for each in client.operations("a")] == ["scale"] * 5 + ["create"]
    assert two.end() == 0


async def test_a_manager_that_is_told_to_end_hands_over_and_finishes(serve: Serve, shared_database: str) -> None:
    one = serve(shared_database, identity="one", linger=0.5)
    async with asking(one) as client:
        made = await client.create(ClusterConfig(cluster_name="a", template=TEMPLATE))
        await client.finished(made.operation_id, timeout=60)
        two = serve(shared_database, identity="two")
        async with asking(two) as other, anyio.create_task_group() as tasks:

            async def stream() -> None:
                async for _ in client.stream("a"):
                    pass

            tasks.start_soon(stream)
            await anyio.sleep(0.3)
            began = time.monotonic()
            one.process.send_signal(signal.SIGTERM)
            await anyio.sleep(0.1)
            probed = await _get(f"{one.address}/readyz")
            assert probed.status_code == 503  # it lingers, and says so
            scaled = await client.scale("a", 3)  # and still takes what it is asked
            with anyio.fail_after(30):
                while (await other.cluster("a")).leader != "two":  # noqa: ASYNC110
                    await anyio.sleep(0.05)
            taken = time.monotonic() - began
            assert (await other.finished(scaled.operation_id, timeout=60)).status == "succeeded"
            assert await anyio.to_thread.run_sync(one.ended) == 0
            tasks.cancel_scope.cancel()
    assert taken < 7  # nobody had to wait for a lease to run out
    assert two.end() == 0


async def test_tls_with_an_authority_of_our_own(serve: Serve, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    first = authority.server("server")
    served = serve(tls_cert=str(first.certificate), tls_key=str(first.key))
    trust = ssl.create_default_context(cafile=str(authority.ca))
    assert served.address.startswith("https://")
    async with asking(served, tls=trust) as client:
        assert [each async for each in client.clusters()] == []
    async with asking(served) as distrustful:
        with pytest.raises(BackendUnavailable, match="cannot be reached"):
            await distrustful.cluster("a")
    port = urlsplit(served.address).port
    assert port is not None
    with pytest.raises(ssl.SSLError):
        _shake(port, ssl.TLSVersion.TLSv1_1)
    answer = await _get(f"{served.address}/livez", verify=str(authority.ca))
    assert "max-age" in answer.headers["strict-transport-security"]
    assert served.end() == 0


async def _get(url: str, **more: Any) -> requests.Response:
    return await anyio.to_thread.run_sync(lambda: requests.get(url, timeout=10, **more))


def _shake(port: int, most: ssl.TLSVersion) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that these versions are old is the point
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = most
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain, context.wrap_socket(plain):
        pass


async def test_a_new_certificate_is_shown_without_a_restart(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    shown, other = authority.server("one"), authority.server("two")
    context = tls_of(shown.certificate, shown.key)
    server = await asyncio.start_server(_bye, "127.0.0.1", 0, ssl=context)
    port: int = server.sockets[0].getsockname()[1]
    async with server, anyio.create_task_group() as tasks:
        tasks.start_soon(partial(keep_fresh, context, shown.certificate, shown.key, look=0.02))
        first = await anyio.to_thread.run_sync(ssl.get_server_certificate, ("127.0.0.1", port))
        await anyio.sleep(0.1)
        shown.certificate.write_bytes(b"half of it")  # a writer who is not done yet
        await anyio.sleep(0.1)
        shown.key.write_bytes(other.key.read_bytes())
        shown.certificate.write_bytes(other.certificate.read_bytes())
        with anyio.fail_after(20):
            while await anyio.to_thread.run_sync(ssl.get_server_certificate, ("127.0.0.1", port)) == first:  # noqa: ASYNC110
                await anyio.sleep(0.02)
        tasks.cancel_scope.cancel()


async def _bye(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def test_a_head_without_end_is_cut_off(serve: Serve) -> None:
    served = serve()
    port = urlsplit(served.address).port
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n")
        try:
            for _ in range(200):
                connection.sendall(b"X-Pad: " + b"y" * 1000 + b"\r\n")
            answer = connection.recv(1000)
        except OSError:
            answer = b""
    assert b" 200 " not in answer
    assert (await _get(f"{served.address}/livez")).status_code == 200
    assert served.end() == 0


# ------------------------------------------------------------------------------------------------ the command


@dataclass(frozen=True)
class Done:
    """What a command did."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Runs the command in this process: it takes seconds to import."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("agentfleet.server.logs.log_as_json", lambda _: None)

    def run(*words: str) -> Done:
        found = CliRunner().invoke(main, words)
        return Done(found.exit_code, found.stdout, found.stderr)

    return run


def test_tokens_by_command(command: Callable[..., Done]) -> None:
    made = command("token", "create", "ci", "--scope", "operate", "--fleet", "a", "--expires", "90d")
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("af_")
    again = command("token", "create", "ci", "--fleet", "a")
    assert (again.returncode, "there is or was a token 'ci'" in again.stderr) == (1, True)
    bad = command("token", "create", "c i", "--fleet", "a")
    assert (bad.returncode, "name:" in bad.stderr) == (1, True)
    listed = command("token", "list").stdout
    assert "operate" in listed
    assert made.stdout.strip().partition(".")[2] not in listed
    assert "is revoked" in command("token", "revoke", "ci").stdout
    assert "revoked" in command("token", "list").stdout
    assert command("token", "revoke", "nobody").returncode == 1


def test_tokens_by_command_are_audited(command: Callable[..., Done]) -> None:
    made = command("token", "create", "ci", "--scope", "operate", "--fleet", "a", "--expires", "90d").stdout.strip()
    command("token", "create", "ci", "--fleet", "a")
    command("token", "revoke", "ci")
    command("token", "revoke", "nobody")
    told = anyio.run(audited_in, "sqlite:///fleet.db")
    assert [(each.method, each.path, each.status) for each in told] == [
        ("CLI", "agentfleet token create", 202),
        ("CLI", "agentfleet token create", 202),
        ("CLI", "agentfleet token create", 409),
        ("CLI", "agentfleet token revoke", 202),
        ("CLI", "agentfleet token revoke", 202),
        ("CLI", "agentfleet token revoke", 404),
    ]
    assert {(each.actor, each.origin) for each in told} == {(f"cli/{user()}", "cli")}
    assert told[0].detail == f"token 'ci' ({made[3:19]}): operate on a"
    assert "there is or was a token 'ci'" in told[2].detail
    assert told[3].detail == "token 'ci'"
    assert made.partition(".")[2] not in str(told)


def test_a_command_that_cannot_be_audited_changes_nothing(
    command: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    command("token", "create", "ci", "--fleet", "a")

    async def down(*_: Any) -> None:
        raise BackendUnavailable("the database is away")

    monkeypatch.setattr(SqlAudit, "append", down)
    for words in (("create", "other", "--fleet", "a"), ("revoke", "ci")):
        refused = command("token", *words)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "nothing was changed, because it cannot be audited: the database is away" in refused.stderr
    listed = command("token", "list").stdout.splitlines()
    assert [(line.split()[0], line.split()[-1]) for line in listed[1:]] == [("ci", "valid")]


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ((), "nobody could be recognised"),
        (("--insecure-loopback", "--host", "0.0.0.0"), "only this machine is served"),
        (("--tls-cert", "x"), "give both"),
        (("--leases", "kubernetes", "--insecure-loopback"), "Kubernetes keeps them"),
        (("--token-file", "none"), "cannot be read"),
        (("--database", "mysql://x/y", "--insecure-loopback"), "use sqlite or postgresql"),
        (("--operators-may", "everything", "--insecure-loopback"), "operators may"),
    ],
)
def test_a_server_that_could_serve_nobody_does_not_start(
    command: Callable[..., Done], words: tuple[str, ...], wrong: str
) -> None:
    tried = command("serve", "--backend", "memory", "--port", "0", *words)
    assert tried.returncode == 1, tried.stderr
    assert wrong in tried.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the limits of another process are Linux's to tell")
def test_a_server_may_open_as_many_files_as_the_system_lets_it(serve: Serve) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))  # as shells and services begin
    try:
        served = serve()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    raised, _ = resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE)
    assert raised == (65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536))


@pytest.mark.parametrize(("allowed", "warned"), [(4096, True), (65_536, False)])
def test_where_too_few_files_may_be_open_the_log_says_what_to_do(
    command: Callable[..., Done],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    allowed: int,
    warned: bool,
) -> None:
    monkeypatch.setattr(serving, "raise_file_limit", lambda wanted: min(wanted, allowed))
    assert command("serve", "--backend", "memory", "--port", "0").returncode == 1, "nobody could be recognised"
    told = [each.getMessage() for each in caplog.records if "LimitNOFILE=" in each.getMessage()]
    assert len(told) == warned
    assert all("4,096" in each and "20,000 streams of agents" in each for each in told)


async def test_leases_are_renewed_while_requests_hold_every_connection(shared_database: str) -> None:
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(Database(shared_database, timeout=30.0, connections=1))
        leases = await leases_in(database, stack)
        async with database.writing():
            made = await leases.create("a", LeaseRecord("m1", 1, 10.0), timeout=20.0)
            assert (await leases.update("a", made, timeout=20.0)).holder == "m1"


async def test_a_second_manager_on_a_sqlite_file_is_refused(
    serve: Serve, tmp_path: Path, command: Callable[..., Done]
) -> None:
    served = serve(f"sqlite:///{tmp_path / 'fleet.db'}")
    tried = await anyio.to_thread.run_sync(command, "serve", "--backend=memory", "--port=0", "--insecure-loopback")
    assert (tried.returncode, "another manager runs on" in tried.stderr) == (1, True)
    assert served.end() == 0


def test_the_document_by_command(command: Callable[..., Done]) -> None:
    told = json.loads(command("openapi").stdout)
    assert told["openapi"].startswith("3.1")
    assert len(told["paths"]) == 40
