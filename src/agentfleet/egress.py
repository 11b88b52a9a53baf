"""Where this process may connect to on somebody else's word: addresses are checked after they were resolved (SSRF).

::

    policy = EgressPolicy()                      # public addresses, https, ports 443 and 8443
    target = await policy.check("https://hooks.example.com/x")
    ...                                          # connect to target.address, say target.host (SNI, Host)

A name is resolved once, every address that it has is checked, and the connection goes to an address that was checked:
who answers differently the second time (DNS rebinding) is not asked a second time. A redirect is another target: check
it, too, or do not follow it. The forms in which addresses hide (decimal, octal, IPv6-mapped, wide digits, …) are
refused as such, because no honest configuration needs them, and resolvers do not agree on what they mean.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from urllib.parse import SplitResult, urlsplit

import anyio

from agentfleet.errors import AgentFleetError, BackendUnavailable, DeadlineExceeded, SpecError

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""All addresses of a name, for a port."""

_PORTS = {"http": 80, "https": 443}
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)", re.ASCII)
_NUMBER = re.compile(r"(0x[0-9a-f]*|[0-9]+)", re.ASCII)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_LOCAL_NAT64 = ipaddress.ip_network("64:ff9b:1::/48")
_ALWAYS: Sequence[IpNetwork] = tuple(
    map(
        ipaddress.ip_network,
        (
            "0.0.0.0/8",  # this host
            "169.254.0.0/16",  # link-local: the metadata of clouds
            "100.100.100.200/32",  # the metadata of one more
            "168.63.129.16/32",  # and of another
            "192.0.0.192/32",  # and of another
            "224.0.0.0/4",  # multicast
            "255.255.255.255/32",
            "::/128",
            "fe80::/10",
            "fd00:ec2::254/128",  # metadata over IPv6
            "fd20:ce::254/128",
            "ff00::/8",
        ),
    )
)
"""Never: nobody's agents, webhooks or metrics are there."""


class EgressRefused(AgentFleetError, ValueError):
    """The address is not one that this process connects to on somebody else's word. Nothing was sent."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where to connect.

    Attributes:
        scheme: "http" or "https".
        host: What was asked for: for the Host header, and for TLS to check the certificate against.
        address: What to connect to: an address that was checked.
        port: Of TCP.
        path: With its query, as it goes into the request.
    """

    scheme: str
    host: str
    address: str
    port: int
    path: str


async def resolve(host: str, port: int) -> Sequence[str]:
    """All addresses of a name, as the machine resolves it."""
    found = await anyio.getaddrinfo(host, port, type=1)  # SOCK_STREAM
    return [str(item[4][0]) for item in found]


