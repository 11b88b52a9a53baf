"""One program of a control plane: started so that it cannot outlive us, its output in a file, ended by its pid."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from random import SystemRandom

from agentfleet.testing.kube.errors import PlaneFailed

# Runs in the new process before the program: asks the kernel to end it when we die, also by SIGKILL, and then becomes
# the program. Where there is no prctl (not Linux) the program is still ended by `Program.stop`.
_BOUND = """
import ctypes, os, signal, sys
parent = int(sys.argv[1])
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != parent:
    sys.exit("the process that started this one is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""
_TOLD = 3_000  # characters of a log that an error shows
_LOGGED = 32_000_000  # bytes of a log that are kept
_PORTS = (20_000, 32_000)  # below what the kernel gives to clients, so that a port is free again after a restart


class Program:
    """A program that runs, is paused, killed and started again. Bound to no event loop."""

    def __init__(self, command: list[str], *, log: Path, env: dict[str, str] | None = None) -> None:
        self.command = command
        self.name = Path(command[0]).name
        self.log = log
        self._env = env
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._process.pid if self.running and self._process is not None else None

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended. A paused program runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it, once more if it has ended. Its output is appended to its log."""
        if self.running:
            return
        self.trim()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - the caller's own program
                bound(self.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env,
                start_new_session=True,
            )

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it runs."""
        if self._process is not None and self.running:
            self._process.send_signal(number)

    def kill(self, timeout: float = 10) -> None:
        """End it at once (SIGKILL works on a paused program too), and wait until it is gone."""
        if self._process is None:
            return
        if self.running:
            self._process.kill()
        self._process.wait(timeout)

    def ended(self, within: float) -> int | None:
        """Wait until it has ended, and kill it after so many seconds.

        Returns:
            Its exit status, negative if a signal ended it; None if it was never started.
        """
        if self._process is None:
            return None
        try:
            return self._process.wait(within)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.returncode

    def check(self) -> None:
        """Raise if it has ended by itself."""
        self.trim()
        if self._process is not None and not self.running:
            raise PlaneFailed(
                f"{self.name} ended with status {self._process.returncode}; its log {self.log} ends:\n{self.tail()}"
            )

    def trim(self) -> None:
        """Empty its log when it has grown too long. The program appends, and so goes on from there."""
        if self.log.exists() and self.log.stat().st_size > _LOGGED:
            os.truncate(self.log, 0)

    def tail(self) -> str:
        """The end of its log."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - _TOLD))
            return log.read().decode(errors="replace").strip()


def bound(command: list[str]) -> list[str]:
    """A command line whose process the kernel kills when the thread that starts it ends."""
    return [sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid()), *command]


def free_ports(count: int) -> list[int]:
    """Ports on 127.0.0.1 that nobody listens on, from a range that clients are not given."""
    found: list[int] = []
    held: list[socket.socket] = []
    try:
        while len(found) < count:
            sock = socket.socket()
            held.append(sock)
            port = SystemRandom().randrange(*_PORTS)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue  # taken
            found.append(port)
    finally:
        for sock in held:
            sock.close()
    return found
