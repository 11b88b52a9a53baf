"""What Prometheus sees of the backend's sight: that it is blind, for how long, and how it has come to see again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Self

import anyio
import anyio.to_thread
import pytest

pytest.importorskip("kubernetes_asyncio")
pytest.importorskip("fastapi")

from prometheus_client.parser import text_string_to_metric_families
from tests.kube.faulty import Faulty, impatient, on
from tests.kube.informer_world import STREAM, Asked, always, connect, scripted, whole, write_config
from tests.kube.world import spec
from tests.server.asking import ADMIN, Asking
from tests.test_enginemetrics import Counting

from agentfleet import MemoryJournal
from agentfleet import engines as engines_of
from agentfleet.backends.base import Measured
from agentfleet.backends.kubernetes import PODS, Forbidden, Informer, KubernetesBackend
from agentfleet.backends.kubernetes.announcer import Announced, Announcer
from agentfleet.backends.kubernetes.measures import MEASURES, samples
from agentfleet.clock import SystemClock
from agentfleet.engines import Engines
from agentfleet.errors import BackendUnavailable
from agentfleet.manager import FleetManager
from agentfleet.measures import Sample
from agentfleet.server import Admission, FileTokens, create_app
from agentfleet.stores.audit import MemoryAudit
from agentfleet.stores.fleets_memory import MemoryFleets
from agentfleet.stores.tokens import MemoryTokens
from agentfleet.telemetry import Telemetry
from agentfleet.testing.kube import ControlPlane, expired_event

Read = Callable[[], Awaitable[dict[str, float]]]
"""All that the backend shows now: "informer_relists_total pods"."""
SILENCE = 5.0
SIGHTED = SILENCE + 2.0
BLIND = SILENCE + 4.0
KINDS = ("pods", "deployments", "nodes", "leases")


def series(text: str) -> dict[str, float]:
    """The backend's samples in a text of metrics, by their names and labels' values."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("agentfleet_kubernetes_"):
                name = sample.name.removeprefix("agentfleet_kubernetes_")
                found[" ".join((name, *sample.labels.values()))] = sample.value
    return found


# ------------------------------------------------------------------------------------------------ what is shown


def test_a_backend_that_is_not_open_shows_nothing() -> None:
    backend, telemetry = KubernetesBackend(), Telemetry()
    assert isinstance(backend, Measured)
    with telemetry.measuring(backend):
        assert series(telemetry.render().decode()) == {}


class Once(SystemClock):
    """For an informer that does not try again, so that nothing is under way when it is looked at."""

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep_forever()


@pytest.mark.integration
def test_a_server_that_has_never_answered_is_silent_since_it_was_asked(tmp_path: Path) -> None:
    """And every metric has a value, in whatever thread it is asked for."""

    async def test() -> None:
        async with scripted(always(whole(503, b"later"))) as there:
            config = write_config(tmp_path, there.url)
            async with (
                connect(config, qps=1, burst=1) as connection,  # so slow that even on a busy machine it holds us up
                Informer(connection, PODS, clock=Once()) as pods,
            ):
                announcer = Announcer(connection, lambda *_: None)
                announcer.announced = Announced(written=3, counted=4, limited=5, dropped=6, failed=7)

                def read() -> dict[str, float]:
                    found = samples(connection, {"pods": pods}, announcer)
                    return {" ".join((each.name, *each.labels)): each.value for each in found}

                with anyio.fail_after(20):
                    while not pods.metrics.failures:  # noqa: ASYNC110 - it has no event
                        await anyio.sleep(0.02)
                shown = await anyio.to_thread.run_sync(read)
                assert {each.partition(" ")[0] for each in shown} == set(MEASURES)
                assert pods.staleness == float("inf"), "nothing was ever seen"
                assert 0 < shown["agentfleet_kubernetes_informer_staleness_seconds pods"] < 20
                assert shown["agentfleet_kubernetes_informer_failures pods"] >= 1
                assert shown["agentfleet_kubernetes_informer_relists pods"] == pods.metrics.relists
                calls = shown["agentfleet_kubernetes_api_calls"]
                assert calls == shown["agentfleet_kubernetes_api_failures"] > 1
                assert calls == shown["agentfleet_kubernetes_api_overloads"]
                assert 0 < shown["agentfleet_kubernetes_api_repeated"] < calls
                assert shown["agentfleet_kubernetes_api_throttled_seconds"] > 0
                assert shown["agentfleet_kubernetes_api_writes"] == 0
                assert shown["agentfleet_kubernetes_events_written"] == 7
                lost = [shown[f"agentfleet_kubernetes_events_lost {why}"] for why in ("limited", "dropped", "failed")]
                assert lost == [5, 6, 7]
            names = [each.name for each in samples(connection, {"pods": pods}, None)]
            assert "agentfleet_kubernetes_informer_staleness_seconds" not in names, "nobody listens any more"

    anyio.run(test)