@dataclass(frozen=True, slots=True)
class EgressPolicy:
    """Which addresses are allowed.

    Attributes:
        schemes: Of URLs.
        ports: Of TCP.
        networks: Networks that are allowed although they are not public, such as the cluster's own. Those that are
            nobody's (link-local, multicast, metadata services) cannot be allowed.
        public: Whether public addresses are allowed.
        names: Domains that names must be in, such as "example.com"; none allows every name.
        timeout: Seconds to resolve a name.
        resolver: How names are resolved.
    """

    schemes: frozenset[str] = frozenset({"https"})
    ports: frozenset[int] = frozenset({443, 8443})
    networks: tuple[IpNetwork, ...] = ()
    public: bool = True
    names: tuple[str, ...] = ()
    timeout: float = 5.0
    resolver: Resolve = field(default=resolve)

    async def check(self, url: str) -> Target:
        """Where to connect for a URL.

        Raises:
            EgressRefused: The URL is not of an allowed form, or one of its addresses is not allowed.
            BackendUnavailable: The name cannot be resolved now; `DeadlineExceeded`: not in time.
        """
        parts, host, port = self._parse(url)
        literal = _literal(host)
        if literal is not None:
            addresses = [self.admit(literal)]
        else:
            self._check_name(host)
            addresses = [self.admit(_address(each)) for each in await self._resolve(host, port)]
        if not addresses:
            raise BackendUnavailable(f"{host} has no address")
        path = parts.path or "/"
        return Target(parts.scheme, host, str(addresses[0]), port, f"{path}?{parts.query}" if parts.query else path)

    def admit(self, address: IpAddress) -> IpAddress:
        """The address, if it is allowed; raises `EgressRefused` otherwise."""
        if is_nobodys(str(address)):
            raise EgressRefused(f"{address} is not to be connected to: it belongs to this machine or its cloud")
        for meant in (address, *_hidden(address)):
            if any(meant in network for network in self.networks if network.version == meant.version):
                continue
            if not (self.public and is_public(meant)):
                raise EgressRefused(
                    f"{address} is in no network that is allowed; an operator can allow its network, if it is meant"
                )
        return address

    def _parse(self, url: str) -> tuple[SplitResult, str, int]:
        if not url.isascii() or any(sign <= " " or sign in "\\\x7f" for sign in url):
            raise EgressRefused("a URL here has ASCII letters only, and no blanks, backslashes or control characters")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise EgressRefused(f"this is no URL: {error}") from error
        if parts.scheme not in self.schemes:
            raise EgressRefused(f"scheme {parts.scheme[:20]!r} is not allowed; use {' or '.join(sorted(self.schemes))}")
        if "@" in parts.netloc:
            raise EgressRefused("a URL here has no user and password")
        if parts.fragment or "#" in url:
            raise EgressRefused("a URL here has no fragment")
        if not parts.hostname or "%" in parts.netloc:
            raise EgressRefused("a URL here names a host, without '%'")
        port = _PORTS.get(parts.scheme, 0) if port is None else port
        if port not in self.ports:
            raise EgressRefused(f"port {port} is not allowed; use {', '.join(map(str, sorted(self.ports)))}")
        return parts, parts.hostname, port

    def _check_name(self, host: str) -> None:
        labels = host.split(".")
        if host.endswith(".") or len(host) > 253 or len(labels) < 2 or not all(map(_LABEL.fullmatch, labels)):
            raise EgressRefused(f"{host[:80]!r} is no full name such as hooks.example.com")
        if _NUMBER.fullmatch(labels[-1]):
            raise EgressRefused(f"{host[:80]!r} is neither a name nor an address in its usual form")
        if labels[-1] in ("localhost", "local", "internal", "localdomain") and not self.names:
            raise EgressRefused(f"{host[:80]!r} is a name within a network; an operator can allow its domain")
        if self.names and not any(host == name or host.endswith(f".{name}") for name in self.names):
            raise EgressRefused(f"{host[:80]!r} is in none of the domains that are allowed")

    async def _resolve(self, host: str, port: int) -> Sequence[str]:
        try:
            with anyio.fail_after(self.timeout):
                return await self.resolver(host, port)
        except TimeoutError as error:
            raise DeadlineExceeded(f"{host} was not resolved within {self.timeout:g} s") from error
        except (OSError, UnicodeError) as error:
            raise BackendUnavailable(f"{host} does not resolve: {error}") from error


def networks_of(words: Sequence[str]) -> tuple[IpNetwork, ...]:
    """Networks such as "10.0.0.0/8"; raises `SpecError` for what is none."""
    try:
        return tuple(map(ipaddress.ip_network, words))
    except ValueError as error:
        raise SpecError(f"networks: {error}; write them like 10.0.0.0/8") from error


def is_public(address: IpAddress) -> bool:
    """Whether it is an address of the public internet, and nothing else."""
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


@lru_cache(maxsize=16_384)
def is_nobodys(address: str) -> bool:
    """Whether no agent can be at this address: link-local, multicast, unspecified, metadata of clouds.

    Probes ask engines' own addresses, which are private or loopback by their nature; these they never are.
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return any(
        meant in network
        for meant in (found, *_hidden(found))
        for network in _ALWAYS
        if network.version == meant.version
    )


def _literal(host: str) -> IpAddress | None:
    """The address that a host is, in its usual form; None if it is a name."""
    if ":" in host:
        return _address(host)
    if re.fullmatch(r"(0|[1-9]\d{0,2})(\.(0|[1-9]\d{0,2})){3}", host, re.ASCII):
        return _address(host)
    return None


def _address(text: str) -> IpAddress:
    try:
        found = ipaddress.ip_address(text)
    except ValueError as error:
        raise EgressRefused(f"{text[:60]!r} is no address") from error
    if isinstance(found, ipaddress.IPv6Address) and found.scope_id is not None:
        raise EgressRefused(f"{text[:60]!r} is an address of one link")
    return found


def _hidden(address: IpAddress) -> Sequence[IpAddress]:
    """The IPv4 addresses that one of IPv6 stands for."""
    if isinstance(address, ipaddress.IPv4Address):
        return ()
    low = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    found: list[IpAddress] = [each for each in (address.ipv4_mapped, address.sixtofour) if each is not None]
    if address.teredo is not None:
        found += address.teredo
    compatible = 0xFFFF < int(address) < 2**32  # "::127.0.0.1", but neither "::" nor "::1"
    if compatible or address in _NAT64 or address in _LOCAL_NAT64:
        found.append(low)
    if int(address) >> 32 & 0xFFFF_FFFF in (0x0000_5EFE, 0x0200_5EFE):  # ISATAP
        found.append(low)
    return found
