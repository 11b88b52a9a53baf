"""One onlooker for fleets and kubectl alike: when did a Deployment say that it is as wanted?

It watches from a process of its own (`python -m benchmarks.kube_onlooker KUBECONFIG NAMESPACE`), so that it sees as
much and as soon whatever the measured side computes meanwhile, and keeps the monotonic time of all that it sees.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import anyio
from anyio.streams.text import TextReceiveStream

from agentfleet.testing.kube.access import Access
from agentfleet.testing.kube.apiclient import ApiClient

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Seen:
    """What a Deployment said of itself at a moment (`time.monotonic`)."""

    at: float
    generation: int
    observed: int
    replicas: int
    updated: int
    ready: int

    def shows(self, size: int) -> bool:
        """Whether so many instances, and no others, are up to date and ready."""
        return self.observed >= self.generation and self.replicas == self.updated == self.ready == size


@dataclass(slots=True)
class _Waiting:
    name: str
    wanted: Callable[[Seen], bool]
    came: anyio.Event
    at: float = 0.0


class Onlooker:
    """The process, and what it has said. Use it as an async context manager."""

    def __init__(self, config: Path, namespace: str) -> None:
        self._command = [sys.executable, "-m", "benchmarks.kube_onlooker", str(config), namespace]
        self._latest: dict[str, Seen] = {}
        self._waiting: list[_Waiting] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            process = await anyio.open_process(
                self._command,
                stderr=subprocess.DEVNULL,
                cwd=ROOT,
                start_new_session=True,  # its word has its own share
            )
            stack.push_async_callback(process.aclose)
            stack.callback(process.kill)
            tasks = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(tasks.cancel_scope.cancel)
            assert process.stdout is not None
            tasks.start_soon(self._listen, TextReceiveStream(process.stdout))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(None, None, None)

    def generation(self, name: str) -> int:
        """How often a Deployment has been told something, as of what has been seen; 0 when there is none."""
        seen = self._latest.get(name)
        return 0 if seen is None else seen.generation

    async def until(self, name: str, wanted: Callable[[Seen], bool]) -> float:
        """The moment (`time.monotonic`) at which a Deployment said so; the present one if it does already."""
        seen = self._latest.get(name)
        if seen is not None and wanted(seen):
            return time.monotonic()
        waiting = _Waiting(name, wanted, anyio.Event())
        self._waiting.append(waiting)
        await waiting.came.wait()
        return waiting.at

    async def _listen(self, stream: TextReceiveStream) -> None:
        rest = ""
        async for piece in stream:
            *lines, rest = (rest + piece).split("\n")
            for line in lines:
                self._take(json.loads(line))

    def _take(self, said: dict[str, Any]) -> None:
        name = said.pop("name")
        if said.pop("gone"):
            self._latest.pop(name, None)
            return
        seen = self._latest[name] = Seen(**said)
        for each in [each for each in self._waiting if each.name == name and each.wanted(seen)]:
            self._waiting.remove(each)
            each.at = seen.at
            each.came.set()


async def look(config: Path, namespace: str) -> None:
    """Say what is seen, a line each, until it is killed."""
    path = f"/apis/apps/v1/namespaces/{namespace}/deployments"
    async with ApiClient(Access.read(config)) as api:
        while True:
            try:
                _, body = await api.send("GET", path)
                listed = json.loads(body)
                for each in listed["items"]:
                    _say(each)
                since = listed["metadata"]["resourceVersion"]
                async for line in api.lines(f"{path}?watch=1&resourceVersion={since}", silence=600):
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        break
                    _say(event["object"], gone=event["type"] == "DELETED")
            except (aiohttp.ClientError, OSError):
                await anyio.sleep(0.2)


def _say(deployment: dict[str, Any], *, gone: bool = False) -> None:
    metadata, status = deployment["metadata"], deployment.get("status", {})
    said = {
        "name": metadata["name"],
        "gone": gone,
        "at": time.monotonic(),
        "generation": metadata["generation"],
        "observed": status.get("observedGeneration", 0),
        "replicas": status.get("replicas", 0),
        "updated": status.get("updatedReplicas", 0),
        "ready": status.get("readyReplicas", 0),
    }
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    anyio.run(look, Path(sys.argv[1]), sys.argv[2])
