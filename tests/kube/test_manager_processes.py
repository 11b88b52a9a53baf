"""Scenarios 27, 28: managers of one fleet in processes of their own, on a real API server and one journal.

They are killed in the middle of a change, asked to leave, and stopped for longer than a lease lasts.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

pytest.importorskip("kubernetes_asyncio")
pytest.importorskip("sqlalchemy")

from tests.kube.managing import SIZE
from tests.kube.oracle import Ledger, ledger
from tests.kube.permissions import grant
from tests.kube.world import Cluster, cluster

from agentfleet.backends.kubernetes.guard import EPOCH
from agentfleet.backends.kubernetes.resources import DEPLOYMENTS
from agentfleet.stores.sql import SqlJournal
from agentfleet.testing.kube import ControlPlane

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
STOPPED = float(os.environ.get("AGENTFLEET_STOPPED", "20"))
"""Seconds for which a leader is stopped: longer than its lease lasts."""


class Manager:
    """One manager's process."""

    def __init__(self, process: anyio.abc.Process) -> None:
        self.process = process
        self.said: list[dict[str, Any]] = []
        self._more = anyio.Event()

    async def listen(self) -> None:
        """Take down what it says."""
        assert self.process.stdout is not None
        rest = b""
        with suppress(anyio.ClosedResourceError):  # it is ended
            async for piece in self.process.stdout:
                *lines, rest = (rest + piece).split(b"\n")
                self.said += [json.loads(line) for line in lines]
                self._more.set()
                self._more = anyio.Event()

    async def hear(self, what: str, *, after: int = 0, seconds: float = 60.0) -> dict[str, Any]:
        """The first thing of a kind that it says after so many others."""
        with anyio.fail_after(seconds):
            while True:
                found = next((each for each in self.said[after:] if each["what"] == what), None)
                if found is not None:
                    return found
                assert not [each for each in self.said if each["what"] == "died"], self.said
                await self._more.wait()

    async def tell(self, command: str, answer: str = "done") -> dict[str, Any]:
        """Give a command and hear what came of it."""
        assert self.process.stdin is not None
        after = len(self.said)
        await self.process.stdin.send(f"{command}\n".encode())
        return await self.hear(answer, after=after)


class Two:
    """A namespace, two managers of its one fleet, and all pods that ever were."""

    def __init__(self, there: Cluster, pods: Ledger, journal: str, first: Manager, second: Manager) -> None:
        self.there, self.pods, self.journal = there, pods, journal
        self.first, self.second = first, second

    async def deployment(self) -> dict[str, Any]:
        found: dict[str, Any] = await self.there.plane.api.get(DEPLOYMENTS.path(self.there.namespace, "agents"))
        return found

    async def whole(self, size: int, *, seconds: float = 60.0) -> None:
        """Wait until so many pods are ready."""
        with anyio.fail_after(seconds):
            while len(self.pods.good) != size:  # noqa: ASYNC110 - it has no event
                await anyio.sleep(0.05)

    async def stop_first(self) -> None:
        """Stop the first manager between two writes: SQLite lets nobody write while one who does is stopped."""
        while True:
            self.first.process.send_signal(signal.SIGSTOP)
            with closing(sqlite3.connect(self.journal.removeprefix("sqlite:///"), timeout=0)) as journal:
                try:
                    journal.execute("BEGIN IMMEDIATE")
                except sqlite3.OperationalError as error:
                    if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                        raise
                else:
                    return
            self.first.process.send_signal(signal.SIGCONT)
            await anyio.lowlevel.checkpoint()

    def kinds(self) -> list[str]:
        with SqlJournal(self.journal) as journal:
            return [each.kind for each in journal.read()]


