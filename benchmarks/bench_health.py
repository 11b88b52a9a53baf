"""What health costs: one decision at any fleet size, the memory of one instance, and probes a second.

The named peer for probes is a plain client on asyncio's streams, which is what one would write without this library;
both ask the same server, which runs in a process of its own, in the same run, in turns.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import multiprocessing.connection
import statistics
import sys
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any

from agentfleet.clock import SystemClock
from agentfleet.core.health import Beat, HealthMemory, Probed, Seen, Signal, decide
from agentfleet.health import HealthMonitor
from agentfleet.instances import Instance, Phase
from agentfleet.signals.http import HttpClient
from agentfleet.signals.probes import SocketProber, parse_status
from agentfleet.specs import Check, HealthPolicy, HeartbeatCheck, HttpCheck
from agentfleet.testing import run_virtual

NOW = 1_700_000_000.0
PROBED = HealthPolicy(checks=(HttpCheck(period=2.0, failures=5),))
BEATEN = HealthPolicy(checks=(HeartbeatCheck(),))
BODY = b'{"state":"busy","in_flight":1,"queue_length":0,"last_progress":0.2,"completed":7,"failed":0}'
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
CONNECTIONS = 64
ROUNDS = 7


def row(name: str, size: int, seconds: float, count: int, note: str) -> dict[str, Any]:
    """One line of the table."""
    return {"name": name, "size": size, "seconds": seconds, "per_item": seconds / count, "note": note}


# ------------------------------------------------------------------------------------------------ decisions


def fleet(policy: HealthPolicy, size: int) -> list[HealthMemory]:
    """Memories of that many healthy instances."""
    memories = []
    for number in range(size):
        at = NOW + number / size
        _, memory = decide(policy, Seen(Phase.RUNNING, at, started_at=at), HealthMemory(), at)
        signals: list[Signal] = [Probed(0, True, at + 1, 0.01), Beat(at + 1), Beat(at + 2)]
        for signal in signals:
            _, memory = decide(policy, signal, memory, signal.at)
        memories.append(memory)
    return memories


def decisions(policy: HealthPolicy, size: int, signal: Callable[[int], Signal], name: str) -> dict[str, Any]:
    """Time of one decision when events come from all over the fleet."""
    memories = fleet(policy, size)
    events = 20_000
    stride = 7919  # all over the fleet, as events come
    best = float("inf")
    for turn in range(ROUNDS):
        given = [signal(turn * events + event) for event in range(events)]
        start = time.process_time()
        for event, one in enumerate(given):
            place = event * stride % size
            _, memories[place] = decide(policy, one, memories[place], one.at)
        best = min(best, time.process_time() - start)
    return row(name, size, best, events, f"CPU, best of {ROUNDS}")


def remembered(policy: HealthPolicy, name: str) -> dict[str, Any]:
    """Bytes of one memory beyond what all share."""
    size = 20_000
    fleet(policy, 10)
    gc.collect()
    tracemalloc.start()
    memories = fleet(policy, size)
    gc.collect()
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    each = (used - sys.getsizeof(memories)) / size
    return {"name": name, "size": size, "seconds": 0.0, "per_item": each, "note": "bytes an instance"}


# ------------------------------------------------------------------------------------------------ probes


class Server(asyncio.Protocol):
    """Answers each request with a status."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to answer."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer what was asked."""
        self.transport.write(ANSWER * data.count(b"\r\n\r\n"))


def serve(pipe: multiprocessing.connection.Connection) -> None:
    """Serve until told to stop; tells the port first."""

    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)

    asyncio.run(main())


async def with_streams(address: str, count: int, *, parsed: bool = False) -> None:
    """The peer: one asyncio stream a connection, the same deadline, the same answer read to its end."""
    host, port = address.split(":")

    async def work(quota: int) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        for _ in range(quota):
            async with asyncio.timeout(5.0):
                writer.write(f"GET /status HTTP/1.1\r\nHost: {address}\r\n\r\n".encode())
                await writer.drain()
                head = await reader.readuntil(b"\r\n\r\n")
                headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
                body = await reader.readexactly(int(headers[b"content-length"]))
                assert body == BODY
                assert not parsed or parse_status(body) is not None
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(work(count // CONNECTIONS) for _ in range(CONNECTIONS)))


async def with_streams_and_status(address: str, count: int) -> None:
    """The peer, with the same parser as ours."""
    await with_streams(address, count, parsed=True)


async def with_client(address: str, count: int) -> None:
    """Our HTTP client doing exactly what the peer does."""
    async with HttpClient(max_idle_per_address=CONNECTIONS) as http:

        async def work(quota: int) -> None:
            for _ in range(quota):
                assert (await http.request("GET", address, "/status", timeout=5.0)).body == BODY

        await asyncio.gather(*(work(count // CONNECTIONS) for _ in range(CONNECTIONS)))


async def with_prober(address: str, count: int) -> None:
    """The whole probe: our client, and the answer parsed into an AgentStatus."""
    subject = Instance("a-1", "a", 1, 1, "1", Phase.RUNNING, NOW, NOW, address=address)
    check = HttpCheck(path="/status", timeout=5.0)
    async with HttpClient(max_idle_per_address=CONNECTIONS) as http:
        prober = SocketProber(http, SystemClock())

        async def work(quota: int) -> None:
            for _ in range(quota):
                probed = await prober.probe(subject, 0, check)
                assert probed.ok
                assert probed.status is not None

        await asyncio.gather(*(work(count // CONNECTIONS) for _ in range(CONNECTIONS)))


def probes(count: int = 6400) -> list[dict[str, Any]]:
    """Probes a second, ours and the peer's in turns."""
    contenders: dict[str, Callable[[str, int], Awaitable[None]]] = {
        "probe: asyncio streams (peer)": with_streams,
        "probe: HttpClient": with_client,
        "probe: asyncio streams, status (peer)": with_streams_and_status,
        "probe: SocketProber, status": with_prober,
    }
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    address = f"127.0.0.1:{ours.recv()}"
    times: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, contender in contenders.items():  # in turns, so that a noisy neighbour disturbs all alike
            start, start_cpu = time.perf_counter(), time.process_time()
            asyncio.run(contender(address, count))  # type: ignore[arg-type]
            times[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    ours.send(None)
    process.join(5)
    return [
        row(
            name,
            count,
            statistics.median(times[name]),
            count,
            f"{count / statistics.median(times[name]):,.0f} probes/s (median of {ROUNDS}), "
            f"{statistics.median(cpu[name]) / count * 1e6:.0f} µs CPU each",
        )
        for name in contenders
    ]


# ------------------------------------------------------------------------------------------------ the monitor


class Instant:
    """A prober that answers without waiting, as a simulated cluster does."""

    def __init__(self, clock: SystemClock) -> None:
        self.clock = clock

    async def probe(self, instance: Instance, index: int, check: Check, credential: str | None = None) -> Probed:
        """Well."""
        del instance, check, credential
        return Probed(index, True, self.clock.now(), 0.001)


def monitored(size: int) -> dict[str, Any]:
    """What the monitor itself costs a probe, in virtual time."""
    count = 0

    async def main() -> float:
        nonlocal count
        import anyio  # noqa: PLC0415

        clock = SystemClock(NOW)
        async with HealthMonitor(PROBED, prober=Instant(clock), clock=clock) as monitor:
            for number in range(size):
                monitor.observe(Instance(f"a-{number}", "a", number, 1, "1", Phase.RUNNING, NOW, NOW, address="h:1"))
            await anyio.sleep(4)
            before, start = monitor.statistics().probes, time.process_time()
            await anyio.sleep(max(4, 60_000 // size))
            count = monitor.statistics().probes - before
            return time.process_time() - start

    return row(
        "monitor: one probe, all told", size, run_virtual(main), count, "CPU: decision, plan, wake-ups; virtual time"
    )


def run() -> list[dict[str, Any]]:
    """All figures; `per_item` is in seconds unless the note says bytes."""
    rows = []
    for size in (1_000, 10_000, 100_000):
        rows.append(decisions(PROBED, size, lambda n: Probed(0, True, NOW + 10 + n, 0.01), "decide: probe passes"))
        rows.append(
            decisions(PROBED, size, lambda n: Probed(0, n % 2 == 0, NOW + 10 + n, 0.01), "decide: every 2nd fails")
        )
        rows.append(decisions(BEATEN, size, lambda n: Beat(NOW + 10 + n / 1e3), "decide: heartbeat"))
    rows.append(remembered(PROBED, "memory: one probe check"))
    rows.append(remembered(BEATEN, "memory: heartbeats"))
    rows.extend(monitored(size) for size in (100, 1_000, 10_000))
    rows.extend(probes())
    return rows


if __name__ == "__main__":
    for item in run():
        value = item["per_item"]
        shown = f"{value:10.0f} B" if "bytes" in item["note"] else f"{value * 1e6:9.2f} µs"
        print(f"{item['name']:44} {item['size']:>8,} {shown}  {item['note']}")
