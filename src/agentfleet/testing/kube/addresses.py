"""Loopback addresses for nodes and pods."""

from __future__ import annotations

from collections import deque
from ipaddress import ip_network
from random import SystemRandom

from agentfleet.errors import SpecError


class Addresses:
    """Gives out addresses of one network: to nodes from its end, to pods from its beginning."""

    def __init__(self, network: str | None) -> None:
        """Use a network; a random one of 127.0.0.0/8 unless told."""
        self._network = ip_network(network or f"127.{SystemRandom().randrange(16, 251)}.0.0/16")
        self._next = 1
        self._free: deque[str] = deque()
        self._hosts = 0

    def host(self, index: int) -> str:
        """The address of a node."""
        self._hosts = max(self._hosts, index + 1)
        return str(self._network[-2 - index])

    def take(self) -> str:
        """An address for a pod: one that was never used, as long as there is one."""
        if self._next < self._network.num_addresses - 2 - self._hosts:
            self._next += 1
            return str(self._network[self._next - 1])
        if not self._free:
            raise SpecError(f"no address is free in {self._network}: give KubeletOptions a larger `addresses`")
        return self._free.popleft()

    def give_back(self, address: str) -> None:
        """A pod has ended."""
        self._free.append(address)
