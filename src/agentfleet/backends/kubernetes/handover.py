"""A Deployment's size, where the cluster's own autoscaler is to keep it: given once, then left alone.

Under server-side apply (KEP-555) a field that its only owner does not repeat returns to its default, which is 1 for a
size. So a Deployment that is made for an autoscaler never says its size by apply; the scale subresource does, which
leaves no such owner. One that did say it, because it was scaled otherwise before, hands the field over first, as
Kubernetes' documentation has it ("Transferring ownership"): a second manager says the same size, then the first stops.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import msgspec

from agentfleet.backends.kubernetes import naming
from agentfleet.backends.kubernetes.connection import APPLY, Requests
from agentfleet.backends.kubernetes.errors import FieldConflict, NotFound
from agentfleet.backends.kubernetes.resources import DEPLOYMENTS, decode
from agentfleet.errors import Conflict

_HOLDER = f"{naming.MANAGER}-size"
"""Field manager that keeps the size while nobody else has set it."""


@dataclass(frozen=True, slots=True)
class Present:
    """The size that a Deployment has."""

    replicas: int
    applied: bool
    """Whether our own apply owns it, and would take it back to 1 by not saying it."""


class _Entry(msgspec.Struct, rename="camel"):
    manager: str = ""
    operation: str = ""
    fields: dict[str, Any] = msgspec.field(default_factory=dict, name="fieldsV1")


class _Meta(msgspec.Struct, rename="camel"):
    managed_fields: list[_Entry] = []


class _Spec(msgspec.Struct):
    replicas: int = 1


class _Deployment(msgspec.Struct):
    metadata: _Meta
    spec: _Spec


async def present_size(connection: Requests, namespace: str, fleet: str) -> Present | None:
    """The size of a fleet's Deployment as it is now; None when there is none. Raises like `Connection.request`."""
    try:
        body = await connection.request("GET", DEPLOYMENTS.path(namespace, fleet))
    except NotFound:
        return None
    found = decode(msgspec.json.Decoder(_Deployment).decode, body, f"Deployment {fleet}")
    applied = any(
        entry.manager == naming.MANAGER
        and entry.operation == "Apply"
        and "f:replicas" in entry.fields.get("f:spec", {})
        for entry in found.metadata.managed_fields
    )
    return Present(found.spec.replicas, applied)


async def hand_over(connection: Requests, namespace: str, fleet: str, replicas: int) -> None:
    """Have the size stay what it is when our apply stops saying it.

    Raises:
        Conflict: Somebody set another size meanwhile, and our apply owns the field still.
        BackendError: As `Connection.request`.
    """
    said = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": fleet, "namespace": namespace},
        "spec": {"replicas": replicas},
    }
    try:
        await connection.request(
            "PATCH",
            DEPLOYMENTS.path(namespace, fleet),
            query={"fieldManager": _HOLDER},
            body=json.dumps(said).encode(),
            content_type=APPLY,
        )
    except FieldConflict as error:  # another size was set just now, which makes the field its writer's
        present = await present_size(connection, namespace, fleet)
        if present is not None and present.applied:
            raise Conflict(f"the size of {fleet} is changing hands: {error}") from error
