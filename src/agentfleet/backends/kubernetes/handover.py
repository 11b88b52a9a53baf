"""A Deployment's size, where the cluster's own autoscaler is to keep it: given once, then left alone.

Under server-side apply (KEP-555) a field that its only owner does not repeat returns to its default, which is 1 for a
size. So a Deployment that is made for an autoscaler never says its size by apply; the scale subresource does, which
leaves no such owner. One that did say it, because it was scaled otherwise before, hands the field over first, as
Kubernetes' documentation has it ("Transferring ownership"): a second manager says the same size, then the first stops.
"""

from __future__ import annotations

import json

from agentfleet.backends.kubernetes import naming
from agentfleet.backends.kubernetes.connection import APPLY, Requests
from agentfleet.backends.kubernetes.errors import FieldConflict
from agentfleet.backends.kubernetes.resources import DEPLOYMENTS
from agentfleet.backends.kubernetes.standing import standing
from agentfleet.errors import Conflict

_HOLDER = f"{naming.MANAGER}-size"
"""Field manager that keeps the size while nobody else has set it."""


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
        present = await standing(connection, namespace, fleet)
        if present is not None and present.applied:
            raise Conflict(f"the size of {fleet} is changing hands: {error}") from error
