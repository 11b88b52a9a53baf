"""Free loopback ports: each instance gets one of its own, outside the range that the kernel hands out by itself."""

from __future__ import annotations

import socket
import threading
from collections.abc import Collection

from agentfleet.errors import BackendRefused

HOST = "127.0.0.1"
DEFAULT = range(20_000, 30_000)
"""Below the ephemeral ports of Linux (32768 and up) and macOS (49152 and up), so that no outgoing connection of
any program takes an instance's port between its choice and its use."""


class Ports:
    """Hands out ports, each to one holder at a time. Safe to call from several threads.

    Args:
        ports: Which ones to choose from.
    """

    def __init__(self, ports: Collection[int]) -> None:
        self._ports = tuple(ports)
        if not self._ports or not all(0 < port < 65_536 for port in self._ports):
            raise ValueError("ports: give at least one port, each from 1 to 65535")
        self._next = 0
        self._taken: set[int] = set()
        self._lock = threading.Lock()

    def begin_at(self, number: int) -> None:
        """Begin somewhere else (any number), so that two managers on one machine rarely try the same port."""
        self._next = number % len(self._ports)

    def take(self) -> int:
        """A port that nobody listens on; the longest unused comes first.

        Raises:
            BackendRefused: All of them are in use.
        """
        with self._lock:
            for _ in self._ports:
                port = self._ports[self._next]
                self._next = (self._next + 1) % len(self._ports)
                if port not in self._taken and _free(port):
                    self._taken.add(port)
                    return port
        raise BackendRefused(
            f"no free port among {len(self._ports)} from {self._ports[0]} on; "
            "stop what uses them, or give ProcessBackend(ports=...) a wider range"
        )

    def hold(self, port: int) -> None:
        """Note a port that an adopted instance already uses."""
        with self._lock:
            self._taken.add(port)

    def release(self, port: int) -> None:
        """Give a port back; one that was never taken is no error."""
        with self._lock:
            self._taken.discard(port)


def _free(port: int) -> bool:
    """Whether binding works now. Without SO_REUSEADDR, so lingering connections count as use."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
