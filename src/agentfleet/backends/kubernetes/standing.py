"""What stands on the server now, read before it is overwritten: what was seen may be older.

A watch is always a little behind. Where another's word must not be lost unseen, or where the way to what is wanted
depends on what there is, the Deployment itself is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from agentfleet.backends.base import Workload
from agentfleet.backends.kubernetes import naming
from agentfleet.backends.kubernetes.connection import Requests
from agentfleet.backends.kubernetes.errors import NotFound
from agentfleet.backends.kubernetes.resources import DEPLOYMENTS, decode
from agentfleet.errors import Outdated


@dataclass(frozen=True, slots=True)
class Standing:
    """A Deployment as it is now."""

    uid: str
    version: str
    replicas: int
    applied: bool
    """Whether our own apply owns the size, and would take it back to 1 by not saying it."""
    paused: bool
    template: dict[str, Any]
    """What its pods are made of."""

    @property
    def affinity(self) -> dict[str, Any]:
        """What its pods' affinity says; empty when they have none."""
        found: dict[str, Any] | None = self.template.get("spec", {}).get("affinity")
        return found or {}

    @property
    def without_affinity(self) -> dict[str, Any]:
        """The template, but for that."""
        spec = {name: value for name, value in self.template.get("spec", {}).items() if name != "affinity"}
        return {**self.template, "spec": spec}


class _Entry(msgspec.Struct, rename="camel"):
    manager: str = ""
    operation: str = ""
    fields: dict[str, Any] = msgspec.field(default_factory=dict, name="fieldsV1")


class _Meta(msgspec.Struct, rename="camel"):
    uid: str = ""
    resource_version: str = ""
    deletion_timestamp: str | None = None
    managed_fields: list[_Entry] = []


class _Spec(msgspec.Struct):
    replicas: int = 1
    paused: bool = False
    template: dict[str, Any] = {}


class _Deployment(msgspec.Struct):
    metadata: _Meta
    spec: _Spec


async def standing(connection: Requests, namespace: str, fleet: str) -> Standing | None:
    """A fleet's Deployment; None when there is none, or only one that is going. Raises like `Connection.request`."""
    try:
        body = await connection.request("GET", DEPLOYMENTS.path(namespace, fleet))
    except NotFound:
        return None
    found = _read(body, fleet)
    return None if found.metadata.deletion_timestamp is not None else _standing(found)


def standing_in(answer: bytes, fleet: str) -> Standing:
    """A fleet's Deployment in the answer to a write; raises `BackendUnavailable` if it cannot be read."""
    return _standing(_read(answer, fleet))


def _read(body: bytes, fleet: str) -> _Deployment:
    return decode(msgspec.json.Decoder(_Deployment).decode, body, f"Deployment {fleet}")


def _standing(found: _Deployment) -> Standing:
    metadata, spec = found.metadata, found.spec
    applied = any(
        entry.manager == naming.MANAGER
        and entry.operation == "Apply"
        and "f:replicas" in entry.fields.get("f:spec", {})
        for entry in metadata.managed_fields
    )
    return Standing(metadata.uid, metadata.resource_version, spec.replicas, applied, spec.paused, spec.template)


def check_size(workload: Workload, now: Standing | None) -> None:
    """Refuse to undo a size that somebody has set, with an order that is not about the size.

    Raises:
        Outdated: There is such a size; it is adopted as soon as it is seen.
    """
    if now is not None and workload.same_size and now.replicas != workload.replicas:
        raise Outdated(
            f"fleet {workload.fleet} was set to {now.replicas} instances by somebody else, where {workload.replicas} "
            "were known of. Nothing was changed; it is decided anew when that is seen"
        )
