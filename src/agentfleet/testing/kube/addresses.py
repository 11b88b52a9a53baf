"""Loopback addresses for nodes and pods."""

from __future__ import annotations

import socket
from collections import deque
from ipaddress import IPv4Network, IPv6Network, ip_network
from random import SystemRandom

from agentfleet.errors import BackendUnavailable, SpecError

_NETWORKS = range(16, 251)
_MARK = 10250
"""The port of a kubelet: whoever holds it on a network's last address has that network."""


class Addresses:
    """Gives out addresses of one network: to nodes from its end, to pods from its beginning.

    Unless it is told which, it takes a network that no other has, in whatever process, until `close`.
    """

    def __init__(self, network: str | None) -> None:
        """Use a network; one of 127.16.0.0/16 to 127.250.0.0/16 that is free unless told.

        Raises:
            BackendUnavailable: All of those are taken.
        """
        self._mark: socket.socket | None = None
        self._network = self._free_network() if network is None else ip_network(network)
        self._next = 1
        self._free: deque[str] = deque()
        self._hosts = 0

    def _free_network(self) -> IPv4Network | IPv6Network:
        """A network that this one has from now on. At random, so that what lingers of an earlier one is not met."""
        for number in SystemRandom().sample(_NETWORKS, len(_NETWORKS)):
            network = ip_network(f"127.{number}.0.0/16")
            mark = socket.socket()
            try:
                mark.bind((str(network[-2]), _MARK))
            except OSError:
                mark.close()
                continue
            self._mark = mark
            return network
        first, last = _NETWORKS[0], _NETWORKS[-1]
        raise BackendUnavailable(
            f"each network from 127.{first}.0.0/16 to 127.{last}.0.0/16 is taken, or cannot be bound to (port {_MARK}"
            " of its last address): name one in KubeletOptions.addresses"
        )

    def close(self) -> None:
        """Let others have the network."""
        if self._mark is not None:
            self._mark.close()

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
