"""How long a configuration takes from its durable write to the last of 1,000 agents, and how they come back.

Run: `python -m benchmarks config`, or `python -m benchmarks.bench_config [AGENTS] [CHANGES]` (1,000 and 100).

A server process on a real database, and two processes with the agents' own `agentfleet.agent.subscribe`. The server is
delivery alone (uvicorn, `server.config` on `delivery`), or `agentfleet serve` as users run it, where each agent shows
its token and changes come by REST. A change counts from the moment at which its write was acknowledged, by REST beside
that from the request on, too. Beside it, in the same run and with the same agents, a bare server of events: one
process of aiohttp that stores nothing and writes the same bytes to each connection in turn. Then the server is killed,
a change is published, and after 30 s it is back.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import psutil

from agentfleet import AgentTemplate, FleetSpec
from agentfleet.agent.subscribe import Subscription
from agentfleet.client import FleetClient
from agentfleet.configstore import ConfigStore
from agentfleet.delivery import ConfigDelivery, Parcel
from agentfleet.server.config import ConfigApp
from agentfleet.stores.config import ConfigRevision
from agentfleet.stores.sql import Database, SqlAcks, SqlConfig, SqlTokens
from agentfleet.stores.tokens import ALL, Scope, new_token
from agentfleet.testing.postgres import Postgres
from agentfleet.testing.serving import ServedManager

AGENTS, CHANGES = 1000, 100
PAUSE = 1.1
SERVED_PAUSE = 4.0
"""Seconds between a change and the next: all have acknowledged it by then. A whole manager needs longer for that."""
OUTAGE = 30.0
KEY = "researchers"
DOCUMENT = {"model": "large", "temperature": 0.2, "prompt": "You are a careful researcher. " * 30}
Row = dict[str, object]


# ------------------------------------------------------------------------------------------------ processes


class Process:
    """One of this benchmark's own processes: it is told lines, and tells JSON lines."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.bench_config", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def tell(self, line: str) -> None:
        """Write one line to it."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        """The next that it tells."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args!r} has ended")
        return json.loads(line)

    def ask(self, line: str) -> Any:
        """Write one line, and read what it says to it."""
        self.tell(line)
        return self.hear()

    def end(self) -> None:
        """Kill it."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def say(data: object) -> None:
    """Tell one JSON line."""
    print(json.dumps(data), flush=True)


async def lines() -> Any:
    """What this process is told."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


# ------------------------------------------------------------------------------------------------ the servers


async def serve(url: str, port: int) -> None:
    """The server; "put" publishes a change, "load" tells how many requests and how much CPU it had in each second."""
    import uvicorn  # noqa: PLC0415 - in this process alone

    loads: Counter[int] = Counter()
    cpu: dict[int, float] = {}

    async with Database(url) as database, anyio.create_task_group() as tasks:
        store = ConfigStore(SqlConfig(database))
        delivery = ConfigDelivery(store, KEY, SqlAcks(database))
        await tasks.start(delivery.run)

        async def authorize(_scope: Any, _cluster: str, _instance: str) -> None:
            """Everybody may."""

        inner = ConfigApp({KEY: delivery}.get, authorize)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            loads[int(time.monotonic())] += 1
            await inner(scope, receive, send)

        async def meter() -> None:
            while True:
                cpu[int(time.monotonic())] = time.process_time()
                await asyncio.sleep(1.0)

        config = uvicorn.Config(app, log_level="warning", lifespan="off", http="httptools", loop="asyncio", ws="none")
        server = uvicorn.Server(config)
        tasks.start_soon(server.serve, [listening(port)])
        tasks.start_soon(meter)
        reader = await lines()
        say({"ready": time.monotonic()})
        while line := (await reader.readline()).decode().strip():
            if line == "put":
                revision = await publish(store)
                say({"revision": revision, "at": time.monotonic()})
            elif line == "load":
                spent = {second: cpu.get(second + 1, used) - used for second, used in cpu.items()}
                say({"requests": loads, "cpu": spent})
            elif line == "streams":
                say({"streams": len(delivery)})
        tasks.cancel_scope.cancel()


async def manage(url: str, count: int, port: int) -> None:
    """`agentfleet serve` with one fleet of that size, as no larger crowd is admitted; "put" publishes a change by REST.

    Tells the token of the fleet's agents first.
    """
    async with Database(url) as database:
        kept = SqlTokens(database)
        token, record = new_token("agents", scopes=(Scope.AGENT,), fleets=(KEY,), now=time.time())
        await kept.add(record)
        admin, record = new_token("operator", scopes=(Scope.ADMIN,), fleets=(ALL,), now=time.time())
        await kept.add(record)
    with tempfile.TemporaryDirectory() as folder:
        manager = ServedManager(database=url, backend="memory", folder=Path(folder), port=port, tokens=True)
        async with manager, FleetClient(manager.url, token=admin) as client:
            template = AgentTemplate(command=("agent",))
            made = await client.create(FleetSpec(name=KEY, template=template, replicas=count))
            await client.finished(made.operation_id, timeout=60)
            names = [each.instance_id async for each in client.instances(KEY)]
            reader = await lines()
            say({"ready": time.monotonic(), "token": token, "names": names})
            while (await reader.readline()).decode().strip():
                document = DOCUMENT | {"nonce": random.random()}
                asked = time.monotonic()
                head = await client.configuration.publish(KEY, document, reason="measure")
                say({"revision": head.revision, "asked": asked, "at": time.monotonic()})


