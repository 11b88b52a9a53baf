"""Probes of real sockets and of your own functions."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio
import pytest
from anyio.abc import SocketStream
from hypothesis import given
from hypothesis import strategies as st

from agentfleet.clock import SystemClock
from agentfleet.instances import AgentStatus, Instance, Phase
from agentfleet.signals.http import HttpClient
from agentfleet.signals.probes import SocketProber, parse_status
from agentfleet.specs import CustomCheck, HeartbeatCheck, HttpCheck, TcpCheck

pytestmark = pytest.mark.anyio

Serving = Callable[[Callable[[SocketStream], object]], AbstractAsyncContextManager[str]]
LONG = 30.0


def instance(address: str | None = None) -> Instance:
    return Instance("a-1", "a", 0, 1, "1", Phase.RUNNING, 0.0, 0.0, address=address)


@asynccontextmanager
async def prober() -> AsyncIterator[SocketProber]:
    async with HttpClient() as http:
        yield SocketProber(http, SystemClock())


def answering(body: bytes, status: int = 200) -> Callable[[SocketStream], object]:
    async def handler(stream: SocketStream) -> None:
        while True:
            request = await stream.receive()
            text = body.replace(b"{credential}", request.partition(b"Bearer ")[2].partition(b"\r\n")[0])
            await stream.send(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(text), text))

    return handler


@pytest.mark.parametrize(("status", "passes"), [(200, True), (204, True), (302, True), (400, False), (503, False)])
async def test_http_passes_from_200_to_399(serving: Serving, status: int, passes: bool) -> None:
    async with serving(answering(b"", status)) as address, prober() as ask:
        probed = await ask.probe(instance(address), 7, HttpCheck(timeout=LONG))
    assert (probed.check, probed.ok, probed.status) == (7, passes, None)
    assert probed.error == (None if passes else f"GET /health of {address} answered {status}")
    assert 0 <= probed.latency < LONG


async def test_status_is_read(serving: Serving) -> None:
    body = b'{"state": "busy", "in_flight": 2, "last_progress": 1.5, "task": "{credential}", "new": [1]}'
    async with serving(answering(body)) as address, prober() as ask:
        probed = await ask.probe(instance(address), 0, HttpCheck(path="/status", timeout=LONG), "s3cret")
    assert probed.ok
    assert probed.status == AgentStatus("busy", 2, last_progress=1.5, task="s3cret")


async def test_status_is_read_from_a_refusal_and_garbage_is_no_failure(serving: Serving) -> None:
    check = HttpCheck(path="/status?brief=1", timeout=LONG)
    async with serving(answering(b'{"state": "draining"}', 503)) as address, prober() as ask:
        probed = await ask.probe(instance(address), 0, check)
    assert (probed.ok, probed.status) == (False, AgentStatus("draining"))
    async with serving(answering(b"<html>")) as address, prober() as ask:
        probed = await ask.probe(instance(address), 0, check)
    assert (probed.ok, probed.status) == (True, None)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        ({}, AgentStatus()),
        ({"state": "on fire", "in_flight": -1, "queue_length": True, "completed": 1.5}, AgentStatus()),
        ({"in_flight": 10**30, "last_progress": -1, "failed": "3", "cause": 7}, AgentStatus()),
        ({"cause": "x" * 1000, "version": None, "config_revision": 4}, AgentStatus(cause="x" * 256, config_revision=4)),
        ({"last_progress": 3, "task": "t", "version": "2"}, AgentStatus(last_progress=3.0, task="t", version="2")),
    ],
)
def test_statuses_are_read_field_by_field(data: dict[str, object], status: AgentStatus) -> None:
    assert parse_status(json.dumps(data).encode()) == status


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"1", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000]
)
def test_garbage_is_no_status(body: bytes) -> None:
    assert parse_status(body) is None


def test_not_a_number_is_no_span() -> None:
    for word in (b"NaN", b"Infinity", b"-Infinity", b"1e999"):
        status = parse_status(b'{"last_progress": %s}' % word)
        assert status is not None
        assert status.last_progress is None


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.dictionaries(st.text(), x)))
def test_any_json_is_tolerated(value: object) -> None:
    for name in ("state", "in_flight", "last_progress", "cause"):
        status = parse_status(json.dumps({name: value}).encode())
        assert status is not None
        assert status.state in ("idle", "busy", "draining")


async def test_tcp(serving: Serving) -> None:
    async with serving(answering(b"")) as address, prober() as ask:
        assert (await ask.probe(instance(address), 0, TcpCheck(timeout=LONG))).ok
    async with prober() as ask:
        probed = await ask.probe(instance(address), 0, TcpCheck(timeout=LONG))
    assert not probed.ok
    assert probed.error is not None
    assert "refused" in probed.error


async def test_a_frozen_agent_fails_by_its_deadline(serving: Serving) -> None:
    async def freeze(stream: SocketStream) -> None:
        await anyio.sleep_forever()

    async with serving(freeze) as address, prober() as ask:
        probed = await ask.probe(instance(address), 0, HttpCheck(timeout=0.05))
    assert not probed.ok
    assert probed.latency >= 0.05
    assert probed.error is not None
    assert "within 0.05 s" in probed.error


@pytest.mark.parametrize("address", [None, "nonsense"])
async def test_an_address_that_is_none_fails(address: str | None) -> None:
    async with prober() as ask:
        for check in (HttpCheck(), TcpCheck()):
            probed = await ask.probe(instance(address), 0, check)
            assert not probed.ok
            assert probed.error


def says_yes(subject: Instance) -> bool:
    return subject.id == "a-1"


class Checks:
    """Where a check may live."""

    @staticmethod
    async def says_yes_later(subject: Instance) -> bool:
        await anyio.lowlevel.checkpoint()
        return says_yes(subject)


async def hangs(subject: Instance) -> bool:
    await anyio.sleep_forever()
    return True


def fails(subject: Instance) -> bool:
    raise ZeroDivisionError("no luck")


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (says_yes, None),
        (Checks.says_yes_later, None),
        ("json:dumps", "raised TypeError"),
        ("os.path:sep.join", "raised TypeError"),
        ("os.path:sep", "raised TypeError"),
        ("no.such.module:x", "raised ModuleNotFoundError"),
        ("json:no_such", "raised AttributeError"),
        (lambda _: False, "said no"),
        (lambda _: None, "said no"),
        (fails, "raised ZeroDivisionError('no luck')"),
        (hangs, "did not answer within 0.05 s"),
    ],
)
async def test_custom(call: Callable[..., object] | str, error: str | None) -> None:
    async with prober() as ask:
        probed = await ask.probe(instance(), 0, CustomCheck(call=call, timeout=0.05 if call is hangs else LONG))
    assert probed.ok is (error is None)
    assert error is None or error in (probed.error or "")


async def test_heartbeats_cannot_be_asked_for() -> None:
    async with prober() as ask:
        assert not (await ask.probe(instance(), 0, HeartbeatCheck())).ok