@asynccontextmanager
async def two(plane: ControlPlane, folder: Path) -> AsyncIterator[Two]:
    """Two managers; the first leads, and has deployed the fleet."""
    async with AsyncExitStack() as stack:
        there = await stack.enter_async_context(cluster(plane))
        pods = await stack.enter_async_context(ledger(plane, there.namespace))
        tasks = await stack.enter_async_context(anyio.create_task_group())
        access = await grant(plane, there.namespace)
        kubeconfig = access.write(folder / "kubeconfig", namespace=there.namespace)
        journal = f"sqlite:///{folder / 'journal.db'}"

        async def start(identity: str) -> Manager:
            command = [sys.executable, "-m", "tests.kube.managing"]
            arguments = [str(kubeconfig), there.namespace, journal, identity]
            process = await anyio.open_process(
                [*command, *arguments], cwd=ROOT, stderr=subprocess.DEVNULL, stdin=subprocess.PIPE
            )
            stack.push_async_callback(_end, process)
            made = Manager(process)
            tasks.start_soon(made.listen)
            await made.hear("ready")
            return made

        first = await start("first")
        await first.hear("leads")
        await first.tell("deploy")
        both = Two(there, pods, journal, first, await start("second"))
        await both.whole(SIZE)
        yield both
        tasks.cancel_scope.cancel()


async def _end(process: anyio.abc.Process) -> None:
    with anyio.CancelScope(shield=True):
        if process.returncode is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        await process.aclose()


def test_a_leader_killed_in_the_middle_of_a_change_is_followed(plane: ControlPlane, tmp_path: Path) -> None:
    """What was said before its death is done by the next one, and nothing is done twice."""

    async def test() -> None:
        async with two(plane, tmp_path) as both:
            await both.first.tell("scale 10")
            both.first.process.kill()
            killed = time.monotonic()
            led = await both.second.hear("leads", seconds=30)
            print(f"followed after {led['at'] - killed:.2f} s")
            assert led["at"] - killed < 10
            await both.whole(10)
            size = await both.second.tell("size", "size")
            assert size["desired"] == 10
            assert (len(both.pods.created), len(both.pods.deleted)) == (10, 0)
            assert both.kinds().count("fleet.scaled") == 1
            assert both.kinds().count("manager.deposed") == 1

    anyio.run(test)


def test_a_leader_that_is_asked_to_leave_is_followed_at_once(plane: ControlPlane, tmp_path: Path) -> None:
    async def test() -> None:
        async with two(plane, tmp_path) as both:
            both.first.process.terminate()
            asked = time.monotonic()
            led = await both.second.hear("leads", seconds=30)
            await both.first.hear("left")
            print(f"followed after {led['at'] - asked:.2f} s")
            assert led["at"] - asked < 5  # 1 s on a machine with nothing else to do
            await both.second.tell("scale 8")
            await both.whole(8)
            assert len(both.pods.created) == 8
            assert not both.pods.deleted
            assert "manager.deposed" not in both.kinds()

    anyio.run(test)


def test_a_leader_that_was_stopped_writes_nothing_when_it_goes_on(plane: ControlPlane, tmp_path: Path) -> None:
    """Stopped in the middle of a change, for longer than its lease: no write of the old epoch follows the new."""

    async def test() -> None:
        async with two(plane, tmp_path) as both:
            assert both.first.process.stdin is not None
            await both.first.process.stdin.send(b"scale 20\n")
            await both.stop_first()
            stopped = time.monotonic()
            led = await both.second.hear("leads", seconds=30)
            assert led["at"] - stopped < 12
            await both.second.tell("scale 9")
            await both.whole(9)
            await anyio.sleep(max(0.0, STOPPED - (time.monotonic() - stopped)))
            before = await both.deployment()
            assert before["metadata"]["annotations"][EPOCH] == "2"
            created, deleted = len(both.pods.created), len(both.pods.deleted)
            said = len(both.first.said)
            both.first.process.send_signal(signal.SIGCONT)
            await both.first.hear("over", seconds=30)
            refused = await both.first.tell("scale 3", "refused")
            assert re.search("does not lead|is over|lapsed", refused["error"])
            await anyio.sleep(3)  # as long as a turn or a retry of it would take
            after = await both.deployment()
            assert after["metadata"]["generation"] == before["metadata"]["generation"]
            assert after["metadata"]["annotations"][EPOCH] == "2"
            assert after["spec"]["replicas"] == 9
            assert (len(both.pods.created), len(both.pods.deleted)) == (created, deleted)
            assert not [each for each in both.first.said[said:] if each["what"] == "leads"]
            size = await both.second.tell("size", "size")
            assert (size["desired"], size["good"]) == (9, 9)

    anyio.run(test)