@pytest.mark.integration
def test_a_manager_that_never_got_through_is_blind_since_it_was_tried(tmp_path: Path) -> None:
    """Whatever is tried anew meanwhile; as soon as the server answers, it counts from its word."""
    served: list[bytes] = [whole(403, b"not yet")]

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        groups = [
            {"name": name, "versions": [{"groupVersion": f"{name}/{version}", "version": version}]}
            for name, version in (("policy", "v1"), ("autoscaling", "v2"), ("apps", "v1"))
        ]
        bodies: dict[str, dict[str, Any]] = {
            "/version": {"major": "1", "minor": "25", "gitVersion": "v1.25.0"},
            "/apis": {"groups": groups},
        }
        listed: dict[str, Any] = {"metadata": {"resourceVersion": "1"}, "items": []}
        if served:
            writer.write(served[0])
        elif "watch" in asked.query:
            writer.write(STREAM)
            await asyncio.sleep(30)
        else:
            writer.write(whole(200, bodies.get(asked.path, listed)))

    async def test() -> None:
        async with scripted(answer) as there, connect(write_config(tmp_path, there.url)) as connection:
            telemetry = Telemetry()
            ages = [f"informer_staleness_seconds {kind}" for kind in KINDS]

            def shown() -> dict[str, float]:
                return series(telemetry.render().decode())

            engines = Engines(lambda _: KubernetesBackend(connection, namespace="work"), telemetry=telemetry)
            async with anyio.create_task_group() as tasks:
                await tasks.start(engines.run)
                for _ in range(3):
                    with pytest.raises(Forbidden):
                        await engines.of("work")
                    await anyio.sleep(0.2)
                    assert all(shown()[age] > 0.15 for age in ages), "also between two tries"
                assert all(shown()[age] > 0.55 for age in ages), "it is not counted anew with each"
                assert len(telemetry._engines._engines) == 1
                served.clear()
                await engines.of("work")
                await anyio.sleep(0.1)
                assert all(shown()[age] < 0.5 for age in ages)
                assert len(telemetry._engines._engines) == 1
                tasks.cancel_scope.cancel()
            assert not any(age in shown() for age in ages)

            backend = KubernetesBackend(connection, namespace="work")
            served.append(whole(403, b"not yet"))
            with telemetry.measuring(backend):
                for _ in range(2):
                    with pytest.raises(Forbidden):
                        async with backend:
                            pass
                    await anyio.sleep(0.2)
                assert all(shown()[age] > 0.4 for age in ages), "one that is opened again goes on, too"

    anyio.run(test)


def test_what_could_not_be_opened_and_is_not_asked_for_any_more_is_not_shown_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engines_of, "_SHOWN", 0.1)

    class Shut(Counting):
        async def __aenter__(self) -> Self:
            raise BackendUnavailable("away")

    async def test() -> None:
        telemetry = Telemetry()
        engines = Engines(lambda _: Shut(), telemetry=telemetry)
        async with anyio.create_task_group() as tasks:
            await tasks.start(engines.run)
            with pytest.raises(BackendUnavailable):
                await engines.of("work")
            assert telemetry.registry.get_sample_value("engine_age_seconds") == 1.5
            await anyio.sleep(0.3)
            assert telemetry.registry.get_sample_value("engine_age_seconds") is None
            tasks.cancel_scope.cancel()

    anyio.run(test)


