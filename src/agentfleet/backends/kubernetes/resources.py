"""Where objects live in the API, and how lists of them are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import msgspec

from agentfleet.backends.kubernetes.objects import (
    Deployment,
    KubeObject,
    Lease,
    Meta,
    Node,
    Pod,
    PodMetrics,
    ReplicaSet,
    Slim,
)
from agentfleet.errors import BackendUnavailable

__all__ = [
    "DEPLOYMENTS",
    "LEASES",
    "NODES",
    "PODS",
    "POD_METRICS",
    "REPLICA_SETS",
    "Page",
    "Resource",
    "decode",
    "selector",
    "version_of",
]

ObjectT = TypeVar("ObjectT", bound=KubeObject)
ValueT = TypeVar("ValueT")


class ListMeta(Slim, frozen=True):
    """Where a page belongs."""

    resource_version: str = ""
    continue_token: str = msgspec.field(default="", name="continue")
    remaining_item_count: int | None = None


class Page(Slim, Generic[ValueT], frozen=True):
    """A list, or one page of it."""

    metadata: ListMeta = ListMeta()
    items: list[ValueT] | None = None


@dataclass(frozen=True, slots=True)
class Resource(Generic[ObjectT]):
    """Where objects of one kind live in the API, and what they are decoded into.

    Args:
        group: The API group; "" for the core.
        version: Its version.
        plural: The kind's name in paths.
        type: The struct for one object.
        namespaced: Whether each object is in a namespace.
    """

    group: str
    version: str
    plural: str
    type: type[ObjectT]
    namespaced: bool = True
    read: Callable[[bytes], ObjectT] = field(init=False, repr=False, compare=False)
    """Decodes one object; use it through `decode`."""
    read_page: Callable[[bytes], Page[ObjectT]] = field(init=False, repr=False, compare=False)
    """Decodes a list."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "read", msgspec.json.Decoder(self.type).decode)
        page: Any = Page
        object.__setattr__(self, "read_page", msgspec.json.Decoder(page[self.type]).decode)

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        """The path of the collection, or of one object, or of a part of it; all namespaces for None."""
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        parts = [root]
        if namespace is not None and self.namespaced:
            parts += ["namespaces", quote(namespace, safe="")]
        parts.append(self.plural)
        parts += [quote(part, safe="") for part in (name, subresource) if part is not None]
        return "/".join(parts)


PODS = Resource("", "v1", "pods", Pod)
NODES = Resource("", "v1", "nodes", Node, namespaced=False)
LEASES = Resource("coordination.k8s.io", "v1", "leases", Lease)
REPLICA_SETS = Resource("apps", "v1", "replicasets", ReplicaSet)
DEPLOYMENTS = Resource("apps", "v1", "deployments", Deployment)
POD_METRICS = Resource("metrics.k8s.io", "v1beta1", "pods", PodMetrics)


def decode(read: Callable[[bytes], ValueT], body: bytes, what: str) -> ValueT:
    """Decode an answer.

    Args:
        read: A decoder, such as `PODS.read_page`.
        body: The answer.
        what: What was asked for, for the message.

    Raises:
        BackendUnavailable: It is not what it should be: cut off, or from somebody else.
    """
    try:
        return read(body)
    except msgspec.DecodeError as error:
        begin = body[:120].decode(errors="replace")
        raise BackendUnavailable(f"{what}: an answer that cannot be read ({error}): {begin!r}") from error


def version_of(metadata: Meta) -> int | None:
    """The resource version as a number, which orders the versions of an object; None if the server gives no number."""
    try:
        return int(metadata.resource_version)
    except ValueError:
        return None


def selector(labels: Mapping[str, str]) -> str:
    """A label selector that wants all of these."""
    return ",".join(f"{key}={value}" for key, value in labels.items())