async def publish(store: ConfigStore) -> int:
    """Store a document that differs from the last."""
    document = DOCUMENT | {"nonce": random.random()}
    return (await store.put(KEY, document, author="bench", reason="measure")).revision


async def write(url: str) -> None:
    """A process that publishes, and serves nobody."""
    async with Database(url) as database:
        store = ConfigStore(SqlConfig(database))
        reader = await lines()
        say({"ready": time.monotonic()})
        while await reader.readline():
            revision = await publish(store)
            say({"revision": revision, "at": time.monotonic()})


@contextmanager
def writer(url: str) -> Iterator[Process]:
    """A process that publishes."""
    made = Process("write", url)
    try:
        made.hear()
        yield made
    finally:
        made.end()


async def bare(port: int) -> None:
    """What a server of events costs that does nothing else."""
    from aiohttp import web  # noqa: PLC0415 - in this process alone

    streams: set[web.StreamResponse] = set()
    revision = 0

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"retry: 4000\n\n")
        streams.add(response)
        try:
            await asyncio.sleep(3600)
        finally:
            streams.discard(response)
        return response

    async def acks(_request: web.Request) -> web.Response:
        return web.Response(status=204)

    app = web.Application()
    app.router.add_get("/api/v1/clusters/{id}/config/stream", stream)
    app.router.add_post("/api/v1/clusters/{id}/config/acks", acks)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.SockSite(runner, listening(port)).start()
    reader = await lines()
    say({"ready": time.monotonic()})
    while line := (await reader.readline()).decode().strip():
        if line == "put":
            revision += 1
            text = json.dumps(DOCUMENT | {"nonce": random.random()}, separators=(",", ":"))
            frame = Parcel.of(ConfigRevision(KEY, revision, text, 0.0, "", "")).frame
            at = time.monotonic()
            for each in tuple(streams):
                await each.write(frame)
            say({"revision": revision, "at": at})
        elif line == "streams":
            say({"streams": len(streams)})
    await runner.cleanup()