def test_labels_are_those_of_the_metrics() -> None:
    for each in samples(None, {}, Announcer(None, lambda *_: None)):  # type: ignore[arg-type]
        assert isinstance(each, Sample)
        assert len(each.labels) == len(MEASURES[each.name].labels)


# ------------------------------------------------------------------------------------------------ on a real server


async def until(read: Read, holds: Callable[[dict[str, float]], bool], seconds: float = 60.0) -> dict[str, float]:
    """What is shown as soon as it is so."""
    with anyio.fail_after(seconds):
        while not holds(shown := await read()):  # noqa: ASYNC110 - it has no event
            await anyio.sleep(0.1)
    return shown


async def goes_blind_and_sees_again(there: Faulty, read: Read) -> None:
    """The network swallows the watches, then is healed; then the API server has forgotten the history of the pods."""
    ages = [f"informer_staleness_seconds {kind}" for kind in KINDS]
    shown = await until(read, lambda shown: all(shown[age] < SIGHTED for age in ages))
    assert shown["informer_events_total pods"] > 0
    assert shown["api_calls_total"] > shown["api_writes_total"] > 0
    assert shown["events_written_total"] > 0

    there.proxy.half_open()
    blind = await until(read, lambda shown: all(shown[age] > BLIND for age in ages))
    noticed = [blind[f"informer_failures_total {kind}"] > 0 for kind in KINDS if kind != "leases"]
    assert all(noticed), "the backend is more patient with leases"
    assert blind["api_failures_total"] > shown["api_failures_total"]

    await there.proxy.heal()
    healed = await until(read, lambda shown: all(shown[age] < SIGHTED for age in ages))
    for kind in KINDS:
        again = f"informer_reconnects_total {kind}", f"informer_relists_total {kind}"
        assert sum(healed[each] - blind[each] for each in again) > 0

    there.proxy.inject(expired_event(), path="/pods")
    for name in [pod["metadata"]["name"] for pod in (await _pods(there))][:1]:
        await there.plane.api.delete(f"/api/v1/namespaces/{there.namespace}/pods/{name}")
    anew = await until(read, lambda shown: shown["informer_relists_total pods"] > healed["informer_relists_total pods"])
    assert anew["informer_expired_total pods"] == 1
    assert all(anew[name] >= value for name, value in healed.items() if "_total" in name), "counters never fall"


async def _pods(there: Faulty) -> list[dict[str, dict[str, str]]]:
    listed = await there.plane.api.get(f"/api/v1/namespaces/{there.namespace}/pods")
    found: list[dict[str, dict[str, str]]] = listed["items"]
    return found


@pytest.mark.integration
@pytest.mark.slow
def test_a_fleets_registry_shows_a_blind_watch(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch, silence=SILENCE)

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(2)) as fleet:
            await fleet.deploy(timeout=60)

            async def read() -> dict[str, float]:
                return series((await anyio.to_thread.run_sync(fleet.telemetry.render)).decode())

            await goes_blind_and_sees_again(there, read)
        closed = await read()
        assert not [name for name in closed if "staleness" in name]
        assert closed["informer_expired_total pods"] == 1

    on(plane, test)


@pytest.mark.integration
@pytest.mark.slow
def test_a_managers_route_shows_a_blind_watch(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    impatient(monkeypatch, silence=SILENCE)
    tokens = tmp_path / "tokens"
    tokens.write_text(f"admin admin * {ADMIN}\n")

    async def test(there: Faulty) -> None:
        manager = FleetManager(
            MemoryFleets(),
            backend=lambda namespace: KubernetesBackend(there.connection, namespace=namespace),
            journal=MemoryJournal(),
        )
        app = create_app(
            manager,
            tokens=MemoryTokens(),
            sources=[FileTokens(tokens)],
            audit=MemoryAudit(),
            admission=Admission(engine="kubernetes"),
        )
        ask = Asking(app)

        async def read() -> dict[str, float]:
            reply = await ask("GET", "/metrics")
            assert reply.status == 200, reply.body
            return series(reply.body.decode())

        async with manager:
            created = await manager.create(spec(2), namespace=there.namespace)
            done = await manager.finished(created.id, timeout=60)
            assert done.status == "succeeded", done
            await goes_blind_and_sees_again(there, read)

    on(plane, test, leases=False)
