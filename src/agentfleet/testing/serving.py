"""Managers as real processes, for tests: `agentfleet serve` on loopback, killed, paused and started again at will.

::

    async with ServedManager(database=url, backend="process", folder=tmp_path) as manager:
        async with FleetClient(manager.url) as client:
            ...
        manager.kill()
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio
from anyio import to_thread

from agentfleet.errors import BackendUnavailable, DeadlineExceeded
from agentfleet.signals.http import HttpClient, HttpError
from agentfleet.testing.kube.programs import Program, free_ports

_LOOK = 0.02
"""Seconds between two looks whether it answers."""


class ServedManager:
    """One manager's process. It ends with the block, and with the process that started it.

    Args:
        database: Address of its store.
        backend: "kubernetes", "process" or "memory".
        folder: Where its log goes, and what its backend keeps.
        identity: Its name among the managers.
        options: Further options of `agentfleet serve`.
        env: Further environment variables, such as KUBECONFIG.
        port: Where it listens; a free one when omitted, the same after each start.
        tokens: Whether it asks for tokens, of its database; else it lets everybody in who asks from this machine.
    """

    def __init__(
        self,
        *,
        database: str,
        backend: str,
        folder: Path,
        identity: str = "manager",
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        port: int | None = None,
        tokens: bool = False,
    ) -> None:
        self.identity = identity
        self.log = folder / f"{identity}.log"
        self._address = f"127.0.0.1:{free_ports(1)[0] if port is None else port}"
        command = [sys.executable, "-m", "agentfleet.cli", "serve", "--open-metrics"]
        command += [] if tokens else ["--insecure-loopback"]
        command += ["--database", database, "--backend", backend, "--identity", identity]
        command += ["--port", self._address.rpartition(":")[2], *options]
        if backend == "process":
            command += ["--state-dir", str(folder / f"{identity}-agents")]
        self._program = Program(command, log=self.log, env={**os.environ, **(env or {})})

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{self._address}"

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._program.pid

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            self.thaw()
            await self.leave(within=15.0)

    async def start(self, *, within: float = 60.0) -> float:
        """Start it, and wait until it is ready.

        Returns:
            Seconds that this took.

        Raises:
            DeadlineExceeded: It was not ready in time.
            BackendUnavailable: It has ended instead; the message has the end of its log.
        """
        began = anyio.current_time()
        self._program.start()
        http = HttpClient()
        try:
            with anyio.move_on_after(within):
                while not await self._is_ready(http):
                    if not self._program.running:
                        raise BackendUnavailable(f"manager {self.identity} has ended: {self._program.tail()}")
                    await anyio.sleep(_LOOK)
                return anyio.current_time() - began
        finally:
            await http.aclose()
        raise DeadlineExceeded(f"manager {self.identity} was not ready within {within:g} s: {self._program.tail()}")

    async def _is_ready(self, http: HttpClient) -> bool:
        try:
            answer = await http.request("GET", self._address, "/readyz", timeout=2.0)
        except (HttpError, DeadlineExceeded):
            return False
        return answer.status == 200

    def kill(self) -> None:
        """End it at once, like a power cut of its machine."""
        self._program.signal(signal.SIGKILL)

    def freeze(self) -> None:
        """Stop it, as a machine that hangs does."""
        self._program.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._program.signal(signal.SIGCONT)

    def ask_to_leave(self) -> None:
        """Send it SIGTERM, and do not wait."""
        self._program.signal(signal.SIGTERM)

    async def leave(self, *, within: float = 30.0) -> int | None:
        """Have it leave in good order; it is killed if that takes too long.

        Returns:
            Its exit code; negative if a signal ended it, None if it did not run.
        """
        self.ask_to_leave()
        return await self.ended(within=within)

    async def ended(self, *, within: float = 30.0) -> int | None:
        """Wait until it has ended; it is killed after so many seconds. Returns its exit code."""
        return await to_thread.run_sync(self._program.ended, within)
