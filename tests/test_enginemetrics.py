"""What engines count themselves: shown once, summed up, kept when they are closed, and never anybody's undoing."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.fleet.world import spec

from agentfleet import Fleet, MemoryBackend, MemoryJournal
from agentfleet.backends.base import Measured
from agentfleet.manager import FleetManager
from agentfleet.measures import OTHER, Metric, Sample
from agentfleet.operations import Kind
from agentfleet.stores.fleets_memory import MemoryFleets
from agentfleet.stores.leases import MemoryLeases
from agentfleet.telemetry import Telemetry
from agentfleet.testing import virtual

MEASURES = {
    "engine_calls": Metric("counter", "Calls.", ("verb",)),
    "engine_age_seconds": Metric("gauge", "Age.", ()),
}


class Connection:
    """What several engines may share."""

    def __init__(self) -> None:
        self.calls = 0


class Engine:
    """An engine that counts."""

    measures = MEASURES

    def __init__(self, connection: Connection | None = None) -> None:
        self.connection = connection or Connection()
        self.age = 0.0
        self.more: list[Sample] = []
        self.trouble: Exception | None = None

    def samples(self) -> Iterable[Sample]:
        yield Sample("engine_calls", self.connection.calls, ("get",), of=self.connection)
        yield Sample("engine_age_seconds", self.age)
        if self.trouble is not None:
            raise self.trouble
        yield from self.more


class Counting(MemoryBackend):
    """A simulated cluster that counts."""

    measures = MEASURES

    def samples(self) -> Iterable[Sample]:
        yield Sample("engine_calls", 3, ("get",))
        yield Sample("engine_age_seconds", 1.5)


def calls(telemetry: Telemetry, verb: str = "get") -> float | None:
    return telemetry.registry.get_sample_value("engine_calls_total", {"verb": verb})


def age(telemetry: Telemetry) -> float | None:
    return telemetry.registry.get_sample_value("engine_age_seconds")


def test_it_is_shown_as_metrics_are() -> None:
    telemetry, engine = Telemetry(), Engine()
    assert isinstance(engine, Measured)
    with telemetry.measuring(engine):
        engine.connection.calls, engine.age = 2, 0.5
        families = {family.name: family for family in text_string_to_metric_families(telemetry.render().decode())}
        for name, metric in MEASURES.items():
            assert (families[name].type, families[name].documentation) == (metric.kind, metric.text)
        assert (calls(telemetry), age(telemetry)) == (2, 0.5)
        engine.connection.calls, engine.age = 5, 0.25
        assert (calls(telemetry), age(telemetry)) == (5, 0.25), "it is read when it is asked for"


def test_what_was_counted_stays_when_it_is_closed_and_how_it_stands_goes() -> None:
    telemetry, engine = Telemetry(), Engine()
    with telemetry.measuring(engine):
        with telemetry.measuring(engine):  # by a fleet in a manager
            engine.connection.calls = 4
        assert age(telemetry) == 0
        engine.connection.calls = 7  # and nobody reads it in time
    assert (calls(telemetry), age(telemetry)) == (7, None)
    with telemetry.measuring(engine):
        engine.connection.calls = 9
        assert calls(telemetry) == 9, "what is known of it is not counted again"


def test_several_engines_are_added_up_and_what_they_share_counts_once() -> None:
    telemetry, shared = Telemetry(), Connection()
    first, second, third = Engine(shared), Engine(shared), Engine()
    with telemetry.measuring(first), telemetry.measuring(second), telemetry.measuring(third):
        shared.calls, third.connection.calls = 10, 1
        first.age, second.age, third.age = 1.0, 8.0, 2.0
        assert (calls(telemetry), age(telemetry)) == (11, 8)
        third.connection = Connection()  # opened anew
        third.connection.calls = 2
        assert calls(telemetry) == 13


def test_a_count_that_falls_has_begun_anew() -> None:
    telemetry, engine = Telemetry(), Engine()
    with telemetry.measuring(engine):
        for counted, shown in ((5, 5), (2, 7), (3, 8)):
            engine.connection.calls = counted
            assert calls(telemetry) == shown


def test_labels_are_bounded() -> None:
    telemetry, engine = Telemetry(max_values=3), Engine()
    with telemetry.measuring(engine):
        engine.more = [Sample("engine_calls", 1, (f"verb-{number}",)) for number in range(10)]
        engine.more += [Sample("engine_calls", 1, ("\ud800",)), Sample("engine_calls", 1, ("x" * 1000,))]
        for _ in range(2):
            (family,) = (each for each in telemetry.registry.collect() if each.name == "engine_calls")
            assert {sample.labels["verb"] for sample in family.samples} == {"get", "verb-0", "verb-1", OTHER}
            assert calls(telemetry, OTHER) == 10
        assert telemetry.render()


JUNK: list[Any] = [
    RuntimeError("no"),
    Sample("engine_unknown", 1),
    Sample("engine_calls", 1),
    Sample("engine_calls", 1, ("get", "more")),
    Sample("engine_calls", float("nan"), ("get",)),
    Sample("engine_calls", 1, ("get",), of=()),
    Sample("engine_calls", 1, ("get",), of=[]),
    "no sample",
]


@pytest.mark.parametrize("junk", JUNK, ids=str)
def test_an_engine_that_fails_leaves_the_others_alone(junk: Any, caplog: pytest.LogCaptureFixture) -> None:
    telemetry, sound, broken = Telemetry(), Engine(), Engine()
    with telemetry.measuring(broken), telemetry.measuring(sound):
        if isinstance(junk, Exception):
            broken.trouble = junk
        else:
            broken.more = [junk]
        sound.connection.calls = 2
        assert [calls(telemetry) for _ in range(3)] == [2, 2, 2]
        assert len(caplog.records) == 1, "it is said once"
        broken.trouble, broken.more, broken.connection.calls = None, [], 1
        assert calls(telemetry) == 3
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "measures",
    [
        {"agentfleet_instances": Metric("gauge", "Another's.", ())},
        {"engine_calls": Metric("gauge", "With other labels.", ())},
        {"engine_seconds": Metric("histogram", "No such thing.", (), (1.0,))},
    ],
    ids=str,
)
def test_metrics_that_cannot_be_shown_are_no_reason_not_to_work(
    measures: dict[str, Metric], caplog: pytest.LogCaptureFixture
) -> None:
    telemetry, sound, strange = Telemetry(), Engine(), Engine()
    strange.measures = measures
    with telemetry.measuring(sound), telemetry.measuring(strange):
        assert calls(telemetry) == 0
        assert telemetry.render()
    (told,) = caplog.records
    assert (told.levelno, f"ValueError: {next(iter(measures))}: " in caplog.text) == (logging.ERROR, True)


class Unclear(MemoryBackend):
    """A simulated cluster whose word about its metrics may be none."""

    def __init__(self, said: Any) -> None:
        super().__init__()
        self.said = said

    @property
    def measures(self) -> Any:
        if isinstance(self.said, Exception):
            raise self.said
        return self.said

    def samples(self) -> Iterable[Sample]:
        return ()


UNCLEAR: list[Any] = [RuntimeError("not today"), None, ["engine_calls"], {1: MEASURES["engine_calls"], (): None}]


@pytest.mark.parametrize("said", UNCLEAR, ids=str)
@virtual
async def test_an_engine_that_cannot_say_what_it_measures_works_unmeasured(
    said: Any, caplog: pytest.LogCaptureFixture
) -> None:
    telemetry = Telemetry()
    async with Fleet(spec(1), backend=Unclear(said), telemetry=telemetry) as fleet:
        await fleet.deploy()
        assert telemetry.render()
    (told,) = [each for each in caplog.records if each.name == "agentfleet.enginemetrics"]
    assert (told.levelno, "Unclear" in told.getMessage()) == (logging.ERROR, True)


def test_who_counts_nothing_is_not_measured() -> None:
    telemetry = Telemetry()
    before = telemetry.render()
    with telemetry.measuring(MemoryBackend()):
        assert telemetry.render() == before


def test_it_may_be_read_in_other_threads() -> None:
    telemetry, shared = Telemetry(), Connection()
    with ThreadPoolExecutor(2) as pool:
        reading = [pool.submit(lambda: [telemetry.render() for _ in range(50)]) for _ in range(2)]
        while shared.calls < 50 or not all(each.done() for each in reading):
            with telemetry.measuring(Engine(shared)):
                shared.calls += 1
        for each in reading:
            each.result()
    assert calls(telemetry) == shared.calls


@virtual
async def test_a_fleet_has_its_engine_measured() -> None:
    for leases in (None, MemoryLeases()):
        telemetry = Telemetry()
        async with Fleet(spec(1), backend=Counting(), telemetry=telemetry, leases=leases):
            assert (calls(telemetry), age(telemetry)) == (3, 1.5)
        assert (calls(telemetry), age(telemetry)) == (3, None)


@virtual
async def test_a_manager_has_its_engines_measured_once_for_all_fleets() -> None:
    backend = Counting()
    async with FleetManager(MemoryFleets(), backend=backend, journal=MemoryJournal(), period=0.05) as manager:
        for name in ("a", "b"):
            created = await manager.create(spec(1, name=name))
            await manager.finished(created.id, timeout=60)
        assert (calls(manager.telemetry), age(manager.telemetry)) == (3, 1.5)
        for name in ("a", "b"):
            deleted = await manager.request(name, Kind.DELETE)
            await manager.finished(deleted.id, timeout=60)
        assert age(manager.telemetry) == 1.5, "the engine is open still"
    assert (calls(manager.telemetry), age(manager.telemetry)) == (3, None)
