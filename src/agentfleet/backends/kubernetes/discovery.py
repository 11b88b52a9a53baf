"""Which API versions a server has: Kubernetes 1.20 and 1.36 do not share all of them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from agentfleet.backends.kubernetes.connection import Requests
from agentfleet.backends.kubernetes.errors import NotFound
from agentfleet.backends.kubernetes.objects import Slim
from agentfleet.backends.kubernetes.resources import decode
from agentfleet.errors import BackendRefused

__all__ = ["Discovery"]


class _GroupVersion(Slim, frozen=True):
    version: str


class _Group(Slim, frozen=True):
    name: str
    versions: tuple[_GroupVersion, ...] = ()


class _Groups(Slim, frozen=True):
    groups: tuple[_Group, ...] = ()


class _Kind(Slim, frozen=True):
    name: str
    kind: str = ""
    verbs: tuple[str, ...] = ()


class _Kinds(Slim, frozen=True):
    resources: tuple[_Kind, ...] = ()


class _Build(Slim, frozen=True):
    git_version: str = ""
    major: str = ""
    minor: str = ""


class Discovery:
    """Asks once for each thing and remembers the answer. Make a new one after the server may have been upgraded.

    Args:
        connection: How the server is asked.
    """

    def __init__(self, connection: Requests) -> None:
        self._connection = connection
        self._groups: dict[str, tuple[str, ...]] | None = None
        self._kinds: dict[str, dict[str, frozenset[str]]] = {}

    async def server_version(self) -> tuple[int, int]:
        """The server's version, such as (1, 20). Raises like `Connection.request`."""
        body = await self._connection.request("GET", "/version")
        build = decode(msgspec.json.Decoder(_Build).decode, body, "GET /version")
        major, minor = ("".join(sign for sign in part if sign.isdecimal()) for part in (build.major, build.minor))
        return int(major or 0), int(minor or 0)  # managed clusters write "27+"

    async def versions(self, group: str) -> tuple[str, ...]:
        """The versions of an API group, the server's favourite first; none if it has no such group."""
        if self._groups is None:
            body = await self._connection.request("GET", "/apis")
            found = decode(msgspec.json.Decoder(_Groups).decode, body, "GET /apis")
            self._groups = {each.name: tuple(one.version for one in each.versions) for each in found.groups}
        return self._groups.get(group, ())

    async def choose(self, group: str, wanted: Sequence[str], plural: str | None = None) -> str:
        """The first of some versions that the server has.

        Args:
            group: The API group, such as "policy".
            wanted: Versions that we can speak, best first, such as ("v1", "v1beta1").
            plural: A kind that the version must serve, such as "poddisruptionbudgets".

        Raises:
            BackendRefused: It has none of them. Beyond that, raises like `Connection.request`.
        """
        there = await self.versions(group)
        for version in wanted:
            if version in there and (plural is None or plural in await self.kinds(group, version)):
                return version
        what = f"{plural} in " if plural else ""
        raise BackendRefused(
            f"the server has no version of {what}{group} that agentfleet speaks: it has "
            f"{', '.join(there) or 'none'}, wanted is {' or '.join(wanted)}"
        )

    async def kinds(self, group: str, version: str) -> dict[str, frozenset[str]]:
        """What a version of a group serves: the verbs by plural name, parts as "pods/eviction"; empty if not there."""
        path = f"/apis/{group}/{version}" if group else f"/api/{version}"
        if path not in self._kinds:
            try:
                body = await self._connection.request("GET", path)
            except NotFound:
                return {}
            found = decode(msgspec.json.Decoder(_Kinds).decode, body, f"GET {path}")
            self._kinds[path] = {each.name: frozenset(each.verbs) for each in found.resources}
        return self._kinds[path]
