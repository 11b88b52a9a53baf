"""Fake nodes in a process of their own, so that their CPU time is not that of whoever is measured."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

import anyio
from anyio import to_thread

from agentfleet import errors
from agentfleet.errors import AgentFleetError, BackendUnavailable, DeadlineExceeded
from agentfleet.testing.kube.access import Access
from agentfleet.testing.kube.errors import PlaneFailed
from agentfleet.testing.kube.faults import NodeFaults
from agentfleet.testing.kube.kubeletoptions import KubeletOptions
from agentfleet.testing.kube.programs import bound
from agentfleet.testing.kube.scratch import Scratch

_STOP = 5.0  # seconds beyond those that the nodes themselves may take to leave


class KubeletProcess(NodeFaults):
    """`FakeKubelet` in a process of its own. An async context manager, bound to no event loop.

    `start` and `stop` may be called one by one, and commands from any event loop.

    Args:
        access: Whom the API server lets create nodes and write statuses.
        options: How many nodes, and what they are like.
        timeout: Seconds within which the nodes must be ready, and any command be answered.
    """

    def __init__(self, access: Access, options: KubeletOptions | None = None, *, timeout: float = 60) -> None:
        self.options = options or KubeletOptions()
        self._access = access
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: Scratch | None = None
        self._lock = threading.Lock()
        self._rest = b""

    @property
    def pid(self) -> int | None:
        """Its process id, once it has been started."""
        return None if self._process is None else self._process.pid

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self.stop()

    async def start(self) -> None:
        """Start it and wait until its nodes are registered."""
        self._scratch = Scratch()
        folder = self._scratch.path
        config = self._access.write(folder / "kubeconfig")
        command = [sys.executable, "-m", "agentfleet.testing.kube.kubelet", "--kubeconfig", str(config)]
        command += ["--options", json.dumps(asdict(self.options), default=list)]
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220, S603 - our own module; from this thread, which it ends with
                bound(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        try:
            await self._in_thread(b"")  # it says so when its nodes are registered
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.stop()
            raise

    async def stop(self) -> None:
        """End it: it takes its nodes and their pods with it, if it is to; it is killed if that takes too long."""
        process, self._process = self._process, None
        if process is not None:
            await to_thread.run_sync(self._end, process)
        if self._scratch is not None:
            self._scratch.remove()
            self._scratch = None

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(self.options.leave_within + _STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    async def _do(self, command: str, arguments: Mapping[str, Any]) -> Any:
        asked = json.dumps({"command": command, "arguments": arguments}).encode() + b"\n"
        said = await self._in_thread(asked)
        if "error" in said:
            kind = getattr(errors, said["kind"], AgentFleetError)
            raise kind(said["error"])
        return said["answer"]

    async def _in_thread(self, asked: bytes) -> dict[str, Any]:
        """Send and await the answer. Not abandoned when cancelled: the next answer would be taken for this one."""
        return await to_thread.run_sync(self._talk, asked, abandon_on_cancel=False)

    def _talk(self, asked: bytes) -> dict[str, Any]:
        with self._lock:
            process = self._process
            if process is None:
                raise BackendUnavailable("the process of the fake nodes does not run: start it first")
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(asked)
                process.stdin.flush()
                line = self._line(process.stdout.fileno())
            except BrokenPipeError:
                line = b""
            if not line:
                status = process.wait(_STOP)
                raise PlaneFailed(f"the process of the fake nodes ended with status {status}:\n{self._log()}")
            said: dict[str, Any] = json.loads(line)
            return said

    def _line(self, source: int) -> bytes:
        """The next line; empty when the process has ended."""
        ends = time.monotonic() + self._timeout
        while b"\n" not in self._rest:
            ready, _, _ = select.select([source], [], [], max(0.0, ends - time.monotonic()))
            if not ready:
                raise DeadlineExceeded(f"the fake nodes did not answer within {self._timeout:g} s:\n{self._log()}")
            chunk = os.read(source, 1 << 16)
            if not chunk:
                return b""
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _log(self) -> str:
        if self._scratch is None:
            return ""
        return (self._scratch.path / "log").read_text(errors="replace")[-3000:].strip()
