"""The informer on a real API server: the truth, whatever happens to server, network and history."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing
from pathlib import Path

import anyio
import pytest
from tests.kube.informer_world import Interrupted, proxied, write_config

from agentfleet.backends.kubernetes import (
    MERGE_PATCH,
    PODS,
    AlreadyExists,
    Changed,
    Connection,
    Discovery,
    Forbidden,
    Informer,
    Invalid,
    KubeConfig,
    NotFound,
    Pod,
    Removed,
    Replaced,
    Snapshot,
    Unauthenticated,
    Unreachable,
    credentials,
)
from agentfleet.errors import BackendRefused, Conflict, DeadlineExceeded
from agentfleet.testing.kube import AssetsMissing, ControlPlane, PlaneOptions

pytestmark = [pytest.mark.anyio, pytest.mark.slow]  # not `integration`: a restarted API server is a new child process


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def plane() -> Iterator[ControlPlane]:
    """One control plane for the module; pods are left alone by garbage collection, as their owners need not exist."""
    plane = ControlPlane(PlaneOptions(controllers=("*", "-garbagecollector", "-podgc")))
    try:
        anyio.run(plane.start)
    except AssetsMissing as error:
        pytest.skip(f"NO KUBERNETES HERE: {error}")
    try:
        yield plane
    finally:
        anyio.run(plane.stop)


@pytest.fixture
async def namespace(plane: ControlPlane) -> str:
    return await plane.namespace()


@pytest.fixture
async def connection(plane: ControlPlane) -> AsyncIterator[Connection]:
    async with Connection(KubeConfig(plane.kubeconfig()), qps=1000, burst=1000) as connection:
        yield connection


def manifest(name: str, **labels: str) -> bytes:
    container = {"name": "c", "image": "i", "env": [{"name": "A", "value": "b"}]}
    spec = {"schedulerName": "nobody", "terminationGracePeriodSeconds": 0, "containers": [container]}
    return json.dumps({"metadata": {"name": name, "labels": labels}, "spec": spec}).encode()


async def create(connection: Connection, namespace: str, name: str, **labels: str) -> Pod:
    return PODS.read(await connection.request("POST", PODS.path(namespace), body=manifest(name, **labels)))


async def label(connection: Connection, namespace: str, name: str, value: str) -> Pod:
    body = json.dumps({"metadata": {"labels": {"turn": value}}}).encode()
    path = PODS.path(namespace, name)
    return PODS.read(await connection.request("PATCH", path, body=body, content_type=MERGE_PATCH))


async def delete(connection: Connection, namespace: str, name: str) -> None:
    await connection.request("DELETE", PODS.path(namespace, name), body=b'{"gracePeriodSeconds":0}')


async def versions(connection: Connection, namespace: str, selector: str = "") -> dict[str, tuple[str, str]]:
    """The truth: uid and resource version of every pod by name."""
    query = {"labelSelector": selector} if selector else None
    page = PODS.read_page(await connection.request("GET", PODS.path(namespace), query=query))
    return marks({each.metadata.name: each for each in page.items or ()})


def marks(pods: Mapping[str, Pod]) -> dict[str, tuple[str, str]]:
    return {pod.metadata.name: (pod.metadata.uid, pod.metadata.resource_version) for pod in pods.values()}


async def until(holds: Callable[[], object], seconds: float = 30) -> None:
    with anyio.fail_after(seconds):
        while not holds():  # noqa: ASYNC110 - what is waited for has no event
            await anyio.sleep(0.02)


async def churn(connection: Connection, namespace: str, rng: random.Random, steps: int) -> None:
    """Random creates, updates, deletes and recreations under the same name."""
    there: set[str] = set()
    for step in range(steps):
        name = f"p{rng.randrange(12)}"
        try:
            if name not in there:
                await create(connection, namespace, name, turn=str(step % 2))
                there.add(name)
            elif rng.random() < 0.5:
                await label(connection, namespace, name, str(step % 2))
            else:
                await delete(connection, namespace, name)
                there.discard(name)
        except (AlreadyExists, NotFound):
            continue  # a repeated call whose first answer was lost


@pytest.mark.parametrize("seed", range(3))
async def test_it_equals_the_truth_under_random_changes(connection: Connection, namespace: str, seed: int) -> None:
    rng = random.Random(seed)
    mirror: dict[str, Pod] = {}

    async with (
        Informer(connection, PODS, namespace=namespace, page=3, watch_for=1, rng=rng) as pods,
        Informer(connection, PODS, namespace=namespace, labels={"turn": "1"}) as odd,
        anyio.create_task_group() as tasks,
    ):

        async def read() -> None:
            async with aclosing(pods.events()) as events:
                async for event in events:
                    match event:
                        case Snapshot():
                            mirror.update({each.metadata.uid: each for each in event.objects})
                        case Changed():
                            mirror[event.object.metadata.uid] = event.object
                        case Removed():
                            mirror.pop(event.object.metadata.uid, None)

        tasks.start_soon(read)
        await churn(connection, namespace, rng, 150)
        last = await create(connection, namespace, "last", turn="1")
        await pods.wait_for(last.metadata.resource_version)
        await odd.wait_for(last.metadata.resource_version)
        truth = await versions(connection, namespace)
        assert marks(pods.cache) == truth
        assert marks(odd.cache) == await versions(connection, namespace, "turn=1")
        await until(lambda: marks(mirror) == truth, 5)
        assert pods.metrics.lists == 1
        tasks.cancel_scope.cancel()


async def test_it_shows_our_own_write_before_we_decide_again(connection: Connection, namespace: str) -> None:
    async with Informer(connection, PODS, namespace=namespace) as pods:
        for number in range(20):
            pod = await create(connection, namespace, f"p{number}")
            await pods.wait_for(pod.metadata.resource_version)
            assert pods.cache[f"{namespace}/p{number}"].metadata.uid == pod.metadata.uid
        assert pods.staleness < 5


async def test_a_half_open_watch_is_noticed(plane: ControlPlane, connection: Connection, namespace: str) -> None:
    async with proxied(plane.access.server) as (proxy, url):
        config = plane.kubeconfig(server=url)
        async with (
            Connection(KubeConfig(config), read_timeout=2, connect_timeout=2) as through,
            Informer(through, PODS, namespace=namespace, silence=2) as pods,
        ):
            await pods.wait_synced()
            await until(lambda: pods.metrics.watches)
            proxy.swallow = True
            pod = await create(connection, namespace, "unseen")
            with pytest.raises(DeadlineExceeded):
                await pods.wait_for(pod.metadata.resource_version, timeout=1)
            assert pods.staleness >= 1
            await until(lambda: pods.metrics.failures)
            proxy.swallow = False
            await pods.wait_for(pod.metadata.resource_version, timeout=20)
            assert pods.metrics.relists == 0
            proxy.cut()
            after = await create(connection, namespace, "after")
            await pods.wait_for(after.metadata.resource_version, timeout=20)
            assert marks(pods.cache) == await versions(connection, namespace)


async def test_the_server_is_killed_and_comes_back_with_compacted_history(
    plane: ControlPlane, connection: Connection, namespace: str
) -> None:
    async with (
        proxied(plane.access.server) as (proxy, url),
        Connection(KubeConfig(plane.kubeconfig(server=url)), read_timeout=5, connect_timeout=2) as through,
        Informer(through, PODS, namespace=namespace, silence=5) as pods,
    ):
        await pods.wait_synced()
        old = await create(connection, namespace, "old")
        await pods.wait_for(old.metadata.resource_version)
        await until(lambda: pods.metrics.watches)
        proxy.swallow = True  # it misses what happens now, and then all memory of it is lost
        proxy.cut()
        await churn(connection, namespace, random.Random(7), 60)
        await delete(connection, namespace, "old")
        again = await create(connection, namespace, "old")
        await plane.compact(forget=True)
        proxy.swallow = False
        await pods.wait_for(again.metadata.resource_version, timeout=30)
        assert marks(pods.cache) == await versions(connection, namespace)
        assert pods.cache[f"{namespace}/old"].metadata.uid == again.metadata.uid
        assert pods.metrics.relists >= 1
        assert pods.metrics.expired >= 1


async def test_a_list_whose_continuation_is_compacted_away_begins_anew(
    plane: ControlPlane, connection: Connection, namespace: str
) -> None:
    for number in range(6):
        await create(connection, namespace, f"p{number}")
    first = PODS.read_page(await connection.request("GET", PODS.path(namespace), query={"limit": 2}))
    await create(connection, namespace, "later")
    await plane.compact()
    with pytest.raises(Conflict):
        query: dict[str, str | int | bool] = {"limit": 2, "continue": first.metadata.continue_token}
        await connection.request("GET", PODS.path(namespace), query=query)
    async with Informer(connection, PODS, namespace=namespace, page=2) as pods:
        await pods.wait_synced()
        assert len(pods.cache) == 7


@pytest.mark.parametrize("lists", [1, 3])
async def test_a_long_list_that_expires_in_its_middle_begins_anew_and_ends_complete(
    plane: ControlPlane, connection: Connection, namespace: str, lists: int
) -> None:
    """What was on the pages before may be gone by then; each attempt costs its pages and no more, after a pause."""
    async with anyio.create_task_group() as tasks:
        for number in range(300):
            tasks.start_soon(create, connection, namespace, f"p{number:03}")
    turn = 0

    async def happens() -> None:
        nonlocal turn
        turn += 1
        await delete(connection, namespace, f"p{turn:03}")  # it was read
        await delete(connection, namespace, f"p{turn + 10:03}")
        await create(connection, namespace, f"p{turn + 10:03}")  # a namesake of one that was read
        await create(connection, namespace, f"o{turn:03}")  # it would have been on the first page
        await plane.compact()

    cut = Interrupted(connection, happens, pages=5, lists=lists)
    begun = anyio.current_time()
    async with Informer(cut, PODS, namespace=namespace, page=20) as pods:
        await pods.wait_synced()
        took = anyio.current_time() - begun
        assert len(pods.cache) == 300
        assert marks(pods.cache) == await versions(connection, namespace)
        assert (pods.metrics.lists, pods.metrics.expired, pods.metrics.failures) == (lists + 1, lists, 0)
        assert cut.asked == lists * 6 + 15
        assert took >= sum(0.1 * 2**attempt for attempt in range(lists)), "it waits longer each time"
        late = await create(connection, namespace, "late")
        await pods.wait_for(late.metadata.resource_version)  # and it watches from there
        assert marks(pods.cache) == await versions(connection, namespace)


async def test_a_later_list_that_expires_in_its_middle_takes_nothing_away(
    plane: ControlPlane, connection: Connection, namespace: str
) -> None:
    """What half a list has not shown is still there; only what is gone is told to be."""
    for number in range(20):
        await create(connection, namespace, f"p{number:02}")

    async def happens() -> None:
        await delete(connection, namespace, "p00")
        await plane.compact()

    cut = Interrupted(connection, happens, pages=2, lists=0)
    removed: list[str] = []
    async with (
        Informer(cut, PODS, namespace=namespace, page=4, relist_every=2) as pods,
        anyio.create_task_group() as tasks,
    ):

        async def read() -> None:
            async with aclosing(pods.events()) as events:
                async for event in events:
                    assert len(pods.cache) >= 19
                    if isinstance(event, Removed):
                        removed.append(event.object.metadata.name)

        await pods.wait_synced()
        tasks.start_soon(read)
        cut.lists = 1
        await until(lambda: pods.metrics.expired)
        again = pods.metrics.lists
        await until(lambda: pods.metrics.lists > again + 1)  # the one after it is complete
        assert removed == ["p00"]
        assert marks(pods.cache) == await versions(connection, namespace)
        tasks.cancel_scope.cancel()


async def test_an_outage_is_waited_out_and_then_all_is_true_again(
    plane: ControlPlane, connection: Connection, namespace: str
) -> None:
    async with Informer(connection, PODS, namespace=namespace) as pods:
        await create(connection, namespace, "before")
        await until(lambda: f"{namespace}/before" in pods.cache)
        plane.kill_apiserver()
        with pytest.raises(Unreachable):
            await connection.request("GET", PODS.path(namespace), timeout=2)
        assert f"{namespace}/before" in pods.cache  # nothing seen is not nothing there
        calls = connection.traffic.calls
        await anyio.sleep(3)
        assert connection.traffic.calls - calls < 12
        await plane.restart_apiserver()
        after = await create(connection, namespace, "after")
        await pods.wait_for(after.metadata.resource_version, timeout=30)
        assert marks(pods.cache) == await versions(connection, namespace)


async def test_refusals_of_a_real_server(plane: ControlPlane, connection: Connection, namespace: str) -> None:
    pod = await create(connection, namespace, "p")
    path = PODS.path(namespace, "p")
    with pytest.raises(AlreadyExists):
        await create(connection, namespace, "p")
    with pytest.raises(NotFound):
        await connection.request("GET", PODS.path(namespace, "nobody"))
    with pytest.raises(Invalid) as invalid:
        body = json.loads(manifest("q"))
        body["spec"]["containers"][0]["name"] = "Not A Name"
        await connection.request("POST", PODS.path(namespace), body=json.dumps(body).encode())
    assert invalid.value.fields == ("spec.containers[0].name",)
    with pytest.raises(Conflict):
        stale = json.dumps({"metadata": {"resourceVersion": "1", "labels": {"a": "b"}}}).encode()
        await connection.request("PATCH", path, body=stale, content_type=MERGE_PATCH)
    with pytest.raises(Replaced):
        other = json.dumps({"preconditions": {"uid": "another"}}).encode()
        await connection.request("DELETE", path, body=other)
    async with Connection(KubeConfig(plane.kubeconfig(plane.nobody))) as nobody:
        with pytest.raises(Forbidden):
            await nobody.request("GET", path)
        async with Informer(nobody, PODS, namespace=namespace) as pods:
            with pytest.raises(Forbidden):
                await pods.wait_synced()
    async with Connection(KubeConfig(plane.kubeconfig(plane.access.with_token("wrong")))) as stranger:
        with pytest.raises(Unauthenticated):
            await stranger.request("GET", path)
        assert stranger.traffic.reauthenticated == 1
    assert (await versions(connection, namespace))["p"][0] == pod.metadata.uid


async def test_new_certificates_get_a_new_client_while_watches_go_on(
    plane: ControlPlane, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plane.access.ca is not None
    authority = tmp_path / "ca.pem"
    authority.write_text(plane.access.ca)
    user = {"token": plane.access.token}
    config = write_config(tmp_path, plane.access.server, user, **{"certificate-authority": "ca.pem"})
    async with Connection(KubeConfig(config)) as connection, Informer(connection, PODS, namespace=namespace) as pods:
        await pods.wait_synced()
        await until(lambda: pods.metrics.watches)
        monkeypatch.setattr(credentials, "REREAD", 0.0)
        authority.write_text("# rotated\n" + plane.access.ca)
        pod = await create(connection, namespace, "p")
        await pods.wait_for(pod.metadata.resource_version)
        assert (connection.traffic.clients, pods.metrics.watches, pods.metrics.failures) == (2, 1, 0)
        authority.unlink()  # just being replaced: the old one stays in use
        await connection.request("GET", PODS.path(namespace))


async def test_discovery(plane: ControlPlane, connection: Connection) -> None:
    discovery = Discovery(connection)
    assert await discovery.server_version() == plane.version
    wanted = "v1" if plane.version >= (1, 21) else "v1beta1"
    assert await discovery.choose("policy", ["v1", "v1beta1"], "poddisruptionbudgets") == wanted
    assert "patch" in (await discovery.kinds("", "v1"))["pods"]
    assert await discovery.kinds("nobody.example.com", "v1") == {}
    with pytest.raises(BackendRefused, match="wanted is v9"):
        await discovery.choose("policy", ["v9"])