def listening(port: int) -> socket.socket:
    """A socket for a thousand who come at once."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    sock.listen(2048)
    return sock


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# ------------------------------------------------------------------------------------------------ the agents


async def subscribe(port: int, first: int, count: int, token: str) -> None:
    """Many agents in one process, told their names; "at N": when the last of them had revision N or a later one."""
    reader = await lines()
    names = json.loads(await reader.readline())
    having: dict[int, tuple[int, float]] = {}
    newest = [0] * count
    moved = asyncio.Event()

    def agent(number: int) -> Subscription:
        async def offer(revision: int, _document: Mapping[str, Any]) -> tuple[int, str]:
            had, newest[number] = newest[number], revision
            for each in range(had + 1, revision + 1):
                having[each] = (having.get(each, (0, 0.0))[0] + 1, time.monotonic())
                if having[each][0] == count:
                    moved.set()
            return 200, ""

        url = f"http://127.0.0.1:{port}/api/v1/clusters/{KEY}"
        rng = random.Random(first + number)
        return Subscription(
            url, names[number], offer=offer, running=lambda: newest[number], token=lambda: token or None, rng=rng
        )

    tasks = [asyncio.create_task(agent(number).run()) for number in range(count)]
    say({"ready": time.monotonic()})
    while line := (await reader.readline()).decode().strip():
        revision = int(line.removeprefix("at "))
        while having.get(revision, (0, 0.0))[0] < count:
            moved.clear()
            await moved.wait()
        say({"at": having[revision][1]})
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


@contextmanager
def agents(port: int, count: int, token: str = "", names: Sequence[str] = ()) -> Iterator[list[Process]]:
    """The agents, in two processes."""
    half = count // 2
    names = names or [f"agent-{number}" for number in range(count)]
    made = [Process("subscribe", port, 0, half, token), Process("subscribe", port, half, count - half, token)]
    try:
        made[0].tell(json.dumps(names[:half]))
        made[1].tell(json.dumps(names[half:]))
        for each in made:
            each.hear()
        yield made
    finally:
        for each in made:
            each.end()


# ------------------------------------------------------------------------------------------------ what is measured


def reach(clients: list[Process], revision: int) -> float:
    """When the last agent had a revision."""
    for each in clients:
        each.tell(f"at {revision}")
    return max(float(each.hear()["at"]) for each in clients)


def subscribed(server: Process, count: int) -> None:
    """Wait until all agents have a stream."""
    deadline = time.monotonic() + 60
    while server.ask("streams")["streams"] < count:
        if time.monotonic() > deadline:
            raise RuntimeError(f"only {server.ask('streams')} of {count} have subscribed")
        time.sleep(0.1)


def spans(put: Any, clients: list[Process], changes: int, pause: float = PAUSE) -> dict[str, list[float]]:
    """Milliseconds to the last agent, from each acknowledged write ("at"), and from when it was "asked" for if told."""
    found: dict[str, list[float]] = {"at": [], "asked": []}
    for number in range(changes + 3):
        said = put()
        last = reach(clients, said["revision"])
        for since in found.keys() & said.keys() if number >= 3 else ():  # the first ones warm up
            found[since].append(1000 * (last - said[since]))
        time.sleep(pause)
    return {since: sorted(took) for since, took in found.items()}


def row(name: str, found: list[float], count: int, note: str) -> Row:
    """One line of the report."""
    p50, p99 = statistics.median(found), found[round(0.99 * (len(found) - 1))]
    told = f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, {len(found)} changes; {note}"
    return {"name": name, "size": count, "seconds": p50 / 1000, "per_item": f"p99 {p99:.1f} ms", "note": told}


def measured(name: str, arguments: tuple[str, ...], count: int, changes: int) -> list[Row]:
    """One server with its agents: changes written by itself, and, where it has a store, by another process."""
    port = free_port()
    server = Process(*arguments, port)
    try:
        said = server.hear()
        with agents(port, count, said.get("token", ""), said.get("names", ())) as clients:
            if arguments[0] == "manage":
                reach(clients, server.ask("put")["revision"])
                took = spans(lambda: server.ask("put"), clients, changes // 3, SERVED_PAUSE)
                goal = "goals: 30 and 60 ms"
                return [
                    row(name, took["at"], count, f"from the answer on; {goal}"),
                    row(f"{name}, from the request on", took["asked"], count, "with validation, write and answer"),
                ]
            subscribed(server, count)
            found = spans(lambda: server.ask("put"), clients, changes)["at"]
            if arguments[0] == "bare":
                return [row(name, found, count, "stores nothing")]
            with writer(arguments[1]) as another:
                other = spans(lambda: another.ask("put"), clients, changes // 2)["at"]
            goal = "goals: 30 and 60 ms"
            return [row(name, found, count, goal), row(f"{name}, another process writes", other, count, goal)]
    finally:
        server.end()


def outage(url: str, count: int) -> list[Row]:
    """The server is killed for half a minute, while something is published."""
    port = free_port()
    server = Process("serve", url, port)
    try:
        server.hear()
        with agents(port, count) as clients:
            subscribed(server, count)
            for _ in range(12):  # the steady load: a change each second, and what all say of it
                reach(clients, server.ask("put")["revision"])
                time.sleep(1.0)
            steady = server.ask("load")
            server.end()
            with writer(url) as another:
                revision = another.ask("put")["revision"]
            time.sleep(OUTAGE)
            server = Process("serve", url, port)
            back = server.hear()["ready"]
            converged = reach(clients, revision) - back
            time.sleep(3.0)
            subscribed(server, count)
            after = server.ask("load")
    finally:
        server.end()
    usual = [steady["requests"][second] for second in sorted(steady["requests"])][-10:-1]
    burst = max(after["requests"].values())
    busy = [spent for _, spent in sorted(steady["cpu"].items(), key=lambda item: int(item[0]))][-10:-1]
    load = f"busiest second {burst} requests, {max(after['cpu'].values()):.2f} s CPU"
    note = (
        f"{load}; steady, with a change a second: {statistics.mean(usual):.0f} requests, {statistics.mean(busy):.2f} s"
    )
    ratio = burst / statistics.mean(usual)
    goal = "goals: < 5 s, < 2x"
    return [
        {
            "name": f"all have it after {OUTAGE:.0f} s of outage",
            "size": count,
            "seconds": converged,
            "per_item": f"{ratio:.2f}x steady",
            "note": f"{note}; {goal}",
        }
    ]


def run(count: int = AGENTS, changes: int = CHANGES) -> list[Row]:
    """The figures."""
    rows = measured("bare events", ("bare",), count, changes)
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'config.db'}"
        rows += measured("SQLite", ("serve", url), count, changes)
        rows += measured("agentfleet serve, SQLite", ("manage", f"{url}-served", str(count)), count, changes)
        rows += outage(url, count)
        with Postgres() as postgres:
            rows += measured("PostgreSQL", ("serve", postgres.database()), count, changes)
            rows += measured(
                "agentfleet serve, PostgreSQL", ("manage", postgres.database(), str(count)), count, changes
            )
    return rows


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", url, port]:
            asyncio.run(serve(url, int(port)))
        case ["write", url]:
            asyncio.run(write(url))
        case ["bare", port]:
            asyncio.run(bare(int(port)))
        case ["manage", url, count, port]:
            asyncio.run(manage(url, int(count), int(port)))
        case ["subscribe", port, first, count, token]:
            asyncio.run(subscribe(int(port), int(first), int(count), token))
        case given:
            for each in run(*map(int, given)):
                print(each, flush=True)
            print(f"load {os.getloadavg()}, {psutil.cpu_count()} cores")
